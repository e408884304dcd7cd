"""A compiled native plan and its block store: one library call per step."""

from __future__ import annotations

import ctypes as C
import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
import torch

from ...errors import BackendError, RankLostError
from ...graph.ir import CacheSpec, LatentSpec, RowsSpec, StateSpec
from ...graph.rope_rotation import KeyRotation, Pairs
from ..base import BLOCK_TOKENS, Int32, KvStore, StepBatch, StepOutput, reach_of
from ..decoding import DecodeCall, Decoded, DraftedCall, DraftedRounds
from ..sampling import TokenChoice, choose_tokens
from .buffers import address, optional
from .decode import DraftedDecoding, native_call
from .native import FLAGS, Context, Handle, block_bytes, cache_shape, check, state_bytes, state_shapes
from .structs import Batch, Rotation, RunCounts, Slot, Stages, Step, Weight

_I32, _F32, _U8 = np.dtype(np.int32), np.dtype(np.float32), np.dtype(np.uint8)


class CpuStore:
    """Paged K and V in the native arena, and slots for recurrent states: memory becomes resident when it is first written.

    Args:
        context: the library's context.
        spec: the model's cache.
        kv_dtype: "fp32", "bf16", "int8" or "int4".
        num_blocks: capacity in blocks of 32 tokens.
        states: the model's recurrent states.
        num_states: number of slots for them; 0 for a model without states.
    """

    def __init__(
        self,
        context: Context,
        spec: CacheSpec | LatentSpec | RowsSpec,
        kv_dtype: str,
        num_blocks: int,
        states: Sequence[StateSpec] = (),
        num_states: int = 0,
    ) -> None:
        self.context, self.lib = context, context.lib
        self.num_blocks = num_blocks
        self.spec, self.kv_dtype = spec, kv_dtype
        self.block_bytes = block_bytes(spec, kv_dtype)
        shape = cache_shape(spec, kv_dtype)
        self.handle = Handle(self.lib.dso_cache_create, self.lib.dso_cache_destroy, C.byref(shape), num_blocks)
        self.num_states, self.state_bytes = num_states, state_bytes(states)
        self.recurrent: Handle | None = None
        if num_states:
            shapes, create = state_shapes(states), self.lib.dso_states_create
            self.recurrent = Handle(create, self.lib.dso_states_destroy, shapes, len(states), num_states)

    @property
    def held_blocks(self) -> int:
        """None: the address space is reserved, and the system allocates pages as they are written."""
        return 0

    @property
    def held_states(self) -> int:
        """None, as of blocks."""
        return 0

    def copy_block(self, source: int, target: int) -> None:
        check(self.lib.dso_cache_copy_block(self.handle, source, target))

    def release(self, from_block: int) -> None:
        check(self.lib.dso_cache_release(self.handle, from_block))

    @property
    def saved_bytes(self) -> int:
        return int(self.lib.dso_cache_saved_bytes(self.handle))

    def read_block(self, block: int) -> bytes:
        content = self.context.outputs.empty((self.saved_bytes,), torch.uint8)
        place = address(content, "a block", torch.uint8, (self.saved_bytes,))
        self.context.call("dso_cache_save_block", self.handle, block, place, block=content)
        return content.numpy().tobytes()

    def write_block(self, block: int, data: bytes) -> None:
        if len(data) != self.saved_bytes:
            raise ValueError(f"a block has {self.saved_bytes} bytes, got {len(data)}")
        place = address(np.frombuffer(data, _U8), "a block", _U8, (self.saved_bytes,))
        self.context.call("dso_cache_load_block", self.handle, block, place)

    def copy_state(self, source: int, target: int) -> None:
        check(self.lib.dso_states_copy(self.recurrent, source, target))

    def release_states(self, from_slot: int) -> None:
        if self.recurrent is not None:
            check(self.lib.dso_states_release(self.recurrent, from_slot))

    def read_state(self, slot: int) -> bytes:
        content = self.context.outputs.empty((self.state_bytes,), torch.uint8)
        place = address(content, "a slot", torch.uint8, (self.state_bytes,))
        self.context.call("dso_states_save", self.recurrent, slot, place, slot=content)
        return content.numpy().tobytes()

    def write_state(self, slot: int, data: bytes) -> None:
        if len(data) != self.state_bytes:
            raise ValueError(f"a slot has {self.state_bytes} bytes, got {len(data)}")
        place = address(np.frombuffer(data, _U8), "a slot", _U8, (self.state_bytes,))
        self.context.call("dso_states_load", self.recurrent, slot, place)

    def rotate(self, rotation: KeyRotation, block_table: Int32, tokens: int, position: int, delta: int, group: int = 0) -> None:
        rotation.check(position + tokens)
        table, frequencies = _table(block_table, tokens), np.ascontiguousarray(rotation.inv_freq, dtype=np.float32)
        key, index = (None if pairs is None else _rotation(pairs, frequencies) for pairs in (rotation.key, rotation.index))
        place = address(table, "block_table", _I32, (table.size,))
        args = (None if r is None else C.byref(r) for r in (key, index))
        self.context.call("dso_cache_rotate", self.context.handle, self.handle, *args, group, place, tokens, position, delta)

    def read(self, layer: int, block_table: Int32, tokens: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        table, spec, f32 = _table(block_table, tokens), self.spec, torch.float32
        if isinstance(spec, LatentSpec):
            shapes: list[tuple[int, ...]] = [(tokens, spec.rank + spec.rope), *([(tokens, spec.index)] if spec.index else [])]
        elif isinstance(spec, RowsSpec):
            shapes = [(tokens // spec.rows[layer].every, spec.rows[layer].width)]
        else:
            kv_heads, head_dim = spec.heads_of(layer)
            shapes = [(kv_heads, tokens, head_dim)] * 2
        key = self.context.outputs.empty(shapes[0], f32)
        value = self.context.outputs.empty(shapes[1], f32) if len(shapes) > 1 else None
        places = address(key, "key", f32, shapes[0]), optional(value, "value", f32, shapes[-1])
        place = address(table, "block_table", _I32, (table.size,))
        self.context.call("dso_cache_read", self.handle, layer, place, tokens, *places, key=key, value=value)
        return key, value


def _table(block_table: Int32, tokens: int) -> Int32:
    """The table as a contiguous int32 array. Raises ValueError if it has too few blocks for the tokens."""
    table = np.ascontiguousarray(block_table, dtype=np.int32)
    if table.size * BLOCK_TOKENS < tokens:
        raise ValueError(f"block_table has {table.size} blocks, too few for {tokens} tokens")
    return table


def _rotation(pairs: Pairs, frequencies: Any) -> Rotation:
    if 2 * len(frequencies) != pairs.rot:
        raise ValueError(f"rotating {pairs.rot} elements needs {pairs.rot // 2} frequencies, got {len(frequencies)}")
    place = address(frequencies, "inv_freq", _F32, (pairs.rot // 2,))
    return Rotation(place, pairs.rot, pairs.offset, FLAGS["interleaved"] if pairs.interleaved else 0, 0)


class CpuPlan:
    """Implements `Plan`: steps bound to packed weights. Created by `CpuBackend.compile`; keeps its weights alive."""

    device = torch.device("cpu")

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
        draft_width: int,
        rope: Any,
        has_head: bool,
        has_states: bool,
        looks_up: bool,
        features: int = 0,
    ) -> None:
        self.context, self.lib, self._keep, self._rows = context, context.lib, keep, rows
        self.vocab_size, self.hidden_size, self.hidden_states = vocab_size, hidden_size, hidden_states
        self._draft_width = draft_width  # of DRAFT_OUT; 0: the plan has none, and draft states are the last hidden states
        self.has_head, self.has_states, self._looks_up, self._features = has_head, has_states, looks_up, features
        self._rope = rope  # the models.rope.RopeSpec whose frequencies depend on a sequence's length, or None
        self._rot = 0 if rope is None else rope.rot
        self._inv_freq_at = None if rope is None else functools.lru_cache(maxsize=256)(rope.inv_freq_at)
        self._steps = len(steps)
        self.handle = Handle(
            self.lib.dso_plan_create, self.lib.dso_plan_destroy, context.handle, (Step * len(steps))(*steps), len(steps),
            (Slot * len(slots))(*slots), len(slots), (Weight * len(weights))(*weights), len(weights), vocab_size,
        )  # fmt: skip

    def run(self, batch: StepBatch, store: KvStore | None) -> StepOutput:
        """Runs a step over a `CpuStore`. Before writing anything, shapes are checked here, ids and lengths by the library."""
        return self._run(batch, *self._bound(batch, store))

    def checked(self, batch: StepBatch, store: KvStore | None) -> Callable[[], StepOutput]:
        """Raises what `run` would raise before it writes anything; returns the rest of `run`."""
        bound = self._bound(batch, store)
        check(self.lib.dso_plan_check_batch(self.handle, C.byref(bound[0])))
        return functools.partial(self._run, batch, *bound)

    def _run(self, batch: StepBatch, b: Batch, output: StepOutput, keep: list[Any]) -> StepOutput:
        self._call("dso_plan_run", b, output)
        return self._returned(batch, output)

    def decode(self, batch: StepBatch, store: KvStore, call: DecodeCall) -> Decoded:
        """See `Plan.decode`."""
        return self._decoding(batch, store, call, self._steps_at_once(batch, call))("dso_plan_decode")

    def decode_after(
        self,
        batch: StepBatch,
        call: DecodeCall,
        first: CpuPlan,
        layers: StepBatch,
        store: KvStore,
        start: Callable[[], Sequence[int]],
        lost: Callable[[int], NoReturn],
    ) -> Decoded:
        """`decode` of a plan of what follows the last layer of a model whose layers are divided among processes.

        Args:
            batch, call: see `Plan.decode`. The states come from the layers.
            first: the plan of the first layers.
            layers, store: the batch of its first step, without logits, and its cache.
            start: makes the other processes call `follow`. Returns connected sockets to them, in the order of their layers.
            lost: is called with the index of a socket whose process has ended, or has sent something else. Raises the error.

        Raises:
            ValueError: an argument is invalid; the other processes are ready for the next message, if they were started.
        """
        if len(layers.positions) != len(layers.query_len) or layers.inputs_embeds is not None:
            raise ValueError("a decode step takes one token of each sequence, and no inputs_embeds")
        b, rows, _keep = first._bound(layers, store)
        decode = self._decoding(batch, None, call, first._steps_at_once(layers, call))
        links = np.array(start(), np.int32)
        native = Stages(first.handle.address, C.addressof(b), address(links, "links", _I32, links.shape), len(links))
        try:
            decoded = decode("dso_plan_decode_stages", C.byref(native))
        except RankLostError:
            if native.lost < 0:
                raise
            lost(native.lost)
        first.context.outputs.verify("dso_plan_decode_stages", {"last_hidden": rows.last_hidden})
        return decoded

    def follow(self, batch: StepBatch, store: KvStore, link: int) -> None:
        """Runs these layers in each step of a `decode_after` of another process.

        Args:
            batch: of the first step, without logits and states.
            store: the cache of these layers.
            link: a connected socket to that process.

        Raises:
            RankLostError: that process has ended.
        """
        b, output, _keep = self._bound(batch, store)
        self._call("dso_plan_follow", b, output, link)

    def _steps_at_once(self, batch: StepBatch, call: DecodeCall) -> int:
        """The number of steps of a native call at most."""
        changing = self._rope is not None and batch.reach is None  # frequencies that depend on the length
        return 1 if changing or self.has_states else call.steps

    def _decoding(self, batch: StepBatch, store: KvStore | None, call: DecodeCall, steps: int) -> Callable[..., Decoded]:
        """Checks the arguments of a call of up to `steps` steps. Returns what runs them; its arguments: the library's function,
        and what this takes besides."""
        sequences = len(batch.query_len)
        if call.keep_logits and batch.logits is not None:
            batch = replace(batch, logits=batch.logits[: steps * sequences])
        b, output, keep = self._bound(batch, store, steps * sequences if call.keep_logits else None, steps * sequences)
        native, tokens, kept = native_call(call, len(batch.query_len), self.vocab_size, steps)
        keep += kept

        def run(name: str, *more: Any) -> Decoded:
            self._call(name, b, output, C.byref(native), *more)
            keep.clear()
            logits, states = self._returned(batch, output).logits, output.draft_states
            assert logits is not None
            ran, kept_logits = native.done + native.undecided, None
            if states is not None:
                states = states.view(steps, sequences, -1)[:ran]
            if call.keep_logits:
                kept_logits = logits.view(steps, sequences, -1)[:ran]
                logits = kept_logits[-1]
            return Decoded(tokens[: native.done], logits if native.undecided else None, states, kept_logits)

        return run

    def decode_drafted(
        self, batch: StepBatch, drafter: Any, pending: StepBatch, store: KvStore, call: DraftedCall
    ) -> DraftedRounds:
        rows = 1 + call.drafts
        if self._rope is not None and (batch.reach is None or pending.reach is None):
            raise ValueError("reach is missing: the frequencies of RoPE would change during the call")
        b, output, _keep = self._bound(batch, store, rows, rows)
        p, drafted, _kept = drafter._bound(pending, store, last_rows=max(rows, len(pending.positions)))
        decoding = DraftedDecoding(call, self.vocab_size, drafter.vocab_size)
        self._call("dso_plan_decode_drafted", b, output, drafter.handle, C.byref(p), C.byref(decoding.native))
        drafter.context.outputs.verify(
            "dso_plan_decode_drafted",
            {"logits": drafted.logits, "last_hidden": drafted.last_hidden, "draft_states": drafted.draft_states},
        )
        rounds, undecided = decoding.rounds, bool(decoding.native.undecided)
        logits, states, last = self._returned(batch, output).logits, output.draft_states, len(rounds[-1].tokens)
        assert logits is not None and states is not None
        return DraftedRounds(rounds, logits[last] if undecided else None, states[: last + undecided])

    def _call(self, name: str, b: Batch, output: StepOutput, *more: Any) -> None:
        written = {name: getattr(output, name) for name in ("logits", "hidden", "last_hidden", "draft_states")}
        self.context.call(name, self.handle, C.byref(b), *more, **written)

    def _returned(self, batch: StepBatch, output: StepOutput) -> StepOutput:
        """The output, with logits in the batch's own tensor if it has one."""
        if batch.draft_states and not self._draft_width:
            output.draft_states = output.last_hidden
            output.last_hidden = output.last_hidden if batch.last_hidden else None
        if batch.logits is not None and output.logits is not batch.logits:
            output.logits = batch.logits.copy_(output.logits)
        return output

    def _bound(
        self, batch: StepBatch, store: KvStore | None, logit_rows: int | None = None, last_rows: int | None = None
    ) -> tuple[Batch, StepOutput, list[Any]]:
        """The library's batch, where it writes its results, and what it refers to besides; `logit_rows`, `last_rows`: number of
        rows of logits and of last hidden states that a call of several steps writes, if these are not those of the batch."""
        tokens, rows = len(batch.positions), len(batch.logit_rows)
        last_rows = tokens if last_rows is None else last_rows
        if rows and not self.has_head:
            raise ValueError(f"logit_rows must be empty for a plan that has no head, got {rows} rows")
        sequences, width = len(batch.query_len), self.hidden_size
        tables = batch.tables(1 if store is None else store.spec.groups)  # type: ignore[attr-defined]  # a CpuStore
        groups, _, blocks = tables.shape
        f32, new = torch.float32, self.context.outputs.empty
        shape, logits = (rows if logit_rows is None else logit_rows, self.vocab_size), batch.logits
        if logits is None or self.context.outputs.checked:
            optional(logits, "logits", f32, shape)
            logits = new(shape, f32)  # the copy has red zones
        hidden = new((self.hidden_states, tokens, width), f32) if batch.hidden else None
        of_draft = (last_rows, self._draft_width)
        drafts = new(of_draft, f32) if batch.draft_states and self._draft_width else None
        wants_last = batch.last_hidden or (batch.draft_states and drafts is None)
        last = new((last_rows, width), f32) if wants_last else None
        embeds = None if batch.inputs_embeds is None else batch.inputs_embeds.detach().to("cpu", f32).contiguous()
        states = None if batch.states is None else batch.states.detach().to("cpu", f32).contiguous()
        b = Batch()
        b.T, b.S, b.R, b.max_blocks = tokens, sequences, rows, blocks
        if embeds is None or self._looks_up:
            b.token_ids = address(batch.token_ids, "token_ids", _I32, (tokens,))
        b.positions = address(batch.positions, "positions", _I32, (tokens,))
        b.query_len = address(batch.query_len, "query_len", _I32, (sequences,))
        b.context_len = address(batch.context_len, "context_len", _I32, (sequences,))
        b.phase = address(batch.phase, "phase", _I32, (sequences,))
        b.block_table = address(tables, "block_table", _I32, (groups, sequences, blocks))
        b.logit_rows = address(batch.logit_rows, "logit_rows", _I32, (rows,))
        b.inputs_embeds = optional(embeds, "inputs_embeds", f32, (tokens, width))
        b.states = optional(states, "states", f32, (tokens, self._draft_width or width))
        b.logits = address(logits, "logits", f32, shape)
        b.hidden = optional(hidden, "hidden", f32, (self.hidden_states, tokens, width))
        b.last_hidden = optional(last, "last_hidden", f32, (last_rows, width))
        b.draft_states = optional(drafts, "draft_states", f32, of_draft)
        if store is not None:
            b.cache = store.handle.address  # type: ignore[attr-defined]  # a CpuStore
        if self.has_states:
            self._add_states(b, batch, store)
        if batch.adapter_of is not None:
            b.adapter_of = address(batch.adapter_of, "adapter_of", _I32, (sequences,))
            b.adapters = None if batch.adapters is None else batch.adapters.handle.address  # type: ignore[attr-defined]
        frequencies = self._frequencies(batch)
        b.inv_freq = optional(frequencies, "inv_freq", _F32, (sequences, self._rot // 2))
        b.axes = optional(batch.axes, "axes", _I32, (tokens, 3))
        b.visible_to = optional(batch.visible_to, "visible_to", _I32, (tokens,))
        features = None if batch.features is None else batch.features.detach().to("cpu", f32).contiguous()
        b.features = optional(features, "features", f32, (self._features, tokens, width))
        return b, StepOutput(logits, hidden, last, drafts), [tables, embeds, states, frequencies, features]

    @staticmethod
    def _add_states(b: Batch, batch: StepBatch, store: KvStore | None) -> None:
        """Sets the fields of recurrent states."""
        source, targets = batch.state_from, batch.state_to
        if source is None or targets is None:
            raise ValueError("state_from and state_to are missing: this plan has recurrent states")
        handle = None if store is None else store.recurrent  # type: ignore[attr-defined]  # a CpuStore
        b.recurrent = None if handle is None else handle.address
        b.state_from = address(source, "state_from", _I32, (len(batch.query_len),))
        b.state_to = address(targets, "state_to", _I32, (len(targets), 2))
        b.n_state_to = len(targets)

    def _frequencies(self, batch: StepBatch) -> npt.NDArray[np.float32] | None:
        """RoPE frequencies per sequence, float32 [S, rot/2], contiguous; None if all sequences use the plan's own."""
        if self._rope is None or self._inv_freq_at is None:
            return None
        if batch.reach is not None and (batch.reach.shape != batch.query_len.shape or (batch.reach < 1).any()):
            raise ValueError(f"reach must be {len(batch.query_len)} positive values, got {batch.reach}")
        lengths = reach_of(batch)
        return None if max(lengths) <= self._rope.context else np.stack([self._inv_freq_at(n) for n in lengths])

    def choose_tokens(self, logits: torch.Tensor, choices: Sequence[TokenChoice | None]) -> list[int | None]:
        return choose_tokens(logits.numpy(), choices)

    def check_weights(self) -> None:
        check(self.lib.dso_plan_check(self.handle))

    def reserve(self, tokens: int, logit_rows: int) -> None:
        check(self.lib.dso_plan_reserve(self.handle, tokens, logit_rows))

    def buffer_bytes(self, tokens: int, logit_rows: int) -> int:
        return int(self.lib.dso_plan_buffer_bytes(self.handle, tokens, logit_rows))

    def describe(self) -> list[dict[str, Any]]:
        return self._rows

    def counts(self) -> dict[str, int]:
        """What the last run did: `handovers` of stages from one thread to all, `sleeps` of threads that waited for one, and
        with several memory nodes the pages of weights that the first run found, moved, left and copied (`dso_run_counts`)."""
        counts = RunCounts()
        check(self.lib.dso_plan_counts(self.handle, C.byref(counts)))
        return {name: getattr(counts, name) for name, *_ in RunCounts._fields_}

    def timing(self, on: bool = True) -> None:
        """Starts (from zero) or stops timing of the steps."""
        check(self.lib.dso_plan_set_timing(self.handle, int(on)))

    def timings(self) -> list[dict[str, Any]]:
        """The rows of `describe` with each step's seconds, summed over the runs since `timing()`, and the number of runs."""
        seconds, runs = (C.c_double * self._steps)(), C.c_int64()
        check(self.lib.dso_plan_timing(self.handle, seconds, C.byref(runs)))
        return [{**row, "seconds": s, "runs": runs.value} for row, s in zip(self._rows, seconds, strict=True)]

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        raise BackendError("a compiled plan cannot be copied; compile the copied model's graph again")
