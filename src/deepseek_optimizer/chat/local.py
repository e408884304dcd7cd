"""Answers of an engine in this process. Its prefix cache makes a conversation's later turns cheap: only what is new is read."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

from ..backends.base import BLOCK_TOKENS
from ..engine.engine import Engine
from ..engine.request import Request, SamplingParams
from ..errors import BackendError, ConfigError, RequestError
from ..integration.bind.runtime import runtime_of
from .conversation import Answer, Messages, StopSignal, prompt_tokens, rate
from .fit import fit
from .sampling import left_out, sampling_params

_ids = itertools.count(1)


def default_sampling(model: Any, **given: Any) -> SamplingParams:
    """`sampling_params` by the generation config of an optimised model, which says once what of it an engine leaves out."""
    config = model.generation_config
    if names := left_out(config):
        runtime_of(model).warn_once(f"the generation config sets {', '.join(names)}, which only model.generate heeds")
    return sampling_params(config, **given)


def room_of(engine: Engine, context: int | None = None) -> int:
    """Tokens that prompt and answer may take together: as many as model and cache have, and no more than `context`."""
    core = engine.core
    return min(core.facts.context, core.blocks * BLOCK_TOKENS, context or core.facts.context)


def request_for(engine: Engine, tokens: list[int], sampling: SamplingParams, context: int | None = None) -> Request:
    """A request that gets as many tokens of those it asks for as there is room.

    Args:
        tokens: of the prompt.
        context: what prompt and answer may take together; None: as much as the model and its cache have.

    Raises:
        RequestError: the prompt alone fills it.
    """
    whole = room_of(engine, context)
    room = whole - len(tokens)
    if room < 1:
        raise RequestError(
            "prompt", f"its {len(tokens)} tokens leave no room in the model's context of {whole}; shorten it or start afresh"
        )
    most = room if sampling.max_tokens is None else min(room, sampling.max_tokens)
    return Request(tokens, replace(sampling, max_tokens=most), id=f"answer-{next(_ids)}")


def dialogue_tokens(tokenizer: Any, messages: Messages, sampling: SamplingParams, whole: int) -> tuple[list[int], int]:
    """The prompt of a dialogue, and how many of its oldest messages are left out so that an answer has room.

    Args:
        whole: what prompt and answer may take together, of which a quarter is kept for the answer if it may be so long.

    Raises:
        RequestError: the last message alone is too long.
    """
    for answer_room in (min(sampling.max_tokens or whole, whole // 4), 1):
        with suppress(RequestError):
            fitted = fit(
                messages,
                lambda some: len(prompt_tokens(tokenizer, some)),
                lambda message: len(tokenizer(message["content"], add_special_tokens=False)["input_ids"]),
                whole - answer_room,
            )
            return prompt_tokens(tokenizer, fitted.messages), fitted.dropped
    return prompt_tokens(tokenizer, messages), 0  # `request_for` says that it is too long, and by how much


def answer(
    engine: Engine, tokens: list[int], write: Callable[[str], None], sampling: SamplingParams, stop: StopSignal | None = None
) -> Answer:
    """The answer to a prompt, its text written as it comes.

    Args:
        tokens: of the prompt.
        stop: ends the answer within a step.

    Raises:
        RequestError: the prompt leaves no room.
        BackendError: the model could not go on.
    """
    request, started = request_for(engine, tokens, sampling), time.perf_counter()
    ids: list[int] = []
    pieces: list[str] = []
    times: list[float] = []
    finish, cached = "stop", 0
    with (stop or StopSignal()).calling(lambda: engine.core.cancel(request.id)):
        for output in engine.stream(request):
            ids += output.token_ids
            times += [time.perf_counter()] * len(output.token_ids)
            finish, cached = output.finish or finish, output.cached_tokens
            if finish == "error":
                raise BackendError(output.error or "the engine could not go on")
            if output.text:
                pieces.append(output.text)
                write(output.text)
            if stop is not None and stop.asked:  # before the request was there to be cancelled
                engine.core.cancel(request.id)
    return Answer(
        text="".join(pieces),
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
        engine: with a tokenizer; nobody else may use it meanwhile.

    Raises:
        ConfigError: the model has no chat template.
    """

    def __init__(self, engine: Engine, sampling: SamplingParams) -> None:
        if not engine.tokenizer.chat_template:
            raise ConfigError("this model has no chat template, so it can't hold a conversation; `dso run` continues a text")
        self.engine, self.sampling = engine, sampling

    def answer(self, messages: Messages, write: Callable[[str], None], stop: StopSignal) -> Answer:
        tokens, dropped = dialogue_tokens(self.engine.tokenizer, messages, self.sampling, room_of(self.engine))
        return replace(answer(self.engine, tokens, write, self.sampling, stop), dropped_messages=dropped)
