"""How work is divided among programs, and the scratch memory that this takes. No Triton is imported here.

What depends on the card is a `Division`: `cost_table.py` has one for each generation of cards, and what was measured on this
one. Everything else was chosen so that operands fit into registers and shared memory of all of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

PROGRAMS = 512  # of `DEFAULT`: about four for each processor of a card
MOST_ROWS = 4  # of x in `vector_product`; more are multiplied on tensor cores
BLOCK = 64  # words of 16 rows that a program of `vector_product` reads at a time, at most: 4 KiB
MOST_SPLITS = 8
MOST_CHUNKS = 64
TILE_FIELDS = 5
ADAPTER_ROWS = 16  # of a tile of rows with one adapter
MOST_ADAPTER_SPLITS = 8
PAIR_FIELDS = 3  # of a tile of pairs, see `kernels.expert_groups.PairTiles`
HEAD_ROWS = 16  # heads of a program of latent attention, which share one key
LATENT_ROWS = 32  # of a product of latent attention in prefill: sums of 64 rows with 512 elements do not fit into registers
_EXPANDED_BYTES = 128 << 20  # of the keys and values that latent attention expands at a time, unless 64 tokens take more
_LATENT_BYTES = 128 << 20  # of the queries in the space of latents, at most, unless HEAD_ROWS heads take more
_SCORE_BYTES = 64 << 20  # of an indexer's scores, at most, unless one row takes more


@dataclass(frozen=True)
class Division:
    """What is tuned for a card. A plan keeps the division that it was compiled with, so no step changes how another one adds.

    Attributes:
        programs: that matrices and attention are divided into, if they are large enough.
        most_splits: of a matrix's columns in `vector_product`, a power of two.
        vector_warps: of a program of `vector_product`.
        block_n: outputs of a program of `tile_product`, a power of two of at most 64.
        tile_warps, tile_stages: of such a program: warps, and loads that are under way while tensor cores multiply.
        chunk_blocks: blocks of the cache in a chunk of attention, at least.
    """

    programs: int = PROGRAMS
    most_splits: int = MOST_SPLITS
    vector_warps: int = 4
    block_n: int = 64
    tile_warps: int = 4
    tile_stages: int = 2
    chunk_blocks: int = 8

    def splits(self, tile_rows: int, row_words: int) -> int:
        """The number of parts that a matrix's columns are divided into in `vector_product`: a power of two. Every part has at
        least two blocks.

        Args:
            tile_rows: rows of tiles.
            row_words: words of a row of the matrix.
        """
        splits = 1
        while splits < self.most_splits and tile_rows * splits < self.programs and row_words >= 4 * splits * BLOCK:
            splits *= 2
        return splits

    def chunks(self, tiles: int, blocks: int, kv_heads: int) -> int:
        """The number of parts that the blocks of each of `tiles` tiles are divided into: 1 where there are enough programs."""
        return max(1, min(-(-blocks // self.chunk_blocks), MOST_CHUNKS, self.programs // (tiles * kv_heads)))


DEFAULT = Division()


def splits_of(tile_rows: int, row_words: int) -> int:
    """`Division.splits` of the default."""
    return DEFAULT.splits(tile_rows, row_words)


def chunks_of(tiles: int, blocks: int, kv_heads: int) -> int:
    """`Division.chunks` of the default."""
    return DEFAULT.chunks(tiles, blocks, kv_heads)


@dataclass(frozen=True)
class Tiles:
    """The rows of a step in one phase, divided into tiles of consecutive rows of a sequence. Padding tiles have no rows.

    Attributes:
        fields: int32 [tiles, TILE_FIELDS]: sequence, first row of the step, number of rows, token of the first row in its
            sequence, and one past the last token that the last row sees.
        block_q: at most this many rows in a tile, a power of two.
        blocks: blocks that the longest sequence has, rounded up; 0: tiles are not divided into chunks.
        planned: number of tiles that the division into chunks is for, at least as many as there are. It does not depend on
            how many padding rows a step has.
        division: of the plan.
    """

    fields: torch.Tensor
    block_q: int
    blocks: int
    planned: int = 1
    division: Division = DEFAULT


def query_rows(group: int, product_rows: int = 64) -> int:
    """Rows of a tile in prefill, for programs of `group` query heads that share a key head.

    Args:
        product_rows: rows of a product, heads included, a power of two.
    """
    return max(1, product_rows // (1 << (group - 1).bit_length()))


def most_pair_tiles(pairs: int, experts: int, block_m: int) -> int:
    """The most tiles of up to `block_m` pairs of one expert that `pairs` pairs can need, whatever their experts are."""
    return (pairs + min(pairs, experts) * (block_m - 1)) // block_m


def adapter_splits(columns: int) -> int:
    """The number of parts that the columns of an adapter's first matrix are divided into: a power of two, parts of at least 512
    columns."""
    splits = 1
    while splits < MOST_ADAPTER_SPLITS and columns >= 1024 * splits:
        splits *= 2
    return splits


def heads_at_once(rows: int, heads: int, rank: int) -> int:
    """The number of heads whose queries are mapped to the space of latents at a time, for this number of rows."""
    fitting = _LATENT_BYTES // (4 * rows * rank) // HEAD_ROWS * HEAD_ROWS
    return min(heads, max(HEAD_ROWS, fitting))


def expands(rows: int, context: int, nope: int, rope: int, v_dim: int, rank: int) -> bool:
    """Whether latent attention of a prompt's rows expands keys and values: whether that takes fewer multiplications.

    Per head, with k = context + rows keys and p = rows * context + rows * (rows + 1) / 2 pairs of a row and a key that it sees,
    both forms multiply with `kv_b`, the absorbed one for each row and the expanded one for each key:

        absorbed: rows * (nope + v_dim) * rank + p * (2 * rank + rope)
        expanded:    k * (nope + v_dim) * rank + p * (nope + rope + v_dim)

    With DeepSeek-V3's sizes, more than 170 rows expand, and any prompt without a context. Decoding never does, and neither do
    steps that may be captured, as a context's length must not decide what they launch.

    Args:
        context: tokens of the sequence before the rows.
    """
    pairs, mapped = rows * context + rows * (rows + 1) // 2, (nope + v_dim) * rank
    return (context + rows) * mapped + pairs * (nope + rope + v_dim) < rows * mapped + pairs * (2 * rank + rope)


def expanded_keys(heads: int, width: int) -> int:
    """The number of tokens whose keys and values are expanded at a time: a multiple of 64.

    Args:
        width: elements of a head's key and value, without the rotated ones.
    """
    return max(64, _EXPANDED_BYTES // (4 * heads * width) // 64 * 64)


def expanded_scratch_bytes(rows: int, keys: int, heads: int, width: int, rank: int) -> int:
    """The most bytes that latent attention of up to `rows` rows and `keys` keys takes in the expanded form: keys and values,
    their latents twice, and the softmax's state. Other arguments as of `expanded_keys`."""
    at_once = min(keys, expanded_keys(heads, width))
    return 4 * (at_once * (heads * width + 2 * _padded(rank)) + 2 * rows * heads)


def rows_at_once(keys: int) -> int:
    """The number of rows that an indexer chooses for at a time, from this number of tokens."""
    return max(1, _SCORE_BYTES // (4 * keys))


def attention_scratch_bytes(heads: int, kv_heads: int, head_dim: int, division: Division = DEFAULT) -> int:
    """The most bytes that unfinished results of chunks take."""
    return 4 * division.programs * (heads // kv_heads) * (head_dim + 2)


def latent_scratch_bytes(rows: int, heads: int, rank: int, nope: int, division: Division = DEFAULT) -> int:
    """The most bytes that latent attention of up to `rows` rows takes: queries mapped to latents, both operands in the order of
    words, and unfinished results of chunks.

    Args:
        nope: columns of a head's queries that are mapped.
    """
    latents = rows * heads_at_once(rows, heads, rank)
    ordered = rows * heads * _padded(nope) + latents // rank * _padded(rank)
    return 4 * (latents * rank + ordered + division.programs * min(HEAD_ROWS, heads) * (rank + 2))


def index_scratch_bytes(rows: int, keys: int) -> int:
    """The most bytes that an indexer's scores of up to `rows` rows and `keys` tokens take."""
    return 4 * keys * min(rows, rows_at_once(keys))


def expert_scratch_bytes(tokens: int, top_k: int, experts: int, outputs: int, columns: int, gated: bool) -> int:
    """The most bytes that products of experts take: rows in the order of words, and without `gated` a result for each pair. The
    pairs in tiles count here too.

    Args:
        outputs, columns: size of a matrix.
    """
    pairs = tokens * top_k
    grouped = pairs + experts + PAIR_FIELDS * most_pair_tiles(pairs, experts, 16)
    return 4 * (grouped + (tokens if gated else pairs) * _padded(columns) + (0 if gated else pairs * outputs))


def product_scratch_bytes(
    rows: int,
    outputs: int,
    columns: int,
    tile_rows: int,
    row_words: int,
    products: int,
    division: Division = DEFAULT,
) -> int:
    """The most bytes that a product of up to `rows` rows takes: sums of splits, or rows in the order of words.

    Args:
        outputs, columns: size of the matrix.
        tile_rows, row_words: as in `Division.splits`.
        products: 2 for gate and up, otherwise 1.
    """
    splits = division.splits(tile_rows, row_words)
    partial = 0 if splits == 1 else 4 * products * splits * min(rows, MOST_ROWS) * outputs
    return max(partial, 4 * rows * _padded(columns))


def _padded(columns: int) -> int:
    """Columns in whole tiles."""
    return (columns + 31) // 32 * 32
