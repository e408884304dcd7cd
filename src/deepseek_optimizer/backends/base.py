"""The interface of a backend: it compiles graphs to plans, stores the KV cache, and packs and multiplies weights.

Everything outside this folder uses a backend only through these protocols, so backends are interchangeable, and another package
can add its own: see `registry.py`. No torch is imported here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from ..cache.block_manager import BLOCK_TOKENS as BLOCK_TOKENS  # the same on every backend
from ..errors import BackendError
from ..graph.rope_rotation import KeyRotation
from .decoding import DecodeCall, Decoded, DraftedCall, DraftedRounds
from .sampling import TokenChoice

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from ..graph.ir import Graph
    from ..quant.packed import PackedMatrix, PackedWeight
    from ..system.memory import FreeMemory

Int32 = npt.NDArray[np.int32]

DECODE, PREFILL = 0, 1  # a sequence's phase, which selects the kernel family
PHASES = ("decode", "prefill")


@dataclass(frozen=True)
class Capabilities:
    """What a backend supports on this machine. Everything listed compiles and runs; `check_supported` rejects the rest.

    Attributes:
        name: the name that the backend is registered under.
        device_type: torch's device type for weights, cache and logits: "cpu", "cuda", ...
        phases: a subset of PHASES.
        weight_formats: names from `quant.FORMATS`.
        kv_dtypes: storage types of the KV cache: "fp32", "bf16", "int8", "fp8", "int4".
        attention_modes: values of `DeepSeekConfig.attention_optimization`.
        activations: values of `CompileOptions.activation` that have an effect.
        isas: instruction sets that run on this machine, the best last; empty if there is no choice.
        batch_invariant: whether a row's result is bitwise equal whatever other rows the step has.
        training: whether there are native training operations in addition to `linear` and `linear_gradient` (`train/ops/`).
        adapters: whether plans support low-rank adapters (`new_adapters`).
        decode_calls: whether `Plan.decode` runs several steps and chooses tokens natively, so that it is faster than `run`.
        drafted_calls: whether `Plan.decode_drafted` runs several rounds natively.
        dense_operations: whether `feed_forward`, `norm` and `attend` are faster than the operations of torch that they replace
            in models without a plan.
        host_experts: whether plans may have experts in the host's memory (`CompileOptions.host_experts`).
        kernel_divisions: whether `dso tune --kernels` may choose how kernels divide their work (`CudaBackend.divided`).
    """

    name: str
    device_type: str
    phases: tuple[str, ...]
    weight_formats: tuple[str, ...]
    kv_dtypes: tuple[str, ...]
    attention_modes: tuple[str, ...]
    activations: tuple[str, ...] = ("auto",)
    isas: tuple[str, ...] = ()
    batch_invariant: bool = False
    training: bool = False
    adapters: bool = False
    decode_calls: bool = False
    drafted_calls: bool = False
    dense_operations: bool = False
    host_experts: bool = False
    kernel_divisions: bool = False


@dataclass(frozen=True)
class CompileOptions:
    """Options of `Backend.compile`.

    Attributes:
        activation: format that products with integer weights round their input rows to: "int8", "int16", or "auto", the
            default of each weight format. Backends that do not round rows ignore it. "fp8": products with FP8 weights round
            rows to E4M3 in groups of 128 columns (`reference/scaled_rows.py`).
        host_experts: names of the weights of `experts_gate_up` nodes that the CPU computes from the host's memory, together
            with their `experts_down`. Backends on the CPU ignore it.
    """

    activation: str = "auto"
    host_experts: tuple[str, ...] = ()


DEFAULTS = CompileOptions()
Norm = tuple["torch.Tensor", "torch.Tensor | None", float]  # weight, bias and epsilon of `Backend.norm`


@dataclass
class StepBatch:
    """One ragged step: no padding. Decode sequences come first; a sequence's rows are consecutive.

    Attributes:
        token_ids: int32 [T]; ignored if `inputs_embeds` is given, unless the graph has op `lookup`.
        positions: int32 [T], for RoPE only; causality follows the order in the cache.
        query_len: int32 [S], > 0, sums to T.
        context_len: int32 [S], tokens in the cache before this step.
        phase: int32 [S], DECODE or PREFILL, ascending.
        block_table: int32 [S, max_blocks], block ids that cover context_len + query_len tokens; for a cache with G groups of
            layers [G, S, max_blocks]. In a group whose layers all have windows, -1 may stand for a block that no row sees.
        logit_rows: int32 [R], the rows of T whose logits are computed, ascending.
        inputs_embeds: float32 [T, H] torch tensor, or None.
        states: float32 [T, D] torch tensor with D = `Graph.draft_width`, the input of `state_in`; None for graphs without it.
        hidden: whether to return all hidden states.
        last_hidden: whether to return the last one (after the final norm) separately.
        draft_states: whether to return what MTP layers take as `states`.
        reach: int32 [S], > 0: the length in tokens that each sequence's RoPE frequencies are computed for, if RoPE is dynamic.
            A constant value over a sequence's lifetime gives all its keys and queries the same frequencies, independent of
            chunking and of other requests. None: each sequence's highest position in this step + 1.
        logits: float32 torch [R, V], contiguous, on the plan's device, for the plan to write to; None: newly allocated. For a
            large batch and vocabulary, new memory costs page faults at every step.
        state_from: int32 [S], the slot of the store that has each sequence's recurrent states before this step; -1: the
            sequence is new, its states are zero. Ignored by graphs without states.
        state_to: int32 [n, 2], (row, slot) in ascending order of rows: the states after this row are stored in this slot. The
            last row of every sequence must be listed. A slot occurs once. A slot in `state_from` may be listed only for the
            last row of the only sequence that reads it, which then overwrites it. Ignored by graphs without states.
        axes: int32 [T, 3], positions in time, height and width, for RoPE with axes (`RopeSpec.axes`), and ignored by graphs
            without it; None: on each axis `positions`.
        visible_to: int32 [T], or None: one past the last token of its sequence that each row attends to, which is not its own
            where the tokens of a picture see each other. It lies within the step, and does not descend. Not with latent
            attention or chosen blocks.
        features: float32 torch [n, T, H], what the graph's n `add_features` nodes add to the rows; None: nothing.
        adapters: the store of adapters that `adapter_of` refers to.
        adapter_of: int32 [S], the slot of each sequence's adapter, -1: none; None: no sequence has one. Faster if sequences
            with the same adapter are consecutive. Ignored by graphs without adapter sites.
    """

    token_ids: Int32
    positions: Int32
    query_len: Int32
    context_len: Int32
    phase: Int32
    block_table: Int32
    logit_rows: Int32
    inputs_embeds: torch.Tensor | None = None
    hidden: bool = False
    logits: torch.Tensor | None = None
    states: torch.Tensor | None = None
    last_hidden: bool = False
    draft_states: bool = False
    reach: Int32 | None = None
    state_from: Int32 | None = None
    state_to: Int32 | None = None
    axes: Int32 | None = None
    visible_to: Int32 | None = None
    features: torch.Tensor | None = None
    adapters: AdapterStore | None = None
    adapter_of: Int32 | None = None

    def tables(self, groups: int) -> Int32:
        """`block_table` as [groups, S, max_blocks]. Raises ValueError if it has another number of groups."""
        table = self.block_table
        if table.ndim == 2:
            table = table[None]
        if table.ndim != 3 or len(table) != groups:
            raise ValueError(
                f"block_table must have the tables of {groups} groups of layers, got shape {self.block_table.shape}"
            )
        return table

    @property
    def decoding_rows(self) -> int:
        """Number of rows of sequences in phase DECODE; these are the first ones."""
        return int(self.query_len[self.phase == DECODE].sum())


def states_of_new(query_len: Int32) -> tuple[Int32, Int32]:
    """`StepBatch.state_from` and `state_to` of a step whose sequences are all new, for slots 0 to S - 1.

    Args:
        query_len: int32 [S].
    """
    count = len(query_len)
    last_rows = np.cumsum(query_len, dtype=np.int32) - 1
    slots = np.arange(count, dtype=np.int32)
    return np.full(count, -1, np.int32), np.stack((last_rows, slots), 1).astype(np.int32)


def reach_of(batch: StepBatch) -> list[int]:
    """For each sequence, the length in tokens that its RoPE frequencies are computed for."""
    if batch.reach is not None:
        return batch.reach.tolist()
    starts = np.cumsum(batch.query_len) - batch.query_len
    return (np.maximum.reduceat(batch.positions, starts) + 1).tolist()


@dataclass
class StepOutput:
    """The result of a step. The caller owns all tensors.

    Attributes:
        logits: float32 torch [R, V] on the plan's device; the batch's own tensor if it has one.
        hidden: float32 torch [n_hidden, T, H] or None; the last one after the final norm, as in Transformers.
        last_hidden: float32 [T, H] or None.
        draft_states: float32 [T, D] or None: the input of the graph's `draft_out`; without one, the last hidden states.
    """

    logits: torch.Tensor
    hidden: torch.Tensor | None = None
    last_hidden: torch.Tensor | None = None
    draft_states: torch.Tensor | None = None


class KvStore(Protocol):
    """A backend's storage of blocks, and of recurrent states in slots. A block holds 32 tokens of the layers of one group, and
    every block can serve every group. A slot holds all states of one sequence. `cache.BlockManager` decides which block and
    which slot belongs to which sequence."""

    num_blocks: int
    block_bytes: int

    @property
    def held_blocks(self) -> int:
        """Number of blocks, counted from the first, whose memory is allocated already, whether they are in use or not."""

    @property
    def held_states(self) -> int:
        """Number of slots, counted from the first, whose memory is allocated already, whether they are in use or not."""

    @property
    def num_states(self) -> int:
        """Number of slots; 0 for a graph without states."""

    @property
    def state_bytes(self) -> int:
        """Bytes of a slot, and of what `read_state` returns."""

    def copy_block(self, source: int, target: int) -> None: ...

    def release(self, from_block: int) -> None:
        """Returns the memory of blocks >= from_block to the system; their contents are lost."""

    @property
    def saved_bytes(self) -> int:
        """Length of what `read_block` returns, in bytes."""

    def read_block(self, block: int) -> bytes:
        """A block's content, to be saved in a file. Any store of the same backend, graph and dtype can restore it."""

    def write_block(self, block: int, data: bytes) -> None:
        """Restores what `read_block` returned.

        Raises:
            ValueError: the wrong number of bytes; nothing was changed.
        """

    def copy_state(self, source: int, target: int) -> None:
        """Copies a slot."""

    def release_states(self, from_slot: int) -> None:
        """As `release`, for slots."""

    def read_state(self, slot: int) -> bytes:
        """A slot's content, as `read_block`."""

    def write_state(self, slot: int, data: bytes) -> None:
        """Restores what `read_state` returned, as `write_block`."""

    def rotate(self, rotation: KeyRotation, block_table: Int32, tokens: int, position: int, delta: int, group: int = 0) -> None:
        """Moves cached tokens by `delta` positions: rotates their keys in all layers of a group, and changes nothing else.

        Angles are exact: however often a key was rotated, it has the angle that RoPE's float32 product gives at its final
        position. Rounding errors of the storage accumulate like independent errors: after eight rotations they are 0.5% of a
        key in bf16, 1.3% in int8.

        Args:
            rotation: the model's, from `graph.rope_rotation.key_rotation`.
            block_table: int32 [blocks], without repetition, not shared with another sequence: whole blocks are rotated.
            tokens: number of tokens in these blocks; the slots after the last one hold undefined values afterwards.
            position: current RoPE position of the first token; the others follow consecutively.
            group: the group of layers that the blocks belong to.

        Raises:
            UnsupportedRequestError: RoPE is dynamic, and its frequencies at these positions depend on the length.
            ValueError: an invalid table or position. Nothing was changed in either case.
        """

    def read(self, layer: int, block_table: Int32, tokens: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """One layer of a sequence, from the blocks of the layer's group: K and V as torch float32 [kv_heads, tokens, head_dim];
        for a latent cache the latents [tokens, rank + rope] and the indexer's keys [tokens, index] or None."""


class AdapterStore(Protocol):
    """A backend's storage of low-rank adapters, in slots. `engine.adapters.Adapters` decides which slot is whose."""

    slots: int

    def adapter_bytes(self, ranks: Mapping[int, int]) -> int:
        """Memory of an adapter, by the rank that it has for each site."""

    def load(self, slot: int, pairs: Mapping[int, tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Puts an adapter into a slot that no running step uses.

        Args:
            slot: the slot, which is empty.
            pairs: for each site (index in `Graph.adapter_sites`) that the adapter changes A and B, of the site's
                `pair_shapes`, where the adapter's scale is contained.

        Raises:
            ValueError: a matrix does not fit its site, or its rank is too large. The slot is empty then.
        """

    def clear(self, slot: int) -> None:
        """Empties a slot that no running step uses, and frees its memory."""


class Plan(Protocol):
    """A compiled graph, bound to weights."""

    @property
    def device(self) -> torch.device:
        """The device of its logits and hidden states."""

    def run(self, batch: StepBatch, store: KvStore | None) -> StepOutput:
        """Runs one step. Returns when it is complete: schedulers measure its time.

        Args:
            batch: the rows of the step.
            store: created by the same backend for the same cache; None for a graph without a cache (`graph.ir.NO_CACHE`).

        Raises:
            ValueError or BackendError: an invalid batch.
            CheckpointChangedError: see `check_weights`; no result is valid then.
        """

    def choose_tokens(self, logits: torch.Tensor, choices: Sequence[TokenChoice | None]) -> list[int | None]:
        """Chooses tokens on the device of the logits, so that whole rows need not be copied to the host.

        Args:
            logits: float32 [R, V] from a step of this plan; not changed.
            choices: one per row; None leaves the row to the caller.

        Returns: for each row the token that `sampling.choose_token` would return, NOT_FINITE included, or None.
        """

    def decode(self, batch: StepBatch, store: KvStore, call: DecodeCall) -> Decoded:
        """Runs decode steps, each with the tokens that the step before it chose, and chooses their tokens.

        Args:
            batch: of the first step: one row per sequence, with its logits, in phase DECODE, without `inputs_embeds`,
                `axes`, `visible_to` and `features`. Its block table covers all steps; nothing of it is changed. With `states`,
                it has `draft_states` too: those of a step are the `states` of the next.
            store: as in `run`.
            call: how many steps, and how tokens are chosen.

        Returns: as many steps as were possible, at least one. A backend may always return after one
            (`decode_one`).

        Raises: as `run`; what was written to the cache is to be discarded then.
        """

    def decode_drafted(
        self, batch: StepBatch, drafter: Plan, pending: StepBatch, store: KvStore, call: DraftedCall
    ) -> DraftedRounds:
        """Runs rounds of decoding with drafts, of one sequence.

        A round runs the drafting plan over its pending rows, whose states are this plan's, then for each further draft over its
        own draft state, one row further. Drafts are its most likely tokens. Then it runs this plan over the last token
        and the drafts, and chooses tokens row by row, as `decode` does, up to the first that is not the draft. The rows of
        these tokens are the next pending ones.

        Args:
            batch: of the first step without drafts: one row, with `draft_states`. Its logits, if given, have 1 + `call.drafts`
                rows.
            drafter: a plan of the same backend that reads `states`, such as that of an MTP layer.
            pending: of the drafting plan's first step, with `states`, `draft_states` and the logits of the last row. That is
                the row before `batch`'s.
            store: the cache of both plans. The block tables cover `call.room` tokens after the context of `batch`.
            call: how many rounds, and how tokens are chosen.

        Returns: as many rounds as were possible, at least one. A backend may always return after one (`drafted_round`).

        Raises: as `decode`.
        """

    def check_weights(self) -> None:
        """Raises CheckpointChangedError if weights are in a mapped file that was changed. Cheap."""

    def reserve(self, tokens: int, logit_rows: int) -> None:
        """Allocates buffers for steps of up to `tokens` tokens and `logit_rows` rows of logits."""

    def buffer_bytes(self, tokens: int, logit_rows: int) -> int:
        """Bytes of the buffers that `reserve` allocates, without the logits, which belong to the caller."""

    def describe(self) -> list[dict[str, Any]]:
        """One row per step of the plan: op, kernel, format, outputs; for the report."""


class FileMapping(Protocol):
    """A file mapped into memory: a writable buffer, private to this process, that supports weak references."""

    def replaced(self) -> Path | None:
        """The file's path if it now leads to another file or to none; None: it is still the mapped file."""


class Sizes(Protocol):
    """Memory that a backend needs, computed from the graph alone, without a device or threads."""

    def block_bytes(self, graph: Graph, kv_dtype: str) -> int:
        """Bytes of one cache block, of the largest group of layers."""

    def state_bytes(self, graph: Graph) -> int:
        """Bytes of one slot, with all recurrent states of a sequence; 0 for a graph without states."""

    def buffer_bytes(
        self, graph: Graph, formats: Mapping[str, str], options: CompileOptions, tokens: int, logit_rows: int
    ) -> int:
        """Bytes of a compiled plan's buffers, including logits, for steps of the given size.

        Args:
            formats: weight format of every matrix of the graph by name.
            tokens, logit_rows: size of the largest step.
        """


class Backend(Sizes, Protocol):
    """Compiles and runs graphs, and packs weights, on one device. All backends use the layout of packed weights in `quant/`."""

    @property
    def capabilities(self) -> Capabilities: ...

    @property
    def name(self) -> str:
        """`capabilities.name`."""

    @property
    def device(self) -> torch.device: ...

    @property
    def detail(self) -> str:
        """A description for the report, such as the ISA and the number of threads."""

    @property
    def isa(self) -> str | None:
        """The instruction set in use, one of `capabilities.isas`; None if there is no choice."""

    @property
    def threads(self) -> int | None:
        """Number of worker threads; None if the backend has none of its own."""

    @property
    def note(self) -> str | None:
        """A notice for the user about the setup; None if there is nothing to report."""

    def compile(
        self, graph: Graph, weights: Mapping[str, PackedWeight | torch.Tensor], options: CompileOptions = DEFAULTS
    ) -> Plan:
        """Binds `graph` to `weights`.

        Args:
            weights: by name: matrices and stacks packed, vectors as 1-D tensors, `graph.min_formats.exact_weights` as either.
            options: see `CompileOptions`.

        Raises:
            BackendError: a weight is missing or does not fit, or the graph has an op that this backend does not support.
        """

    def new_store(self, graph: Graph, kv_dtype: str, num_blocks: int, num_states: int = 0) -> KvStore:
        """An empty cache of `num_blocks` blocks and `num_states` slots. Memory may be allocated when they are first written."""

    def new_adapters(self, graph: Graph, slots: int, rank: int, dtype: str) -> AdapterStore:
        """An empty store for adapters, if `capabilities.adapters`.

        Args:
            graph: a graph with adapter sites (`graph.adapters.with_adapters`).
            slots: number of adapters.
            rank: largest rank of an adapter, that of the graph's nodes.
            dtype: what the matrices are stored in, "fp32" or "bf16". Products are computed in fp32.
        """

    def free_memory(self) -> FreeMemory:
        """What can still be allocated for the cache: the host's limits, or the device's memory."""

    def thread_context(self) -> AbstractContextManager[None]:
        """A context for running steps on the calling thread: keeps torch's threads from competing with the backend's."""

    def pack(
        self,
        weight: torch.Tensor,
        name: str,
        out: torch.Tensor | None = None,
        importance: torch.Tensor | None = None,
        scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """A `quant.Packer`, equal to `quant.reference_packer` bit for bit."""

    def unpack(self, matrix: PackedMatrix, begin: int = 0, end: int | None = None) -> torch.Tensor:
        """Rows [begin, end) as float32 [end - begin, cols]; `begin` is a multiple of 16. None: to the last row."""

    def linear(
        self, x: torch.Tensor, matrix: PackedMatrix, bias: torch.Tensor | None = None, options: CompileOptions = DEFAULTS
    ) -> torch.Tensor:
        """x [..., K] @ W.T (+ bias) as float32 [..., N]. `options`: as in `compile`."""

    def linear_gradient(self, grad: torch.Tensor, matrix: PackedMatrix) -> torch.Tensor:
        """grad [..., N] @ W as float32 [..., K]: the gradient of `linear` with respect to x."""

    def feed_forward(
        self,
        x: torch.Tensor,
        first: Sequence[tuple[PackedMatrix, torch.Tensor | None]],
        op: str,
        down: tuple[PackedMatrix, torch.Tensor | None],
        options: CompileOptions = DEFAULTS,
        *,
        norm: Norm | None = None,
        residual: bool = False,
    ) -> torch.Tensor:
        """op(x W_1^T + b_1, ..) W^T + b as float32 [..., M]; without a gradient.

        Args:
            x: [..., K].
            first: matrix [N, K] and bias of each product that the op reads: one, or gate and up.
            op: an element-wise op of graphs.
            down: matrix [M, N] and bias of the product of its result.
            options: as in `compile`.
            norm: arguments of the method `norm`, whose result takes the place of x in the products; x is float32 then.
            residual: whether x, which is float32 and has M columns, is added to the result.
        """

    def norm(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
        """Layer norm of x [..., N] with weight and bias [N], or RMS norm without a bias; all float32, without a gradient."""

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scale: float,
        mask: torch.Tensor | None = None,
        *,
        causal: bool = False,
        options: CompileOptions = DEFAULTS,
    ) -> torch.Tensor:
        """softmax(scale q k^T + mask) v of q [B, H, S, D], k [B, Hkv, T, D], v [B, Hkv, T, Dv] -> [B, H, S, Dv]; all float32 or
        all bfloat16, with contiguous last dimensions, without a gradient. Query head h uses kv head h // (H / Hkv).

        Args:
            scale: factor of the scores.
            mask: [.., T], broadcastable to [B, H, S, T]: bool, False hides a key; or of q's dtype, added to the scores. A query
                whose keys are all hidden (False or -inf) gets zeros.
            causal: without a mask, query i of S sees keys up to i + T - S only.
            options: as in `compile`. With activations of 8 bits, products may be as precise as those of bfloat16.

        Raises:
            ValueError: a tensor has another shape, dtype or layout.
        """

    @property
    def maps_files(self) -> bool:
        """Whether `map_file` is supported; otherwise weights are read into memory."""

    def map_file(self, fd: int, size: int, modified_ns: int, path: Path) -> FileMapping:
        """A `checkpoint.files.Mapper`: maps a file of packed weights into memory.

        Raises:
            CheckpointChangedError, CheckpointError: see `checkpoint.files.Mapper`.
            BackendError: `maps_files` is False.
        """

    def check_tensor(self, tensor: torch.Tensor) -> None:
        """Raises CheckpointChangedError if a tensor is in a mapped file that was changed."""


def check_supported(
    capabilities: Capabilities, formats: Sequence[str], kv_dtype: str, attention_mode: str, activation: str = "auto"
) -> None:
    """Raises BackendError, with the alternatives, if a backend does not support one of these."""
    requested = (
        *(("weight format", name, capabilities.weight_formats, "precision") for name in formats),
        ("KV cache dtype", kv_dtype, capabilities.kv_dtypes, "kv_cache"),
        ("attention mode", attention_mode, capabilities.attention_modes, "attention_optimization"),
        *([("activation", activation, capabilities.activations, "activation")] if activation == "fp8" else []),
    )
    for what, value, supported, field in requested:
        if value not in supported:
            raise BackendError(
                f"the {capabilities.name} backend does not support {what} {value!r}; choose {field} among "
                f"{', '.join(supported)}, or another backend"
            )
