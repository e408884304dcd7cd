"""Answers of an engine in this process. Thanks to its prefix cache, later turns of a conversation process only new tokens."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from ..engine.engine import Engine
from ..engine.pictures import PictureRows
from ..engine.request import Request, SamplingParams
from ..errors import BackendError, ConfigError, RequestError
from ..integration.bind.runtime import runtime_of
from ..integration.multimodal import PictureEncoder
from .conversation import Answer, Messages, StopSignal, prompt_tokens, rate
from .fit import Fitted, fit
from .pictures import picture_of_file
from .sampling import ignored_settings, sampling_params
from .sampling_defaults import sampling_defaults

_ids = itertools.count(1)


def default_sampling(model: Any, **given: Any) -> SamplingParams:
    """`sampling_params` with the generation config of an optimized model. Warns once about settings that an engine ignores."""
    config = model.generation_config
    if names := ignored_settings(config):
        runtime_of(model).warn_once(f"the generation config sets {', '.join(names)}, which only model.generate supports")
    return sampling_params(config, **given)


def chat_sampling(model: Any, name: str, **given: Any) -> SamplingParams:
    """The sampling parameters of a chat: the defaults of `dso serve` (see `sampling_defaults`), overridden by `given`.

    Args:
        model: an optimized model.
        name: of the model, or the path of its files.
        given: see `sampling_params`.
    """
    return default_sampling(model, **{"top_k": 0, **sampling_defaults(model, name).values, **given})


def room_of(engine: Engine, context: int | None = None) -> int:
    """Maximum tokens of prompt and answer together: limited by the model, the cache and `context`."""
    core = engine.core
    return min(core.cache_tokens, context or core.facts.context)


def request_for(
    engine: Engine,
    tokens: list[int],
    sampling: SamplingParams,
    context: int | None = None,
    pictures: PictureRows | None = None,
) -> Request:
    """A request whose max_tokens is limited to the space left.

    Args:
        tokens: of the prompt.
        context: maximum tokens of prompt and answer together; None: limited by the model and its cache.
        pictures: the prompt's rows of pictures.

    Raises:
        RequestError: the prompt alone fills the context.
    """
    whole = room_of(engine, context)
    room = whole - len(tokens)
    if room < 1:
        raise RequestError(
            "prompt",
            f"its {len(tokens)} tokens leave no room in the model's context of {whole}; shorten it or start a new conversation",
        )
    max_tokens = room if sampling.max_tokens is None else min(room, sampling.max_tokens)
    return Request(tokens, replace(sampling, max_tokens=max_tokens), id=f"answer-{next(_ids)}", pictures=pictures)


def picture_prompt(encoder: PictureEncoder, messages: Messages) -> tuple[list[int], PictureRows | None]:
    """The prompt of a dialogue in which messages have pictures: their files are the message's `pictures`, before its text.

    Args:
        encoder: of the model.
        messages: the dialogue.

    Raises:
        RequestError: a file is no picture, or the model's template rejects these messages.
    """
    images = [picture_of_file(Path(path)) for message in messages for path in message.get("pictures", ())]
    return image_prompt(encoder, messages, images)


def image_prompt(encoder: PictureEncoder, messages: Messages, images: Sequence[Any]) -> tuple[list[int], PictureRows | None]:
    """As `picture_prompt`, for pictures that have been read.

    Args:
        encoder: of the model.
        messages: the dialogue; a message has as many pictures as its `pictures`, whose items are not used.
        images: PIL images in RGB, of all messages.

    Raises:
        RequestError: the model's template rejects these messages, or the model cannot use a picture.
    """
    parts = [
        {
            "role": message["role"],
            "content": [{"type": "image"}] * len(message.get("pictures", ())) + [{"type": "text", "text": message["content"]}],
        }
        for message in messages
    ]
    processor = encoder.processor
    template = getattr(processor, "chat_template", None) or processor.tokenizer.chat_template
    try:
        text = processor.apply_chat_template(parts, chat_template=template, add_generation_prompt=True, tokenize=False)
    except TemplateError as error:
        raise RequestError("messages", f"the model's chat template rejects them: {error}") from error
    return encoder.prompt(processor.tokenizer(text, add_special_tokens=False)["input_ids"], images)


def dialogue_tokens(tokenizer: Any, messages: Messages, sampling: SamplingParams, whole: int) -> tuple[list[int], int]:
    """The prompt of a dialogue, and the number of oldest messages dropped to leave room for an answer.

    Args:
        whole: maximum tokens of prompt and answer together, up to a quarter of which is reserved for the answer.

    Raises:
        RequestError: the last message alone is too long.
    """
    fitted = _fitted(
        messages,
        lambda some: len(prompt_tokens(tokenizer, some)),
        lambda message: len(tokenizer(message["content"], add_special_tokens=False)["input_ids"]),
        sampling,
        whole,
    )
    return prompt_tokens(tokenizer, fitted.messages), fitted.dropped


def picture_dialogue(
    encoder: PictureEncoder, messages: Messages, sampling: SamplingParams, whole: int
) -> tuple[list[int], PictureRows | None, int]:
    """As `dialogue_tokens`, for a dialogue with pictures (see `picture_prompt`): the prompt, its rows of pictures, and the
    number of dropped messages, whose pictures are dropped too.

    Raises:
        RequestError: see `picture_prompt`, or the last message alone is too long.
    """
    images = {path: picture_of_file(Path(path)) for message in messages for path in message.get("pictures", ())}
    tokenizer = encoder.processor.tokenizer
    prompts: dict[int, tuple[list[int], PictureRows | None]] = {}  # by the number of messages, of which the oldest are dropped

    def prompt(some: Messages) -> tuple[list[int], PictureRows | None]:
        if len(some) not in prompts:
            shown = [images[path] for message in some for path in message.get("pictures", ())]
            prompts[len(some)] = image_prompt(encoder, some, shown)
        return prompts[len(some)]

    def weight(message: dict[str, Any]) -> int:
        pictures = (encoder.prompt([encoder.placeholder], [images[path]])[0] for path in message.get("pictures", ()))
        return len(tokenizer(message["content"], add_special_tokens=False)["input_ids"]) + sum(map(len, pictures))

    fitted = _fitted(messages, lambda some: len(prompt(some)[0]), weight, sampling, whole)
    return *prompt(fitted.messages), fitted.dropped


def _fitted(
    messages: Messages,
    tokens: Callable[[Messages], int],
    weight: Callable[[dict[str, Any]], int],
    sampling: SamplingParams,
    whole: int,
) -> Fitted:
    """The messages that leave room for an answer, see `dialogue_tokens` and `fit`; all of them if no choice does."""
    for answer_room in (min(sampling.max_tokens or whole, whole // 4), 1):
        with suppress(RequestError):
            return fit(messages, tokens, weight, whole - answer_room)
    return Fitted(messages)  # `request_for` raises the error that it is too long


def answer(
    engine: Engine,
    tokens: list[int],
    write: Callable[[str], None],
    sampling: SamplingParams,
    stop: StopSignal | None = None,
    pictures: PictureRows | None = None,
) -> Answer:
    """The answer to a prompt, with its text written as it is generated.

    Args:
        tokens: of the prompt.
        stop: stops the answer within one step.
        pictures: the prompt's rows of pictures.

    Raises:
        RequestError: the prompt leaves no room for an answer.
        BackendError: the model failed.
    """
    request, started = request_for(engine, tokens, sampling, pictures=pictures), time.perf_counter()
    ids: list[int] = []
    texts: list[str] = []
    times: list[float] = []
    finish, cached = "stop", 0
    with (stop or StopSignal()).calling(lambda: engine.core.cancel(request.id)):
        for output in engine.stream(request):
            ids += output.token_ids
            times += [time.perf_counter()] * len(output.token_ids)
            finish, cached = output.finish or finish, output.cached_tokens
            if finish == "error":
                raise BackendError(output.error or "the engine stopped without an error message")
            if output.text:
                texts.append(output.text)
                write(output.text)
            if stop is not None and stop.asked:  # the stop came before the request could be cancelled
                engine.core.cancel(request.id)
    return Answer(
        text="".join(texts),
        ids=ids,
        finish_reason="interrupted" if finish == "cancelled" else finish,
        prompt_tokens=len(tokens),
        new_tokens=len(ids),
        first_token_s=times[0] - started if times else 0.0,
        tokens_per_s=rate(len(ids), times[0], times[-1]) if times else 0.0,
        cached_tokens=cached,
    )


class EngineSpeaker:
    """
    Args:
        engine: with a tokenizer; not used by anything else at the same time.
        sampling: of the answers.
        encoder: makes prompts with pictures; None: the model reads text only.

    Raises:
        ConfigError: the model has no chat template.
    """

    def __init__(self, engine: Engine, sampling: SamplingParams, encoder: PictureEncoder | None = None) -> None:
        if not engine.tokenizer.chat_template:
            raise ConfigError(
                "this model has no chat template, so it cannot hold a conversation; use `dso run --raw` to continue a text"
            )
        self.engine, self.sampling, self.encoder = engine, sampling, encoder

    def answer(self, messages: Messages, write: Callable[[str], None], stop: StopSignal) -> Answer:
        if any(message.get("pictures") for message in messages):
            if self.encoder is None:
                raise RequestError("messages", "this model reads text only")
            ids, rows, dropped = picture_dialogue(self.encoder, messages, self.sampling, room_of(self.engine))
            return replace(answer(self.engine, ids, write, self.sampling, stop, rows), dropped_messages=dropped)
        tokens, dropped = dialogue_tokens(self.engine.tokenizer, messages, self.sampling, room_of(self.engine))
        return replace(answer(self.engine, tokens, write, self.sampling, stop), dropped_messages=dropped)
