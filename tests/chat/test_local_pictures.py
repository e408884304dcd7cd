"""Conversations with pictures in this process: the oldest turns, and their pictures, are dropped when the context is full."""

from __future__ import annotations

import pytest

from deepseek_optimizer import DeepSeekConfig, DynamicGraphOptimizer
from deepseek_optimizer.chat.conversation import Conversation
from deepseek_optimizer.chat.local import EngineSpeaker, picture_dialogue, picture_prompt, room_of
from deepseek_optimizer.chat.sampling import sampling_params
from deepseek_optimizer.errors import RequestError
from deepseek_optimizer.integration.multimodal import PictureEncoder
from deepseek_optimizer.serving import make_engine
from support.picture_processors import make_pair, picture


def quiet(_: str) -> None:
    pass


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """An encoder of a model that reads at most 256 tokens and never ends a text, and files of pictures."""
    folder = tmp_path_factory.mktemp("pictures")
    paths = []
    for n in range(6):
        paths.append(str(folder / f"{n}.png"))
        picture(30 + n, 20, n).save(paths[-1])
    model, processor = make_pair("gemma3", max_position_embeddings=256)
    DynamicGraphOptimizer(model, config=DeepSeekConfig(precision="fp32", kv_cache="fp32")).optimize()
    model.generation_config.eos_token_id = None
    processor.tokenizer.chat_template = processor.chat_template
    return PictureEncoder(model, processor), paths


def test_a_conversation_longer_than_the_context_continues(seen):
    encoder, paths = seen
    with make_engine(encoder.model, encoder.processor.tokenizer) as engine:
        talk = Conversation(EngineSpeaker(engine, sampling_params(max_tokens=12), encoder), system="Be brief.")
        assert room_of(engine) == 256
        replies = [talk.say(f"Question {n}? " * 2, quiet, pictures=[path]) for n, path in enumerate(paths)]
        replies.append(talk.say("And now? " * 4, quiet))
    assert replies[0].dropped_messages == 0 < replies[-1].dropped_messages
    assert all(reply.new_tokens == 12 and reply.prompt_tokens + 12 <= 256 for reply in replies)
    assert len(talk.turns) == 14 and sum("pictures" in turn for turn in talk.turns) == 6  # the history is complete


def test_the_pictures_of_dropped_messages_are_dropped(seen):
    encoder, paths = seen
    messages = [{"role": "system", "content": "Be brief."}]
    for n, path in enumerate(paths[:4]):
        messages += [{"role": "user", "content": f"{n}" * 20, "pictures": [path]}, {"role": "assistant", "content": "a" * 20}]
    messages.append({"role": "user", "content": "And now?"})
    whole, rows, none = picture_dialogue(encoder, messages, sampling_params(max_tokens=10), 10_000)
    assert none == 0 and (whole, len(rows.places)) == (picture_prompt(encoder, messages)[0], 4 * 9)
    ids, rows, dropped = picture_dialogue(encoder, messages, sampling_params(max_tokens=10), len(whole))
    remaining = [messages[0], *messages[1 + dropped :]]
    assert dropped > 0 and dropped % 2 == 0 and remaining[1]["role"] == "user"
    assert ids == picture_prompt(encoder, remaining)[0] and len(ids) + 10 <= len(whole)
    assert len(rows.places) == 9 * sum("pictures" in message for message in remaining)
    ids, rows, dropped = picture_dialogue(encoder, messages, sampling_params(max_tokens=10), 60)
    assert rows is None and dropped == 8  # no message with a picture is left


def test_a_last_message_that_is_too_long(seen):
    encoder, paths = seen
    with make_engine(encoder.model, encoder.processor.tokenizer) as engine:
        talk = Conversation(EngineSpeaker(engine, sampling_params(max_tokens=4), encoder))
        with pytest.raises(RequestError, match="leave no room"):
            talk.say("x" * 300, quiet, pictures=paths[:1])
        assert talk.turns == []
