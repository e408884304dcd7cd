"""Ops with recurrent states equal the reference's formulas, row by row, and store the states that a step names."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from support import triton_interpreter

triton_interpreter.require()

from deepseek_optimizer.backends.base import DECODE, PREFILL, StepBatch
from deepseek_optimizer.backends.cuda.kernels import recurrent
from deepseek_optimizer.backends.cuda.states import DeviceStates
from deepseek_optimizer.backends.cuda.step import StepIntegers
from deepseek_optimizer.backends.reference import recurrent as reference
from deepseek_optimizer.backends.reference.states import StateSlots
from deepseek_optimizer.graph.ir import StateSpec

from .values import ints, random

CPU = torch.device("cpu")
SLOTS = 8
# Phase, rows, the slot that the state is read from, and (row of the sequence, slot) that it is stored in: a draft that may be
# rejected, of which the last state replaces the one that was read; a token; a new prompt, with a state in its middle; a prompt
# that continues, shorter than a convolution.
SEQUENCES = [
    (DECODE, 2, 3, [(0, 5), (1, 3)]),
    (DECODE, 1, 1, [(0, 1)]),
    (PREFILL, 6, -1, [(2, 0), (5, 6)]),
    (PREFILL, 2, 2, [(1, 4)]),
]


def batch_of() -> StepBatch:
    phase, rows, source, saves = zip(*SEQUENCES, strict=True)
    starts = np.cumsum(rows) - rows
    context = [0 if slot < 0 else 40 for slot in source]
    at = np.concatenate([np.arange(c, c + r) for c, r in zip(context, rows, strict=True)])
    table, targets = (
        np.zeros((len(rows), 2), np.int32),
        [(s + r, slot) for s, own in zip(starts, saves, strict=True) for r, slot in own],
    )
    return StepBatch(
        ints(at * 0), ints(at), ints(rows), ints(context), ints(phase), table, ints([]), state_from=ints(source),
        state_to=ints(targets),
    )  # fmt: skip


def runs_of(batch: StepBatch, padded: bool):
    """Of a step of 11 rows, with padding 16."""
    integers = StepIntegers.of(batch, 1, 16, scratch=9 if padded else None, states=True)
    memory = torch.empty(integers.size, dtype=torch.int32)
    integers.write(memory.numpy())
    at = integers.on(memory)
    assert len(at.ids) == (16 if padded else 11) and at.runs is not None
    return at.runs


def states_of(spec: StateSpec) -> tuple[DeviceStates, StateSlots]:
    """The same random states in both kinds of slots, after another state, which stays as it is."""
    specs = (StateSpec((3,)), spec)
    made, exact = DeviceStates(specs, SLOTS, CPU), StateSlots(specs, SLOTS, CPU)
    for slot in range(SLOTS):
        for index, each in enumerate(specs):
            exact.write(index, slot, random(*each.shape, seed=slot))
        made.write_bytes(slot, exact.read_bytes(slot))
        assert made.read_bytes(slot) == exact.read_bytes(slot)
    return made, exact


def expected(exact: StateSlots, form) -> torch.Tensor:
    """The reference's outputs of all rows; stores its states. form: (rows, state) -> outputs and the state after them."""
    outputs, first = [], 0
    for _, count, source, saves in SEQUENCES:
        start, state = 0, exact.read(1, source)
        for row, slot in saves:
            output, state = form(slice(first + start, first + row + 1), state)
            exact.write(1, slot, state)
            outputs.append(output)
            start = row + 1
        first += count
    return torch.cat(outputs)


def check(made: DeviceStates, exact: StateSlots, out: torch.Tensor, outputs: torch.Tensor) -> None:
    torch.testing.assert_close(out, outputs, rtol=1e-5, atol=1e-5)
    for slot in range(SLOTS):
        for index in range(2):
            torch.testing.assert_close(made.read(index, slot), exact.read(index, slot), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("kernel", "activation", "biased"), [(4, "silu", False), (3, "none", True), (2, "none", False)])
def test_short_convolutions(kernel, activation, biased, padded):
    batch, width = batch_of(), 150
    made, exact = states_of(StateSpec((kernel - 1, width)))
    weight, bias = random(width, 1, kernel, seed=1), random(width, seed=2) if biased else None
    x = random(16 if padded else 11, width, seed=3)
    out = torch.full_like(x, torch.nan)
    recurrent.short_conv(x, made.data, made.offsets[1], runs_of(batch, padded), weight, bias, activation == "silu", out)
    assert out.isfinite().all()
    outputs = expected(exact, lambda rows, state: reference.short_conv(x[rows], state, weight[:, 0], bias, activation))
    check(made, exact, out[:11], outputs)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("k_heads", "k_dim", "v_dim", "channels"), [(2, 20, 18, False), (4, 8, 16, True), (1, 16, 5, False)])
def test_delta_rule(k_heads, k_dim, v_dim, channels, padded):
    batch, heads, rows = batch_of(), 4, 16 if padded else 11
    made, exact = states_of(StateSpec((heads, k_dim, v_dim)))
    x = random(rows, 2 * k_heads * k_dim + heads * v_dim, seed=1)
    alpha, beta = random(rows, heads * (k_dim if channels else 1), seed=2), random(rows, heads, seed=3)
    alpha[0, 0], alpha[1, 0] = 30.0, -30.0
    a_log, dt_bias = random(heads, seed=4), random(alpha.shape[1], seed=5)
    out = torch.full((rows, heads * v_dim), torch.nan)
    recurrent.delta_rule(
        x, alpha, beta, a_log, dt_bias, made.data, made.offsets[1], runs_of(batch, padded), out, heads=heads, k_heads=k_heads,
        k_dim=k_dim, v_dim=v_dim, channels=channels,
    )  # fmt: skip
    assert out.isfinite().all()
    q, k, v = x.split((k_heads * k_dim, k_heads * k_dim, heads * v_dim), -1)
    q, k = (reference.unit_length(part.unflatten(-1, (k_heads, -1))) for part in (q, k))
    gate, rate = reference.log_decay(alpha, a_log, dt_bias), torch.sigmoid(beta)
    q, v = q * k_dim**-0.5, v.unflatten(-1, (heads, -1))
    outputs = expected(
        exact, lambda rows, state: reference.delta_rule(q[rows], k[rows], v[rows], gate[rows], rate[rows], state)
    )
    check(made, exact, out[:11], outputs.flatten(1))


def test_slots_keep_their_address_until_all_are_released():
    made, _ = states_of(StateSpec((2, 4)))
    address, before = made.data.data_ptr(), made.read_bytes(1)
    made.copy(1, 7)
    made.release(3)
    made.ensure()
    assert made.data.data_ptr() == address and made.read_bytes(7) == made.read_bytes(1) == before
    made.release(0)
    assert not len(made.data)
    made.ensure()
    assert (made.read(1, 1) == 0).all()
