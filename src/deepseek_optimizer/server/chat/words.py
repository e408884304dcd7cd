"""Words in a request's samplers as sequences of tokens."""

from __future__ import annotations

from functools import partial
from typing import Any

from ...engine.sampling.words import bad_words
from ..http.caller import Caller
from ..protocol.samplers import Samplers
from ..state import ServerState
from ..tokens.tokenizing import Lane
from .prompts import tokens_of

_BREAKERS = ("\n", ":", '"', "*")  # llama-server's default


async def sampler_words(state: ServerState, body: Samplers, caller: Caller) -> dict[str, Any]:
    """The fields `bad_words` and `dry_breakers` of `SamplingParams`, as far as the request needs them.

    Raises:
        ApiError: see `FairQueue.run`.
    """
    if not body.bad_words and not body.dry_multiplier:
        return {}
    return await state.tokenizing(partial(_words, state, body), caller)


def _words(state: ServerState, body: Samplers, lane: Lane) -> dict[str, Any]:
    encode = partial(tokens_of, lane.tokenizer, special=False)
    values: dict[str, Any] = {}
    if body.bad_words:
        values["bad_words"] = bad_words(body.bad_words, encode)
    if body.dry_multiplier:
        breakers = _BREAKERS if body.dry_sequence_breakers is None else tuple(body.dry_sequence_breakers)
        values["dry_breakers"] = state.breakers.of(breakers, encode)
    return values
