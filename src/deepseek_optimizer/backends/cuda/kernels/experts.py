"""Products of the chosen experts: gate and up of each pair of a token and an expert, then down, and a token's sum over experts.

Few tokens hardly share experts, so each pair is a product of one row with its expert's matrices, as in `linear_vector`. Many
tokens are grouped by expert (`expert_groups`), so that an expert's weights are read once for a tile of pairs, as in
`linear_tile`. Both write down's result of each pair, and `add_pairs` weighs and adds them in ascending order of experts, so
that sums do not depend on how pairs were grouped.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..division import MOST_ROWS, PAIR_FIELDS
from ..gates import NO_GATE, SILU, Gate
from ..matrices import DeviceStack
from .epilogue import finished
from .expert_groups import PairTiles, chosen_by, group_pairs
from .linear_tile import ordered_rows, tile_sizes, tile_sums
from .linear_vector import block_words, tile_row_sums

_FIELDS = tl.constexpr(PAIR_FIELDS)
_SUM_BLOCK = 256  # columns of a program of `add_pairs`


@triton.jit
def pair_vector_product(
    x, routes, words, biases, out, pairs, outputs, columns, groups, matrix_words, LAYOUT: tl.constexpr, GATE: tl.constexpr,
    BIASED: tl.constexpr, WEIGHED: tl.constexpr, TOP_K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[p] = gate_e x_t and up_e x_t joined, of each pair p = (t, e), or down_e x_p without a gate; if WEIGHED, products are
    multiplied by the weight of the pair. Grid (rows of tiles, pairs).

    Args:
        x: float32 [T, columns], or without a gate [pairs, columns].
        routes: float32 [T, 2 * TOP_K].
        words: the tiles of all experts, see `DeviceStack`; with a gate those of gate and up of each expert in turn.
        biases: float32 [experts, 1 or 2, outputs], read if BIASED.
        out: float32 [pairs, outputs].
        matrix_words: words between two matrices.
    """
    tile_row, pair = tl.program_id(0), tl.program_id(1)
    expert = chosen_by(routes, pair, pairs, TOP_K).to(tl.int64)
    matrix = words + expert * matrix_words
    row = pair.to(tl.int64)
    if GATE.kind != "":
        matrix += expert * matrix_words
        row = row // TOP_K
    total = tile_row_sums(
        x + row * columns, 0, 1, columns, matrix, tile_row, groups, 0, groups * LAYOUT.words, LAYOUT, 1, BLOCK
    )
    up = total
    if GATE.kind != "":
        matrix += matrix_words
        up = tile_row_sums(
            x + row * columns, 0, 1, columns, matrix, tile_row, groups, 0, groups * LAYOUT.words, LAYOUT, 1, BLOCK
        )
    if WEIGHED:
        weight = tl.load(routes + row * (2 * TOP_K) + TOP_K + pair % TOP_K)
        total *= weight
        up *= weight
    n = tile_row * 16 + tl.arange(0, 16)
    own = biases + expert * outputs * (1 if GATE.kind == "" else 2)
    value = finished(total, up, own, own + outputs, n, outputs, GATE, BIASED, BIASED)
    tl.store(out + pair.to(tl.int64) * outputs + n[None, :], value, mask=(n < outputs)[None, :])


@triton.jit
def pair_tile_product(
    ordered, routes, order, fields, words, biases, out, outputs, groups, matrix_words, LAYOUT: tl.constexpr,
    GATE: tl.constexpr, BIASED: tl.constexpr, WEIGHED: tl.constexpr, TOP_K: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """As `pair_vector_product`, for tiles of pairs of one expert. Grid (tiles, blocks of outputs): programs next to each other
    read the same weights, if an expert has several tiles.

    Args:
        ordered: x as `order_rows` writes it.
        order, fields: see `PairTiles`.
    """
    place = fields + tl.program_id(0) * _FIELDS
    expert, first, count = tl.load(place).to(tl.int64), tl.load(place + 1), tl.load(place + 2)
    if count == 0:
        return
    m = tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    pair = tl.load(order + first + m, mask=m < count, other=0).to(tl.int64)
    matrix = words + expert * matrix_words
    source = pair
    if GATE.kind != "":
        matrix += expert * matrix_words
        source = pair // TOP_K
    total, up = tile_sums(
        ordered, source, m < count, matrix, matrix + matrix_words, n, outputs, groups, LAYOUT, GATE.kind != "", BLOCK_M,
        BLOCK_N, BLOCK_J,
    )  # fmt: skip
    if WEIGHED:
        weight = tl.load(routes + source * (2 * TOP_K) + TOP_K + pair % TOP_K, mask=m < count, other=0.0)[:, None]
        total *= weight
        up *= weight
    own = biases + expert * outputs * (1 if GATE.kind == "" else 2)
    value = finished(total, up, own, own + outputs, n, outputs, GATE, BIASED, BIASED)
    tl.store(out + pair[:, None] * outputs + n[None, :], value, mask=(m < count)[:, None] & (n < outputs)[None, :])


@triton.jit
def add_pairs(results, routes, out, outputs, WEIGHED: tl.constexpr, TOP_K: tl.constexpr, BLOCK: tl.constexpr):
    """out[t] = sum over j, ascending, of weight[t, j] * results[t * TOP_K + j], or of the results if they are WEIGHED already.
    Grid (tokens, blocks of outputs)."""
    token, n = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for j in range(TOP_K):
        result = tl.load(results + (token * TOP_K + j) * outputs + n, mask=n < outputs, other=0.0)
        if not WEIGHED:
            result *= tl.load(routes + token * (2 * TOP_K) + TOP_K + j)
        total += result
    tl.store(out + token * outputs + n, total, mask=n < outputs)


def group_for(routes: torch.Tensor, experts: int, stack: DeviceStack) -> PairTiles | None:
    """The pairs of a step by expert, in tiles for products with a stack; None: few tokens, which are not grouped."""
    tokens, top_k = len(routes), routes.shape[1] // 2
    if tokens <= MOST_ROWS:
        return None
    average = triton.cdiv(triton.next_power_of_2(tokens) * top_k, experts)  # the same for all steps of a bucket
    return group_pairs(routes, experts, tile_sizes(average, stack, gated=True)["BLOCK_M"])


def _products(
    x: torch.Tensor, routes: torch.Tensor, tiles: PairTiles | None, stack: DeviceStack, biases: torch.Tensor | None,
    gate: Gate, out: torch.Tensor, weighed: bool = False,
) -> None:  # fmt: skip
    constants = {
        "LAYOUT": stack.layout, "GATE": gate, "BIASED": biases is not None, "WEIGHED": weighed,
        "TOP_K": routes.shape[1] // 2,
    }  # fmt: skip
    biases = out if biases is None else biases
    if tiles is None:
        pair_vector_product[(stack.tile_rows, len(out))](
            x, routes, stack.words, biases, out, len(out), stack.rows, stack.cols, stack.groups, stack.matrix_words,
            **constants, BLOCK=block_words(1, stack.layout), num_warps=4,
        )  # fmt: skip
    else:
        sizes = tile_sizes(tiles.block_m, stack, gate is not NO_GATE) | {"BLOCK_M": tiles.block_m}
        pair_tile_product[(len(tiles.fields), triton.cdiv(stack.rows, sizes["BLOCK_N"]))](
            ordered_rows(x, stack.cols, stack), routes, tiles.order, tiles.fields, stack.words, biases, out, stack.rows,
            stack.groups, stack.matrix_words, **constants, **sizes, num_warps=stack.division.tile_warps,
            num_stages=stack.division.tile_stages,
        )  # fmt: skip


def gate_up(
    x: torch.Tensor,
    routes: torch.Tensor,
    tiles: PairTiles | None,
    stack: DeviceStack,
    out: torch.Tensor,
    biases: torch.Tensor | None = None,
    gate: Gate = SILU,
    weighed: bool = False,
) -> None:
    """out[t * top_k + j] = gate_e x_t + b_e and up_e x_t + c_e joined, for the j-th expert e of token t; with `weighed` both
    products are multiplied by its weight.

    Args:
        x: float32 [T, columns], contiguous.
        tiles: of `group_for`.
        stack: gate and up of each expert in turn.
        biases: float32 [experts, 2, rows], in the same order.
        out: float32 [T * top_k, rows].
    """
    _products(x, routes, tiles, stack, biases, gate, out, weighed)


def down(
    hidden: torch.Tensor,
    routes: torch.Tensor,
    tiles: PairTiles | None,
    stack: DeviceStack,
    out: torch.Tensor,
    biases: torch.Tensor | None = None,
    weighed: bool = False,
) -> None:
    """out[t] = sum over j of weight * (down_e hidden[t * top_k + j] + b_e), for the j-th expert e of token t and its weight,
    which is 1 if `hidden` is `weighed` already.

    Args:
        hidden: float32 [T * top_k, columns], contiguous.
        biases: float32 [experts, rows].
        out: float32 [T, rows].
    """
    results = torch.empty((len(hidden), stack.rows), dtype=torch.float32, device=hidden.device)
    _products(hidden, routes, tiles, stack, biases, NO_GATE, results)
    add_pairs[(len(out), triton.cdiv(stack.rows, _SUM_BLOCK))](
        results, routes, out, stack.rows, WEIGHED=weighed, TOP_K=routes.shape[1] // 2, BLOCK=_SUM_BLOCK, num_warps=2
    )
