"""What every backend offers: a plan that runs ragged steps over a cache it knows.

`engine/` and `integration/` drive plans through this interface only, so reference, cpu and cuda are interchangeable.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ..cache.block_manager import BLOCK_TOKENS as BLOCK_TOKENS  # of a cache block, on every backend
from ..graph.rotation import KeyRotation

Int32 = npt.NDArray[np.int32]

DECODE, PREFILL = 0, 1  # a sequence's phase, which picks the kernel family


@dataclass
class StepBatch:
    """One ragged step: no padding. Decode sequences come first; a sequence's rows are consecutive.

    Attributes:
        token_ids: int32 [T]; ignored where `inputs_embeds` is given.
        positions: int32 [T], for RoPE only; causality follows the order in the cache.
        query_len: int32 [S], > 0, sums to T.
        context_len: int32 [S], tokens in the cache before this step.
        phase: int32 [S], DECODE or PREFILL, ascending.
        block_table: int32 [S, max_blocks], block ids that cover context_len + query_len tokens.
        logit_rows: int32 [R], ascending rows of T whose logits are wanted.
        inputs_embeds: float32 [T, H] torch tensor, or None.
        states: float32 [T, H] torch tensor, what `state_in` gives; None for graphs without it.
        hidden: whether all hidden states are wanted.
        last_hidden: whether the last one (normed) is wanted by itself.
        reach: int32 [S], > 0: for how many tokens each sequence's frequencies are made, where RoPE is dynamic. One number for a
            sequence's whole life gives all its keys and queries the same frequencies, however it is cut and whoever runs
            beside it. None: of each its highest position in this step + 1.
        logits: float32 torch [R, V], contiguous, on the plan's device, for a plan to write into; None: fresh memory. A big
            batch over a big vocabulary pays for fresh pages at every step.
    """

    token_ids: Int32
    positions: Int32
    query_len: Int32
    context_len: Int32
    phase: Int32
    block_table: Int32
    logit_rows: Int32
    inputs_embeds: Any = None
    hidden: bool = False
    logits: Any = None
    states: Any = None
    last_hidden: bool = False
    reach: Int32 | None = None


def reach_of(batch: StepBatch) -> list[int]:
    """Of each sequence, for how many tokens its frequencies are made."""
    if batch.reach is not None:
        return batch.reach.tolist()
    starts = np.cumsum(batch.query_len) - batch.query_len
    return (np.maximum.reduceat(batch.positions, starts) + 1).tolist()


@dataclass
class StepOutput:
    """logits: float32 torch [R, V] on the plan's device. hidden: float32 torch [n_hidden, T, H] or None (the last one
    normed, as Transformers returns it); last_hidden: float32 [T, H] or None. The caller owns all; logits are the batch's own
    tensor where it gave one."""

    logits: Any
    hidden: Any = None
    last_hidden: Any = None


class KvStore(Protocol):
    """A backend's block storage. Which block belongs to whom is `cache.BlockManager`'s business."""

    num_blocks: int
    block_bytes: int

    def copy_block(self, source: int, target: int) -> None: ...

    def release(self, from_block: int) -> None:
        """Gives memory of blocks >= from_block back to the system; their content is lost."""

    @property
    def saved_bytes(self) -> int:
        """Bytes of `read_block`."""

    def read_block(self, block: int) -> bytes:
        """All that steps read of a block, for a file. It means the same in every store of this kind, graph and dtype."""

    def write_block(self, block: int, data: bytes) -> None:
        """Puts back what `read_block` gave.

        Raises: ValueError for another number of bytes, with nothing changed.
        """

    def turn(self, rotation: KeyRotation, block_table: Int32, tokens: int, position: int, delta: int) -> None:
        """Moves cached tokens by `delta` positions: their keys in all layers turn, and nothing else.

        Angles are exact: however often a key was turned, it has the angle that RoPE's float32 product gives at its last
        position. What the storage rounds adds up as independent errors do: after eight turns it is 0.5% of a key in bf16,
        1.3% in int8.

        Args:
            rotation: the model's, `graph.rotation.key_rotation`.
            block_table: int32 [blocks], no block twice, none that anybody else uses: blocks turn whole.
            tokens: that lie in them; what is behind the last one holds anything afterwards.
            position: RoPE position of the first of them now; the others count on from there.

        Raises:
            UnsupportedRequestError: the frequencies depend on the length (dynamic RoPE), and the tokens lie where they do.
            ValueError: a bad table or position. In any case nothing was changed.
        """

    def read(self, layer: int, block_table: Int32, tokens: int) -> tuple[Any, Any]:
        """K and V of one sequence's layer as torch float32 [kv_heads, tokens, head_dim]; of a latent cache the latents
        [tokens, rank + rope], and the indexer's keys [tokens, index] or None."""


class Plan(Protocol):
    """A compiled graph, bound to weights."""

    def run(self, batch: StepBatch, store: KvStore) -> StepOutput:
        """Raises, beside what the arguments may cause, what `check_weights` does; nothing that was computed is good then."""

    def check_weights(self) -> None:
        """Raises CheckpointChangedError where weights lie in a mapped file that is not what was mapped. Cheap."""

    def reserve(self, tokens: int, logit_rows: int) -> None: ...

    def buffer_bytes(self, tokens: int, logit_rows: int) -> int: ...

    def describe(self) -> list[dict[str, Any]]:
        """One row a step: op, kernel, format, places; for the report."""


class Backend(Protocol):
    """Compiles graphs. `name`: "reference" or "cpu"; `detail`: ISA and threads, or the device."""

    name: str
    detail: str

    def compile(self, graph: Any, weights: Any, **options: Any) -> Plan: ...

    def new_store(self, graph: Any, kv_dtype: str, num_blocks: int) -> KvStore: ...

    def block_bytes(self, graph: Any, kv_dtype: str) -> int: ...
