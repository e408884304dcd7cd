"""A compiled native plan and the block store it reads: one library call a step."""

from __future__ import annotations

import ctypes as C
import functools
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ...errors import BackendError
from ...graph.ir import CacheSpec, LatentSpec
from ...graph.rotation import KeyRotation, Pairs
from ..base import BLOCK_TOKENS, Int32, StepBatch, StepOutput, reach_of
from .native import FLAGS, Batch, Context, Handle, Rotation, Slot, Step, Weight, block_bytes, cache_shape, check

_INT32 = np.dtype(np.int32)


def _address(array: Int32, name: str, *shape: int) -> int:
    """Data pointer of a contiguous int32 array of this shape (`__array_interface__` costs a third of `.ctypes`).

    Raises: ValueError for any other array: the library sees a pointer, and would read past its end.
    """
    if array.dtype != _INT32 or array.shape != shape or not array.flags.c_contiguous:
        raise ValueError(f"{name} must be contiguous int32 {list(shape)}, and is {array.dtype} {list(array.shape)}")
    return int(array.__array_interface__["data"][0])


class CpuStore:
    """Paged K and V in the native arena: memory is taken as blocks are first written.

    Args:
        spec: the model's.
        kv_dtype: "fp32", "bf16" or "int8".
        num_blocks: capacity in blocks of 32 tokens.
    """

    def __init__(self, context: Context, spec: CacheSpec | LatentSpec, kv_dtype: str, num_blocks: int) -> None:
        self.context, self.lib = context, context.lib
        self.num_blocks = num_blocks
        self.spec, self.kv_dtype = spec, kv_dtype
        self.block_bytes = block_bytes(spec, kv_dtype)
        shape = cache_shape(spec, kv_dtype)
        self.handle = Handle(self.lib.dso_cache_create, self.lib.dso_cache_destroy, C.byref(shape), num_blocks)

    def copy_block(self, source: int, target: int) -> None:
        check(self.lib.dso_cache_copy_block(self.handle, source, target))

    def release(self, from_block: int) -> None:
        check(self.lib.dso_cache_release(self.handle, from_block))

    @property
    def saved_bytes(self) -> int:
        return int(self.lib.dso_cache_saved_bytes(self.handle))

    def read_block(self, block: int) -> bytes:
        found = C.create_string_buffer(self.saved_bytes)
        check(self.lib.dso_cache_save_block(self.handle, block, found))
        return found.raw

    def write_block(self, block: int, data: bytes) -> None:
        if len(data) != self.saved_bytes:
            raise ValueError(f"a block has {self.saved_bytes} bytes, got {len(data)}")
        check(self.lib.dso_cache_load_block(self.handle, block, data))

    def turn(self, rotation: KeyRotation, block_table: Int32, tokens: int, position: int, delta: int) -> None:
        rotation.check(position + tokens)
        table, frequencies = _table(block_table, tokens), np.ascontiguousarray(rotation.inv_freq, dtype=np.float32)
        key, index = (None if pairs is None else _rotation(pairs, frequencies) for pairs in (rotation.key, rotation.index))
        address = _address(table, "block_table", table.size)
        args = (None if r is None else C.byref(r) for r in (key, index))
        check(self.lib.dso_cache_turn(self.context.handle, self.handle, *args, address, tokens, position, delta))

    def read(self, layer: int, block_table: Int32, tokens: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        table, spec = _table(block_table, tokens), self.spec
        if isinstance(spec, LatentSpec):
            key = torch.empty(tokens, spec.rank + spec.rope, dtype=torch.float32, device="cpu")
            value = torch.empty(tokens, spec.index, dtype=torch.float32, device="cpu") if spec.index else None
        else:
            key, value = (
                torch.empty(spec.kv_heads, tokens, spec.head_dim, dtype=torch.float32, device="cpu") for _ in range(2)
            )
        address = _address(table, "block_table", table.size)
        second = None if value is None else value.data_ptr()
        check(self.lib.dso_cache_read(self.handle, layer, address, tokens, key.data_ptr(), second))
        return key, value


def _table(block_table: Int32, tokens: int) -> Int32:
    """The table as the library reads it. Raises ValueError for one that ends before the tokens do."""
    table = np.ascontiguousarray(block_table, dtype=np.int32)
    if table.size * BLOCK_TOKENS < tokens:
        raise ValueError(f"a table of {table.size} blocks does not hold {tokens} tokens")
    return table


def _rotation(pairs: Pairs, frequencies: Any) -> Rotation:
    if 2 * len(frequencies) != pairs.rot:
        raise ValueError(f"{len(frequencies)} frequencies do not turn {pairs.rot} numbers")
    return Rotation(frequencies.ctypes.data, pairs.rot, pairs.offset, FLAGS["interleaved"] if pairs.interleaved else 0, 0)


class CpuPlan:
    """Steps bound to packed weights. Made by `CpuBackend.compile`; keeps the weights it points at alive."""

    def __init__(
        self,
        context: Context,
        steps: list[Step],
        slots: list[Slot],
        weights: list[Weight],
        keep: list[Any],
        rows: list[dict[str, Any]],
        *,
        vocab_size: int,
        hidden_size: int,
        hidden_states: int,
        rope: Any,
        has_head: bool,
    ) -> None:
        self.context, self.lib, self._keep, self._rows = context, context.lib, keep, rows
        self.vocab_size, self.hidden_size, self.hidden_states = vocab_size, hidden_size, hidden_states
        self.has_head = has_head
        self._rope = rope  # the models.rope.RopeSpec whose frequencies depend on a sequence's length, or None
        self._inv_freq_at = None if rope is None else functools.lru_cache(maxsize=256)(rope.inv_freq_at)
        self._steps = len(steps)
        self.handle = Handle(
            self.lib.dso_plan_create, self.lib.dso_plan_destroy, context.handle, (Step * len(steps))(*steps), len(steps),
            (Slot * len(slots))(*slots), len(slots), (Weight * len(weights))(*weights), len(weights), vocab_size,
        )  # fmt: skip

    def run(self, batch: StepBatch, store: CpuStore) -> StepOutput:
        """One step. Shapes are checked here, ids and lengths by the library, before anything is written."""
        tokens, rows = len(batch.positions), len(batch.logit_rows)
        if rows and not self.has_head:
            raise ValueError(f"logit_rows asks for {rows} rows of logits, and this plan has no head")
        frequencies = self._frequencies(batch)
        logits = _logits(batch.logits, (rows, self.vocab_size))
        hidden = (
            torch.empty(self.hidden_states, tokens, self.hidden_size, dtype=torch.float32, device="cpu")
            if batch.hidden
            else None
        )
        last = torch.empty(tokens, self.hidden_size, dtype=torch.float32, device="cpu") if batch.last_hidden else None
        embeds = self._rows_of(batch.inputs_embeds, "inputs_embeds", tokens)
        states = self._rows_of(batch.states, "states", tokens)
        sequences, blocks = len(batch.query_len), batch.block_table.shape[-1]
        b = Batch()
        b.T, b.S, b.R, b.max_blocks = tokens, sequences, rows, blocks
        b.token_ids = _address(batch.token_ids, "token_ids", tokens) if embeds is None else None
        b.positions = _address(batch.positions, "positions", tokens)
        b.query_len = _address(batch.query_len, "query_len", sequences)
        b.context_len = _address(batch.context_len, "context_len", sequences)
        b.phase = _address(batch.phase, "phase", sequences)
        b.block_table = _address(batch.block_table, "block_table", sequences, blocks)
        b.logit_rows = _address(batch.logit_rows, "logit_rows", rows)
        b.inputs_embeds, b.states = _pointer(embeds), _pointer(states)
        b.logits, b.hidden, b.last_hidden = logits.data_ptr(), _pointer(hidden), _pointer(last)
        b.cache = store.handle.address
        b.inv_freq = None if frequencies is None else frequencies.__array_interface__["data"][0]
        check(self.lib.dso_plan_run(self.handle, C.byref(b)))
        return StepOutput(logits, hidden, last)

    def _frequencies(self, batch: StepBatch) -> npt.NDArray[np.float32] | None:
        """float32 [S, rot/2], contiguous; None where every sequence has the plan's own."""
        if self._rope is None or self._inv_freq_at is None:
            return None
        if batch.reach is not None and (batch.reach.shape != batch.query_len.shape or (batch.reach < 1).any()):
            raise ValueError(f"reach must be {len(batch.query_len)} numbers above 0, and is {batch.reach}")
        lengths = reach_of(batch)
        return None if max(lengths) <= self._rope.context else np.stack([self._inv_freq_at(n) for n in lengths])

    def _rows_of(self, given: torch.Tensor | None, name: str, tokens: int) -> torch.Tensor | None:
        """A batch's float rows as the library reads them."""
        if given is None:
            return None
        if tuple(given.shape) != (tokens, self.hidden_size):
            raise ValueError(f"{name} has shape {tuple(given.shape)}, this step needs {(tokens, self.hidden_size)}")
        return given.detach().to("cpu", torch.float32).contiguous()

    def check_weights(self) -> None:
        check(self.lib.dso_plan_check(self.handle))

    def reserve(self, tokens: int, logit_rows: int) -> None:
        check(self.lib.dso_plan_reserve(self.handle, tokens, logit_rows))

    def buffer_bytes(self, tokens: int, logit_rows: int) -> int:
        return int(self.lib.dso_plan_buffer_bytes(self.handle, tokens, logit_rows))

    def describe(self) -> list[dict[str, Any]]:
        return self._rows

    def timing(self, on: bool = True) -> None:
        """Starts (and clears) or stops the per-step clock."""
        check(self.lib.dso_plan_set_timing(self.handle, int(on)))

    def timings(self) -> list[dict[str, Any]]:
        """Seconds of each step summed over the runs since `timing()`, beside what `describe` says of it."""
        seconds, runs = (C.c_double * self._steps)(), C.c_int64()
        check(self.lib.dso_plan_timing(self.handle, seconds, C.byref(runs)))
        return [{**row, "seconds": s, "runs": runs.value} for row, s in zip(self._rows, seconds, strict=True)]

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        raise BackendError("a compiled plan cannot be copied; compile the copied model's graph again")


def _pointer(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _logits(given: torch.Tensor | None, shape: tuple[int, int]) -> torch.Tensor:
    """The tensor that the step writes its logits into."""
    if given is None:
        return torch.empty(shape, dtype=torch.float32, device="cpu")
    if given.shape != shape or given.dtype != torch.float32 or given.device.type != "cpu" or not given.is_contiguous():
        raise ValueError(f"logits must be contiguous float32 {shape} on the CPU, got {given.dtype} {tuple(given.shape)}")
    return given
