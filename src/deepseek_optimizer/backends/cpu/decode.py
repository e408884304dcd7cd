"""A call of `Plan.decode` for the native library."""

from __future__ import annotations

import ctypes as C
from typing import Any

import numpy as np
import torch

from ..decoding import DecodeCall, RowChoice
from .buffers import address, optional, strided
from .native import Choice, Decode

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
    return native, tokens, [choices, call]


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
