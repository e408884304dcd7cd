"""Groups the pairs of tokens and chosen experts by expert, on the device.

Pair p = t * top_k + j is the j-th expert of token t. Products by expert need the pairs of each expert side by side, divided
into tiles. How many tiles there are depends on the routes, which the host does not know, so products are launched for as many
as there can be; those without pairs end at once. Nothing is added atomically, so the order is always by expert, then by pair.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ..division import PAIR_FIELDS, most_pair_tiles

_FIELDS = tl.constexpr(PAIR_FIELDS)
_BLOCK = 1024  # pairs that a program reads at a time


@dataclass(frozen=True)
class PairTiles:
    """The pairs of a step in tiles of one expert.

    Attributes:
        order: int32 [pairs], the pairs by expert.
        fields: int32 [tiles, PAIR_FIELDS]: expert, first place in `order`, and number of pairs, which is 0 after the last tile.
        block_m: at most this many pairs in a tile.
    """

    order: torch.Tensor
    fields: torch.Tensor
    block_m: int


@triton.jit
def chosen_by(routes, pair, pairs, TOP_K: tl.constexpr):
    """The expert of each pair; -1 where there is no pair."""
    place = routes + pair // TOP_K * (2 * TOP_K) + pair % TOP_K
    return tl.load(place, mask=pair < pairs, other=-1.0).to(tl.int32)


@triton.jit
def count_pairs(routes, counts, pairs, TOP_K: tl.constexpr, BLOCK: tl.constexpr):
    """counts[e] = number of pairs of expert e. Grid (experts)."""
    total = tl.zeros([BLOCK], tl.int32)
    for start in range(0, pairs, BLOCK):
        mine = chosen_by(routes, start + tl.arange(0, BLOCK), pairs, TOP_K) == tl.program_id(0)
        total += mine.to(tl.int32)
    tl.store(counts + tl.program_id(0), tl.sum(total))


@triton.jit
def place_pairs(
    routes, counts, order, fields, pairs, experts, tiles, TOP_K: tl.constexpr, BLOCK_M: tl.constexpr,
    EXPERT_BLOCK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes the pairs and tiles of an expert, the last one also the tiles without pairs. Grid (experts).

    Args:
        routes: float32 [T, 2 * TOP_K].
        counts: int32 [experts], of `count_pairs`.
        order, fields: see `PairTiles`.
        EXPERT_BLOCK: a power of two >= experts.
    """
    expert, e = tl.program_id(0), tl.arange(0, EXPERT_BLOCK)
    count = tl.load(counts + e, mask=e < experts, other=0)
    count_tiles = (count + BLOCK_M - 1) // BLOCK_M
    first, tile = tl.sum(tl.where(e < expert, count, 0)), tl.sum(tl.where(e < expert, count_tiles, 0))
    own, own_tiles = tl.sum(tl.where(e == expert, count, 0)), tl.sum(tl.where(e == expert, count_tiles, 0))
    placed = first
    i = tl.arange(0, BLOCK)
    for start in range(0, pairs, BLOCK):
        mine = (chosen_by(routes, start + i, pairs, TOP_K) == expert).to(tl.int32)
        tl.store(order + placed + tl.cumsum(mine, 0) - 1, start + i, mask=mine == 1)
        placed += tl.sum(mine)
    stop = own_tiles
    if expert == experts - 1:
        stop = tiles - tile
    for start in range(0, stop, BLOCK):
        number = start + i
        place, begin = fields + (tile + number) * _FIELDS, number * BLOCK_M
        tl.store(place, number * 0 + expert, mask=number < stop)
        tl.store(place + 1, first + begin, mask=number < stop)
        tl.store(place + 2, tl.minimum(tl.maximum(own - begin, 0), BLOCK_M), mask=number < stop)


def group_pairs(routes: torch.Tensor, experts: int, block_m: int) -> PairTiles:
    """The pairs of `routes`, float32 [T, 2 * top_k], in tiles of up to `block_m`."""
    top_k = routes.shape[1] // 2
    pairs, block = len(routes) * top_k, min(_BLOCK, triton.next_power_of_2(len(routes) * top_k))
    tiles = most_pair_tiles(pairs, experts, block_m)
    counts, order = (torch.empty(n, dtype=torch.int32, device=routes.device) for n in (experts, pairs))
    fields = torch.empty((tiles, PAIR_FIELDS), dtype=torch.int32, device=routes.device)
    count_pairs[(experts,)](routes, counts, pairs, TOP_K=top_k, BLOCK=block, num_warps=4)
    place_pairs[(experts,)](
        routes, counts, order, fields, pairs, experts, tiles, TOP_K=top_k, BLOCK_M=block_m,
        EXPERT_BLOCK=triton.next_power_of_2(experts), BLOCK=block, num_warps=4,
    )  # fmt: skip
    return PairTiles(order, fields, block_m)
