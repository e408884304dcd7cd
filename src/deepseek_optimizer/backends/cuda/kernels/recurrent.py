"""Ops with a recurrent state: short convolutions and the gated delta rule. See `graph/ops/recurrent.py`.

The rows of a sequence in a step are a run (`step.Runs`). A state is read from the slot that the run continues from, and stored
in the slots that the step names, each after one of the run's rows. The slot that is read may be written after the last row. So
whoever reads a part of a state writes it, too, and only after reading.

The delta rule has one form for both phases: a program holds some columns of a head's state in registers and passes over the
rows of its run. Columns are independent, and a warp has whole columns, so that no sum over a column waits for other warps.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..step import RUN_FIELDS, Runs

_FIELDS = tl.constexpr(RUN_FIELDS)
_ROWS, _COLUMNS = 16, 128  # of a program of `convolve`
_STATE_COLUMNS = 8  # of a program of `delta_rows`


@triton.jit
def earlier_row(x, states, at, first, source, n, inside, width, slot_elements, state_offset, TAPS: tl.constexpr):
    """Row `at` of the step's x if it is not before row `first`, the run's first; otherwise the one of its state, zeros if that
    is new.

    Args:
        at, first, source: [R, 1]. n: [1, N], columns. inside: bool [R, N].
        TAPS: rows in a state, the latest last.
    """
    own = inside & (at >= first)
    stored = inside & (at < first) & (source >= 0)
    state_row = states + source.to(tl.int64) * slot_elements + state_offset + (TAPS + at - first) * width
    return tl.load(x + at.to(tl.int64) * width + n, mask=own, other=0.0) + tl.load(state_row + n, mask=stored, other=0.0)


@triton.jit
def convolve(
    x, states, runs, run_of, weight, bias, out, rows, width, slot_elements, state_offset, KERNEL: tl.constexpr,
    BIASED: tl.constexpr, SILU: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[t] = activation(bias + sum over j of weight[:, j] * x[t - KERNEL + 1 + j]). Grid (blocks of rows, and of columns).

    Args:
        x, out: float32 [rows, width]. weight: float32 [width, KERNEL]. bias: float32 [width], read if BIASED.
        states: float32 [slots, slot_elements]; this state begins at `state_offset`.
        runs, run_of: see `step.Runs`.
    """
    t = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    n = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    real = t < rows
    inside = real & (n < width)
    run = runs + tl.load(run_of + t, mask=real, other=0) * _FIELDS
    first, source = tl.load(run, mask=real, other=0), tl.load(run + 2, mask=real, other=-1)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for j in tl.static_range(KERNEL):
        at = t - KERNEL + 1 + j
        value = earlier_row(x, states, at, first, source, n, inside, width, slot_elements, state_offset, KERNEL - 1)
        total += value * tl.load(weight + n * KERNEL + j, mask=n < width, other=0.0)
    if BIASED:
        total += tl.load(bias + n, mask=n < width, other=0.0)
    if SILU:
        total = total / (1.0 + tl.exp(-total))
    tl.store(out + t.to(tl.int64) * width + n, total, mask=inside)


@triton.jit
def store_last_rows(
    x, states, runs, saves, width, slot_elements, state_offset, TAPS: tl.constexpr, TAP_ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Stores the last TAPS rows of x up to each row that the step names. Grid (runs, blocks of columns).

    Args:
        saves: see `step.Runs`; others as of `convolve`.
        TAP_ROWS: a power of two >= TAPS.
    """
    run = runs + tl.program_id(0) * _FIELDS
    first, source = tl.load(run), tl.load(run + 2)
    begin, count = tl.load(run + 3), tl.load(run + 4)
    tap, n = tl.arange(0, TAP_ROWS)[:, None], (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    sources = source + tap * 0
    inside = (tap < TAPS) & (n < width)
    for save in range(begin, begin + count):  # the slot that is read is the last
        row, slot = tl.load(saves + save * 2), tl.load(saves + save * 2 + 1)
        at = row - TAPS + 1 + tap
        value = earlier_row(x, states, at, first, sources, n, inside, width, slot_elements, state_offset, TAPS)
        tl.debug_barrier()  # every thread has read the slot
        tl.store(states + slot.to(tl.int64) * slot_elements + state_offset + tap * width + n, value, mask=inside)


def short_conv(
    x: torch.Tensor,
    states: torch.Tensor,
    state_offset: int,
    runs: Runs,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    silu: bool,
    out: torch.Tensor,
) -> None:
    """See `convolve` and `store_last_rows`: x float32 [T, N], weight float32 [N, 1, kernel]; out is not x."""
    (rows, width), kernel, slot = x.shape, weight.shape[-1], states.shape[1]
    convolve[(triton.cdiv(rows, _ROWS), triton.cdiv(width, _COLUMNS))](
        x, states, runs.fields, runs.of_rows, weight, x if bias is None else bias, out, rows, width, slot, state_offset,
        KERNEL=kernel, BIASED=bias is not None, SILU=silu, ROWS=_ROWS, BLOCK=_COLUMNS, num_warps=4,
    )  # fmt: skip
    store_last_rows[(len(runs.fields), triton.cdiv(width, _COLUMNS))](
        x, states, runs.fields, runs.saves, width, slot, state_offset, TAPS=kernel - 1,
        TAP_ROWS=triton.next_power_of_2(kernel - 1), BLOCK=_COLUMNS, num_warps=4,
    )  # fmt: skip


@triton.jit
def decay_of(x, rate):
    """e^(-rate log(1 + e^x))."""
    return tl.exp(-rate * tl.where(x > 20, x, tl.log(1.0 + tl.exp(tl.minimum(x, 20.0)))))


@triton.jit
def delta_rows(
    x, alpha, beta, a_log, dt_bias, states, runs, saves, out, slot_elements, state_offset, scale, HEADS: tl.constexpr,
    K_HEADS: tl.constexpr, K_DIM: tl.constexpr, V_DIM: tl.constexpr, CHANNELS: tl.constexpr, K_BLOCK: tl.constexpr,
    V_BLOCK: tl.constexpr,
):  # fmt: skip
    """The gated delta rule of a run. Grid (runs, HEADS, blocks of columns).

    Args:
        x: float32 [T, 2 * K_HEADS * K_DIM + HEADS * V_DIM], queries, keys and values.
        alpha: float32 [T, HEADS], or with CHANNELS [T, HEADS * K_DIM]. beta: float32 [T, HEADS].
        a_log: float32 [HEADS]. dt_bias: float32, as a row of alpha.
        states: float32 [slots, slot_elements]; this state [HEADS, K_DIM, V_DIM] begins at `state_offset`.
        runs, saves: see `step.Runs`.
        out: float32 [T, HEADS * V_DIM].
        scale: of queries, besides their length.
        K_BLOCK: a power of two >= K_DIM.
    """
    run, head = runs + tl.program_id(0) * _FIELDS, tl.program_id(1)
    first, count, source = tl.load(run), tl.load(run + 1), tl.load(run + 2)
    save, saves_end = tl.load(run + 3), tl.load(run + 3) + tl.load(run + 4)
    k, v = tl.arange(0, K_BLOCK), tl.program_id(2) * V_BLOCK + tl.arange(0, V_BLOCK)
    some_k, some_v = k < K_DIM, v < V_DIM
    place = state_offset + (head * K_DIM + k[:, None]) * V_DIM + v[None, :]
    whole = some_k[:, None] & some_v[None, :]
    state = tl.load(
        states + source.to(tl.int64) * slot_elements + place, mask=whole & (source + k[:, None] * 0 >= 0), other=0.0
    )
    rate_of_decay = tl.exp(tl.load(a_log + head))
    WIDTH: tl.constexpr = 2 * K_HEADS * K_DIM + HEADS * V_DIM
    key_head = head // (HEADS // K_HEADS)
    for i in range(count):
        row = (first + i).to(tl.int64)
        own = x + row * WIDTH
        q = tl.load(own + key_head * K_DIM + k, mask=some_k, other=0.0)
        key = tl.load(own + (K_HEADS + key_head) * K_DIM + k, mask=some_k, other=0.0)
        value = tl.load(own + 2 * K_HEADS * K_DIM + head * V_DIM + v, mask=some_v, other=0.0)
        q = q / tl.sqrt_rn(tl.sum(q * q, 0) + 1e-6) * scale
        key = key / tl.sqrt_rn(tl.sum(key * key, 0) + 1e-6)
        if CHANNELS:
            channel = head * K_DIM + k
            step = tl.load(alpha + row * (HEADS * K_DIM) + channel, mask=some_k, other=0.0)
            state *= decay_of(step + tl.load(dt_bias + channel, mask=some_k, other=0.0), rate_of_decay)[:, None]
        else:
            state *= decay_of(tl.load(alpha + row * HEADS + head) + tl.load(dt_bias + head), rate_of_decay)
        strength = 1.0 / (1.0 + tl.exp(-tl.load(beta + row * HEADS + head)))
        update = strength * (value - tl.sum(state * key[:, None], 0))
        state += key[:, None] * update[None, :]
        tl.store(out + (row * HEADS + head) * V_DIM + v, tl.sum(state * q[:, None], 0), mask=some_v)
        if save < saves_end:
            if tl.load(saves + save * 2) == first + i:
                slot = tl.load(saves + save * 2 + 1).to(tl.int64)
                tl.store(states + slot * slot_elements + place, state, mask=whole)
                save += 1


def delta_rule(
    x: torch.Tensor,
    alpha: torch.Tensor,
    beta: torch.Tensor,
    a_log: torch.Tensor,
    dt_bias: torch.Tensor,
    states: torch.Tensor,
    state_offset: int,
    runs: Runs,
    out: torch.Tensor,
    *,
    heads: int,
    k_heads: int,
    k_dim: int,
    v_dim: int,
    channels: bool,
) -> None:
    """See `delta_rows`."""
    block = min(_STATE_COLUMNS, triton.next_power_of_2(v_dim))
    delta_rows[(len(runs.fields), heads, triton.cdiv(v_dim, block))](
        x, alpha, beta, a_log, dt_bias, states, runs.fields, runs.saves, out, states.shape[1], state_offset, k_dim**-0.5,
        HEADS=heads, K_HEADS=k_heads, K_DIM=k_dim, V_DIM=v_dim, CHANNELS=channels, K_BLOCK=triton.next_power_of_2(k_dim),
        V_BLOCK=block, num_warps=1,
    )  # fmt: skip
