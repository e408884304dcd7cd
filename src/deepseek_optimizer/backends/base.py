"""The contract of a backend: it compiles graphs to plans, stores the KV cache, and packs and multiplies weights.

Everything above this folder uses a backend through these protocols only, so one backend can stand in for another, and a
package outside this one can add its own: see `registry.py`. No torch is imported here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from ..cache.block_manager import BLOCK_TOKENS as BLOCK_TOKENS  # of a cache block, on every backend
from ..errors import BackendError
from ..graph.rotation import KeyRotation
from .sampling import TokenChoice

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from ..graph.ir import Graph
    from ..quant.packed import PackedMatrix, PackedWeight
    from ..system.memory import FreeMemory

Int32 = npt.NDArray[np.int32]

DECODE, PREFILL = 0, 1  # a sequence's phase, which picks the kernel family
PHASES = ("decode", "prefill")


@dataclass(frozen=True)
class Capabilities:
    """What a backend can run on this machine. Whatever is listed compiles and runs; `check_supported` refuses the rest.

    Attributes:
        name: that the backend is registered under.
        device_type: torch's name of the kind of device that weights, cache and logits are on: "cpu", "cuda", ...
        phases: of PHASES.
        weight_formats: names of `quant.FORMATS`.
        kv_dtypes: storage of the KV cache: "fp32", "bf16", "int8".
        attention_modes: values of `DeepSeekConfig.attention_optimization`.
        activations: values of `CompileOptions.activation` that make a difference.
        isas: variants of the instruction set that run here, the best last; empty where there is no choice.
        batch_invariant: whether a row of a step is the same to the bit whatever else runs in that step.
        training: whether there are native training products beside `linear` and `linear_gradient` (`train/ops/`).
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


@dataclass(frozen=True)
class CompileOptions:
    """Attributes:
    activation: what products of integer weight formats may round their rows to: "int8", "int16", or "auto", what each format
        asks for. Backends that do not round rows ignore it.
    """

    activation: str = "auto"


DEFAULTS = CompileOptions()


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
    inputs_embeds: torch.Tensor | None = None
    hidden: bool = False
    logits: torch.Tensor | None = None
    states: torch.Tensor | None = None
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

    logits: torch.Tensor
    hidden: torch.Tensor | None = None
    last_hidden: torch.Tensor | None = None


class KvStore(Protocol):
    """A backend's block storage. Which block belongs to whom is `cache.BlockManager`'s business."""

    num_blocks: int
    block_bytes: int

    def copy_block(self, source: int, target: int) -> None: ...

    def release(self, from_block: int) -> None:
        """Returns the memory of blocks >= from_block to the system; their content is lost."""

    @property
    def saved_bytes(self) -> int:
        """Length of what `read_block` returns, in bytes."""

    def read_block(self, block: int) -> bytes:
        """A block's content, to be saved in a file. Any store of the same backend, graph and dtype can read it back."""

    def write_block(self, block: int, data: bytes) -> None:
        """Restores what `read_block` returned.

        Raises:
            ValueError: another number of bytes; nothing was changed.
        """

    def rotate(self, rotation: KeyRotation, block_table: Int32, tokens: int, position: int, delta: int) -> None:
        """Moves cached tokens by `delta` positions: rotates their keys in all layers, and changes nothing else.

        Angles are exact: however often a key was rotated, it has the angle that RoPE's float32 product gives at its last
        position. Rounding by the storage accumulates as independent errors do: after eight rotations it is 0.5% of a key in
        bf16, 1.3% in int8.

        Args:
            rotation: the model's, from `graph.rotation.key_rotation`.
            block_table: int32 [blocks], without repetition, not shared with another sequence: whole blocks are rotated.
            tokens: number of tokens in these blocks; the places after the last one hold undefined values afterwards.
            position: present RoPE position of the first token; those of the others follow it.

        Raises:
            UnsupportedRequestError: RoPE is dynamic, and its frequencies at these positions depend on the length.
            ValueError: a bad table or position. Nothing was changed in either case.
        """

    def read(self, layer: int, block_table: Int32, tokens: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """K and V of one sequence's layer as torch float32 [kv_heads, tokens, head_dim]; of a latent cache the latents
        [tokens, rank + rope], and the indexer's keys [tokens, index] or None."""


class Plan(Protocol):
    """A compiled graph, bound to weights."""

    @property
    def device(self) -> torch.device:
        """Where its logits and hidden states are."""

    def run(self, batch: StepBatch, store: KvStore) -> StepOutput:
        """One step. Returns when it has been computed: schedulers measure it.

        Args:
            store: made by the same backend for the same cache.

        Raises, besides what the arguments may cause, what `check_weights` does; no result is valid then.
        """

    def choose_tokens(self, logits: torch.Tensor, choices: Sequence[TokenChoice | None]) -> list[int | None]:
        """Chooses tokens where the logits are, so that whole rows need not be copied to the host.

        Args:
            logits: float32 [R, V] of a step of this plan; not changed.
            choices: one for each row; None leaves the row to the caller.

        Returns: for each row the token that `sampling.choose_token` would give, NOT_FINITE included, or None.
        """

    def check_weights(self) -> None:
        """Raises CheckpointChangedError where weights are in a mapped file that was changed. Cheap."""

    def reserve(self, tokens: int, logit_rows: int) -> None:
        """Allocates buffers for steps of up to `tokens` tokens and `logit_rows` rows of logits."""

    def buffer_bytes(self, tokens: int, logit_rows: int) -> int:
        """Bytes of the buffers that `reserve` allocates; the logits, which are the caller's, are not counted."""

    def describe(self) -> list[dict[str, Any]]:
        """One row for each step of the plan: op, kernel, format, outputs; for the report."""


class FileMapping(Protocol):
    """A file mapped into memory: a writable buffer, private to this process, that can be weakly referenced."""

    def replaced(self) -> Path | None:
        """The file's path, where another file or none is found under it by now; None: it is still the one that was mapped."""


class Sizes(Protocol):
    """Memory that a backend takes, computed from the graph alone: neither a device nor threads are needed."""

    def block_bytes(self, graph: Graph, kv_dtype: str) -> int:
        """Bytes of one cache block, all layers together."""

    def buffer_bytes(
        self, graph: Graph, formats: Mapping[str, str], options: CompileOptions, tokens: int, logit_rows: int
    ) -> int:
        """Bytes that a compiled plan's buffers take at its largest step, and its logits.

        Args:
            formats: weight format of every matrix of the graph by name.
            tokens, logit_rows: of the step.
        """


class Backend(Sizes, Protocol):
    """Compiles and runs graphs, and packs weights, on one device. Packed weights are in `quant/`'s layout on every backend."""

    @property
    def capabilities(self) -> Capabilities: ...

    @property
    def name(self) -> str:
        """`capabilities.name`."""

    @property
    def device(self) -> torch.device: ...

    @property
    def detail(self) -> str:
        """What it runs on, for the report: such as the ISA and the number of threads."""

    @property
    def isa(self) -> str | None:
        """The variant of the instruction set in use, one of `capabilities.isas`; None where there is no choice."""

    @property
    def threads(self) -> int | None:
        """Its worker threads; None where it has none of its own."""

    @property
    def note(self) -> str | None:
        """What the user should know of how it was set up; None: nothing."""

    def compile(
        self, graph: Graph, weights: Mapping[str, PackedWeight | torch.Tensor], options: CompileOptions = DEFAULTS
    ) -> Plan:
        """Binds `graph` to `weights`.

        Args:
            weights: by name: matrices and stacks packed, vectors as 1-D tensors, `graph.least.exact_weights` as either.

        Raises:
            BackendError: a weight is missing or does not fit, or the graph has what this backend does not run.
        """

    def new_store(self, graph: Graph, kv_dtype: str, num_blocks: int) -> KvStore:
        """An empty cache of `num_blocks` blocks. Memory may be taken as blocks are first written."""

    def free_memory(self) -> FreeMemory:
        """What can still be allocated where the cache is: the host's limits, or the device's memory."""

    def thread_context(self) -> AbstractContextManager[None]:
        """To be entered while steps run on the calling thread: keeps torch's own threads out of the backend's way."""

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

    def linear(self, x: torch.Tensor, matrix: PackedMatrix, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x [..., K] @ W.T (+ bias) as float32 [..., N]."""

    def linear_gradient(self, grad: torch.Tensor, matrix: PackedMatrix) -> torch.Tensor:
        """grad [..., N] @ W as float32 [..., K]: the gradient of `linear` in x."""

    @property
    def maps_files(self) -> bool:
        """Whether `map_file` works; otherwise weights are read into memory."""

    def map_file(self, fd: int, size: int, modified_ns: int, path: Path) -> FileMapping:
        """A `checkpoint.files.Mapper`: a file of packed weights mapped into memory.

        Raises:
            CheckpointChangedError, CheckpointError: see `checkpoint.files.Mapper`.
            BackendError: `maps_files` is False.
        """

    def check_tensor(self, tensor: torch.Tensor) -> None:
        """Raises CheckpointChangedError where a tensor is in a mapped file that was changed."""


def check_supported(capabilities: Capabilities, formats: Sequence[str], kv_dtype: str, attention_mode: str) -> None:
    """Raises BackendError where a backend does not run one of these, naming it and what can be asked for instead."""
    asked = (
        *(("weight format", name, capabilities.weight_formats, "precision") for name in formats),
        ("KV cache dtype", kv_dtype, capabilities.kv_dtypes, "kv_cache"),
        ("attention mode", attention_mode, capabilities.attention_modes, "attention_optimization"),
    )
    for what, value, known, field in asked:
        if value not in known:
            raise BackendError(
                f"the {capabilities.name} backend does not support {what} {value!r}; choose {field} among "
                f"{', '.join(known)}, or another backend"
            )
