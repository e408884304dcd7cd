"""Low-rank adapters: what the adapters of a step's rows add to a product, z = y + (x A^T) B^T, in one launch for all of them.

The rows of a step are listed by adapter and divided into tiles of up to 16 rows of one adapter, whose matrices a program finds
in a table of addresses. `shrink` multiplies with A, `expand` with B. A has few rows, so its columns are divided among programs,
whose sums `epilogue.finish_splits` adds in ascending order: the division depends on the shape of A only.

Sources: Chen et al. 2023 (Punica), Sheng et al. 2023 (S-LoRA).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..adapters import ENTRY
from ..division import ADAPTER_ROWS, PAIR_FIELDS, adapter_splits
from ..gates import NO_GATE
from .epilogue import launch_finish
from .precision import add_product

_FIELDS, _ENTRY = tl.constexpr(PAIR_FIELDS), tl.constexpr(ENTRY)
_MOST_RANK = 64  # of a program; more are divided among programs, or added one after the other
_COLUMNS, _OUTPUTS = 64, 64  # of a product of tiles


@triton.jit
def adapter_of_tile(fields, table, site, sites):
    """First place in the list of rows, number of rows, and the entry of the table, of a tile; without rows its entry is that of
    another adapter."""
    place = fields + tl.program_id(0) * _FIELDS
    slot, first, count = tl.load(place), tl.load(place + 1), tl.load(place + 2)
    return first, count, table + (slot * sites + site) * _ENTRY


@triton.jit
def matrix_at(entry, NARROW: tl.constexpr):
    """The matrix whose address an entry of the table is, which PyTorch has aligned."""
    address = tl.multiple_of(tl.load(entry), 16)
    if NARROW:
        return address.to(tl.pointer_type(tl.bfloat16))
    else:
        return address.to(tl.pointer_type(tl.float32))


@triton.jit
def shrink_rows(
    x, order, fields, table, out, site, sites, rows, columns, per_split, RANK: tl.constexpr, NARROW: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out[split, t] = the products of row t with its adapter's A over a part of the columns. Grid (tiles, blocks of ranks,
    splits). Other rows, and elements beyond an adapter's rank, are not written.

    Args:
        x: float32 [rows, columns].
        order, fields: see `step.AdapterRows`.
        table: see `adapters.CudaAdapters`. site, sites: index of the product, and their number.
        out: float32 [splits, rows, RANK].
        per_split: columns of a split.
        NARROW: whether matrices are bf16, to which rows are rounded too; otherwise float32.
    """
    first, count, entry = adapter_of_tile(fields, table, site, sites)
    rank = tl.load(entry + 2).to(tl.int32)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    if (count == 0) | (tl.program_id(1) * BLOCK_R >= rank):
        return
    m = tl.arange(0, BLOCK_M)
    row = tl.load(order + first + m, mask=m < count, other=0).to(tl.int64)
    matrix = matrix_at(entry, NARROW)
    begin = tl.program_id(2) * per_split
    end = tl.minimum(begin + per_split, columns)
    total = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    for start in range(begin, end, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        values = tl.load(x + row[:, None] * columns + k[None, :], mask=(m < count)[:, None] & (k < end)[None, :], other=0.0)
        factors = tl.load(matrix + r[None, :] * columns + k[:, None], mask=(r < rank)[None, :] & (k < end)[:, None], other=0.0)
        total = add_product(total, values, factors, NARROW)
    place = (tl.program_id(2) * rows + row)[:, None] * RANK + r[None, :]
    tl.store(out + place, total, mask=(m < count)[:, None] & (r < rank)[None, :])


@triton.jit
def expand_rows(
    h, order, fields, table, out, site, sites, outputs, RANK: tl.constexpr, NARROW: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Adds to out[t] the products of h[t] with the adapter's B. Grid (tiles, blocks of outputs). Arguments as of `shrink_rows`.

    Args:
        h: float32 [rows, RANK], of which the adapter's own rank is read.
        out: float32 [rows, outputs].
    """
    first, count, entry = adapter_of_tile(fields, table, site, sites)
    rank = tl.load(entry + 2).to(tl.int32)
    if (count == 0) | (rank == 0):
        return
    m, n = tl.arange(0, BLOCK_M), tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.load(order + first + m, mask=m < count, other=0).to(tl.int64)
    matrix = matrix_at(entry + 1, NARROW)
    inside = (m < count)[:, None] & (n < outputs)[None, :]
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, rank, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        values = tl.load(h + row[:, None] * RANK + r[None, :], mask=(m < count)[:, None] & (r < rank)[None, :], other=0.0)
        mask = (n < outputs)[None, :] & (r < rank)[:, None]
        factors = tl.load(matrix + n[None, :].to(tl.int64) * rank + r[:, None], mask=mask, other=0.0)
        total = add_product(total, values, factors, NARROW)
    place = out + row[:, None] * outputs + n[None, :]
    tl.store(place, tl.load(place, mask=inside, other=0.0) + total, mask=inside)


def _block_rank(rank: int) -> int:
    return min(_MOST_RANK, max(16, triton.next_power_of_2(rank)))


def shrink(
    x: torch.Tensor, order: torch.Tensor, fields: torch.Tensor, table: torch.Tensor, site: int, narrow: bool, out: torch.Tensor
) -> None:
    """See `shrink_rows`: x float32 [T, K], out float32 [T, rank]."""
    (rows, columns), rank = x.shape, out.shape[1]
    splits, block = adapter_splits(columns), _block_rank(rank)
    partial = out[None] if splits == 1 else out.new_empty(splits, rows, rank)
    if len(fields):
        per_split = triton.cdiv(columns, splits * _COLUMNS) * _COLUMNS
        shrink_rows[(len(fields), triton.cdiv(rank, block), splits)](
            x, order, fields, table, partial, site, table.shape[1], rows, columns, per_split, RANK=rank, NARROW=narrow,
            BLOCK_M=ADAPTER_ROWS, BLOCK_R=block, BLOCK_K=_COLUMNS, num_warps=4, num_stages=3,
        )  # fmt: skip
        if splits > 1:
            launch_finish(partial[None], None, None, NO_GATE, out)


def expand(
    h: torch.Tensor, order: torch.Tensor, fields: torch.Tensor, table: torch.Tensor, site: int, narrow: bool, out: torch.Tensor
) -> None:
    """See `expand_rows`: h float32 [T, rank], out float32 [T, N]."""
    if len(fields):
        expand_rows[(len(fields), triton.cdiv(out.shape[1], _OUTPUTS))](
            h, order, fields, table, out, site, table.shape[1], out.shape[1], RANK=h.shape[1], NARROW=narrow,
            BLOCK_M=ADAPTER_ROWS, BLOCK_R=_block_rank(h.shape[1]), BLOCK_N=_OUTPUTS, num_warps=4, num_stages=2,
        )  # fmt: skip
