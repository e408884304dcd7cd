"""Appends the tokens of a step to a request, up to the end of its text. Does not import torch."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from ..backends.sampling import NOT_FINITE
from .request import Finish, Output, TokenLogprob
from .running import Running
from .sampling.request_sampler import NotANumberError, NoTokenError
from .scheduling.scheduler import ScheduledChunk


def append_tokens(
    chunk: ScheduledChunk,
    tokens: list[int | None],
    logits: Any,
    row: int,
    output: Output,
    eos: Collection[int],
    *,
    with_text: bool,
) -> Finish | None:
    """Appends the tokens that follow a chunk to its request and to the output; returns why the request ends, or None.

    Args:
        chunk: the chunk; after its last token and after each of its drafts, one token is chosen.
        tokens: tokens of all rows, chosen by the backend; None: the token is chosen here from the logits.
        logits: float32 [V] by row, at least of the rows without a token; or what is to be reported of the token.
        row: the first of the chunk's rows that tokens are chosen from.
        output: of the request in this step.
        eos: ids of the tokens that end a text.
        with_text: whether tokens are converted to text.

    Raises:
        NotANumberError: the logits are not finite.
    """
    r = chunk.running
    report_logprobs = r.sampler.sampling.logprobs is not None
    if report_logprobs:
        output.logprobs = []
    for j in range(1 + len(chunk.drafts)):
        token = tokens[row + j]
        if token is None:
            try:
                token = r.sampler.choose(logits[row + j], r.generated)
            except NoTokenError:
                output.stop_reason = "no token is allowed"
                return "stop"
        elif token == NOT_FINITE:
            raise NotANumberError
        else:
            r.sampler.took(token)
        if not r.max_tokens:  # the choice has only checked the logits
            return "length"
        if report_logprobs and output.logprobs is not None:
            known = logits[row + j]
            output.logprobs.append(known if isinstance(known, TokenLogprob) else r.sampler.logprob(known, token))
        output.token_ids.append(token)
        r.sequence.tokens.append(token)
        r.generated += 1
        finish = _add_text(r, token, output, eos, with_text)
        if finish or j == len(chunk.drafts) or chunk.drafts[j] != token:
            return finish
    return None


def _add_text(r: Running, token: int, output: Output, eos: Collection[int], with_text: bool) -> Finish | None:
    """Adds a token's text to the output; returns why the request ends at this token, or None."""
    sampling = r.sampler.sampling
    stops = r.generated > sampling.min_tokens
    if stops and token in eos and not sampling.ignore_eos:
        return "stop"
    if stops and token in sampling.stop_token_ids:
        output.stop_reason = token
        return "stop"
    if with_text:
        piece, stop = r.text.add(token, stops=stops)
        output.text += piece
        if stop is not None:
            output.stop_reason = stop
            return "stop"
    if r.sampler.grammar is not None and r.sampler.grammar.finished:
        return "stop"
    return "length" if r.generated >= r.max_tokens else None
