"""Calls of `Plan.decode` and `Plan.decode_drafted` for the native library."""

from __future__ import annotations

import ctypes as C
from typing import Any

import numpy as np
import torch

from ..decoding import DecodeCall, DraftedCall, DraftedRound, RowChoice
from .buffers import address, optional, strided
from .structs import Choice, Decode, DraftedDecode

_I32, _U32, _F64 = np.dtype(np.int32), np.dtype(np.uint32), np.dtype(np.float64)
GENERATOR_WORDS = 626  # of dso_mt19937


def native_call(call: DecodeCall, rows: int, vocab: int, steps: int) -> tuple[Decode, Any, list[Any]]:
    """The library's description of a call.

    Args:
        call: the call.
        rows: number of sequences.
        vocab: size of the vocabulary.
        steps: maximum number of steps, at most `call.steps`.

    Returns: the description, the array that the tokens are written to, int32 [steps, rows], and what it refers to besides.

    Raises:
        ValueError: the call does not fit the batch.
    """
    if len(call.rows) != rows:
        raise ValueError(f"rows must be {rows} choices, one per sequence, got {len(call.rows)}")
    choices = (Choice * rows)(*(native_choice(row, call.steps, vocab) for row in call.rows))
    tokens = np.empty((steps, rows), np.int32)
    native = Decode(steps, len(call.stops), address(call.stops, "stops", _I32, (len(call.stops),)), call.seconds)
    native.choices = C.addressof(choices)
    native.generator = optional(call.generator, "generator", _U32, (GENERATOR_WORDS,))
    native.variates = call.variates
    native.tokens = address(tokens, "tokens", _I32, (steps, rows))
    native.token_of = optional(call.token_of, "token_of", _I32, (vocab,))
    native.keep_logits = call.keep_logits
    return native, tokens, [choices, call]


class DraftedDecoding:
    """The library's description of a call with drafts, and what it returns.

    Args:
        call: the call.
        vocab, draft_vocab: number of logits of the model and of the drafting plan.

    Attributes:
        native: the description.
    """

    def __init__(self, call: DraftedCall, vocab: int, draft_vocab: int) -> None:
        rounds, most = call.rounds, call.rounds * (1 + call.drafts)
        self._choice = native_choice(call.row, call.room, vocab)
        self._tokens, self._took = np.empty(most, np.int32), np.empty(rounds, np.float64)
        self._drafted, self._chosen = np.empty(rounds, np.int32), np.empty(rounds, np.int32)
        self._call = call  # keeps what is referred to
        self.native = native = DraftedDecode(rounds, call.drafts, call.room, len(call.stops))
        native.stops = address(call.stops, "stops", _I32, (len(call.stops),))
        native.seconds, native.least = call.seconds, call.least
        native.choice = C.addressof(self._choice)
        native.token_of = optional(call.token_of, "token_of", _I32, (draft_vocab,))
        native.tokens = address(self._tokens, "tokens", _I32, (most,))
        native.drafted = address(self._drafted, "drafted", _I32, (rounds,))
        native.chosen = address(self._chosen, "chosen", _I32, (rounds,))
        native.took = address(self._took, "took", _F64, (rounds,))

    @property
    def rounds(self) -> list[DraftedRound]:
        """The rounds that were run."""
        done = self.native.done
        ends = np.cumsum(self._chosen[:done]).tolist()
        tokens = self._tokens.tolist()
        return [
            DraftedRound(tokens[end - count : end], drafted, seconds)
            for end, count, drafted, seconds in zip(
                ends, self._chosen.tolist(), self._drafted.tolist(), self._took.tolist(), strict=False
            )
        ]


def native_choice(row: RowChoice, steps: int, vocab: int) -> Choice:
    """The library's description of how the tokens of a sequence are chosen in up to `steps` steps."""
    choice = Choice(repetition=1.0)
    filters, penalties = row.filters, row.penalties
    if any(source is not None for source in (row.numbers, row.noise, row.variate)):
        choice.temperature, choice.top_k = filters.temperature, min(filters.top_k, vocab)
        if row.numbers is not None:
            choice.numbers = address(row.numbers[:steps], "numbers", _F64, (steps,))
        if row.noise is not None:
            choice.noise = strided(row.noise[:steps], "noise", torch.float32, (steps, vocab))
            choice.noise_stride = row.noise.stride(0) if steps > 1 else vocab
        choice.first_variate = row.variate or 0
    choice.top_p, choice.min_p = filters.top_p, filters.min_p
    if penalties is not None:
        choice.repetition, choice.window = penalties.repetition, penalties.window
        choice.frequency, choice.presence = penalties.frequency, penalties.presence
        choice.n_tokens, choice.n_prompt = len(penalties.tokens), penalties.prompt
        choice.tokens = address(penalties.tokens, "tokens", _I32, (len(penalties.tokens),))
    if row.barred is not None:
        choice.n_barred, choice.barred_steps = len(row.barred), min(row.barred_steps, steps)
        choice.barred = address(row.barred, "barred", _I32, (len(row.barred),))
    return choice
