"""Samplers beyond OpenAI's: every field reaches the engine, and words become tokens."""

from __future__ import annotations

import pytest

from deepseek_optimizer.server.routes.tokenizer_info import describe
from support.byte_tokenizer import new_byte_tokenizer
from support.live_server import assert_error

TEXT, CHAT = "/v1/completions", "/v1/chat/completions"
BODIES = {TEXT: {"prompt": "x", "max_tokens": 2}, CHAT: {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2}}


def sampling_of(live, path=TEXT, **fields):
    actual = live.client.post(path, json={**BODIES[path], **fields})
    assert actual.status_code == 200, actual.text
    return live.engine.seen[-1].sampling


@pytest.mark.parametrize("path", BODIES)
def test_fields_reach_the_engine(live, path):
    fields = {
        "typical_p": 0.5, "top_n_sigma": 1.5, "xtc_probability": 0.5, "xtc_threshold": 0.2, "dry_multiplier": 0.8,
        "dry_base": 1.5, "dry_allowed_length": 3, "mirostat": 2, "mirostat_tau": 3.0, "mirostat_eta": 0.2,
    }  # fmt: skip
    sampling = sampling_of(live, path, **fields, dry_penalty_last_n=9, allowed_token_ids=[5, 6])
    assert {name: getattr(sampling, name) for name in fields} == fields
    assert (sampling.dry_last_n, sampling.allowed_token_ids) == (9, (5, 6))
    nothing = sampling_of(live, path, top_n_sigma=-1, dry_penalty_last_n=-1, mirostat=0, **dict.fromkeys(["typical_p"]))
    assert nothing == sampling_of(live, path)


def test_llama_servers_penalty_counts_its_last_tokens(live):
    def window(**fields):
        sampling = sampling_of(live, **fields)
        return sampling.repetition_penalty, sampling.repetition_window

    assert window(repeat_penalty=1.5) == (1.5, 64)
    assert window(repeat_penalty=1.5, repeat_last_n=7) == (1.5, 7)
    assert window(repeat_penalty=1.5, repeat_last_n=-1) == (1.5, None)
    assert window(repetition_penalty=1.5) == (1.5, None)
    assert window(repetition_penalty=1.5, repeat_last_n=3) == (1.5, 3)


def test_words_become_tokens(live):
    encode = live.engine.tokenizer
    sampling = sampling_of(live, bad_words=["dog"], dry_multiplier=1.0)
    assert tuple(encode("dog", add_special_tokens=False)["input_ids"]) in sampling.bad_words
    for text in ("\n", ":", '"', "*"):
        (token,) = encode(text, add_special_tokens=False)["input_ids"]
        assert () in sampling.dry_breakers[token]
    sampling = sampling_of(live, dry_multiplier=1.0, dry_sequence_breakers=["ab"])
    a, b = encode("ab", add_special_tokens=False)["input_ids"]
    assert sampling.dry_breakers == {a: ((b,),)}
    assert sampling_of(live, dry_multiplier=1.0, dry_sequence_breakers=[]).dry_breakers == {}


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("name,values", [
    ("typical_p", [0, 1.1]), ("top_n_sigma", [-2, 101]), ("xtc_probability", [-1, 2]), ("xtc_threshold", [-1, 2]),
    ("dry_multiplier", [-1, 101]), ("dry_base", [0.5, 101]), ("dry_allowed_length", [-1]), ("dry_penalty_last_n", [-2]),
    ("dry_sequence_breakers", [[""], ["x"] * 17, ["x" * 65]]), ("mirostat", [3, -1]), ("mirostat_tau", [-1, 101]),
    ("mirostat_eta", [-1, 2]), ("repeat_penalty", [0, 101]), ("repeat_last_n", [-2]), ("bad_words", [[""], ["x"] * 129]),
    ("allowed_token_ids", [[], [-1], [2**31], [260_000]]),
])  # fmt: skip
def test_values_out_of_range(refused, path, name, values):
    for value in values:
        refused(path, {name: value, **BODIES[path]}, 400)


def test_the_last_message_is_continued(client, live, make_server):
    def prompt(server=live, **body):
        messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "I am"}]
        answer = server.client.post(CHAT, json={"messages": messages, "max_tokens": 1, **body})
        assert answer.status_code == 200, answer.text
        return server.engine.tokenizer.decode(server.engine.seen[-1].prompt)

    answered, ended = prompt(), prompt(add_generation_prompt=False)
    assert answered.startswith(ended) and len(answered) > len(ended)
    for body in ({"continue_final_message": True}, {"continue_final_message": True, "add_generation_prompt": False}):
        assert prompt(**body).endswith("I am") and ended.startswith(prompt(**body))
    both = {"messages": BODIES[CHAT]["messages"], "continue_final_message": True}
    assert client.post(CHAT, json=both).status_code == 400  # the last message is not the assistant's
    assert client.post(CHAT, json={**both, "add_generation_prompt": True}).status_code == 400


def test_the_last_message_is_continued_as_by_llama_server(make_server):
    from deepseek_optimizer.server.settings import ServerSettings

    live = make_server(ServerSettings(prefill_assistant=True))

    def ends(content="I am", **body):
        messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": content}]
        live.client.post(CHAT, json={"messages": messages, "max_tokens": 1, **body})
        return live.engine.tokenizer.decode(live.engine.seen[-1].prompt).endswith(content)

    assert ends() and not ends(add_generation_prompt=True) and not ends(continue_final_message=False)
    twice = [{"role": "user", "content": "hi"}, *[{"role": "assistant", "content": "I am"}] * 2]
    assert_error(live.client.post(CHAT, json={"messages": twice}), 400, "messages")
    assert live.client.post(CHAT, json={"messages": twice[1:2], "max_tokens": 1}).status_code == 200


def test_tokenizer_info(client, live):
    info = client.get("/tokenizer_info").json()
    tokenizer = live.engine.tokenizer
    assert info["tokenizer_class"] == type(tokenizer).__name__ and info["chat_template"] == tokenizer.chat_template
    assert info["eos_token"] == tokenizer.eos_token
    assert not any(name.endswith("_file") or "path" in name for name in info)


def test_tokenizer_info_without_a_limit():
    tokenizer = new_byte_tokenizer()
    tokenizer.init_kwargs["model_max_length"] = int(1e30)  # as Transformers stores it; too large for orjson
    assert describe(tokenizer)["model_max_length"] is None
