"""Loading the tensors of a model: all are checked first, then read one at a time."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch

from ..errors import CheckpointError
from ..quant import PackedWeight, Packer, get_format, reference_packer
from ..quant.parts import Span, part_of
from .base import Checkpoint
from .stacks import surplus_expert

# Buffers that old checkpoints carry and models compute themselves.
IGNORED = (r".*\.rotary_emb\.inv_freq", r".*\.self_attn\.(bias|masked_bias)")
_NAMED = 5  # names listed in an error
Part = tuple[Span | None, Span | None, Span | None]  # rows and columns of each matrix; experts of a stack
NO_PARTS: Mapping[str, Part] = MappingProxyType({})


@dataclass(frozen=True)
class LoadProgress:
    """Progress of loading, reported after each tensor. Bytes are counted in the file; `seconds_left` is None until known."""

    tensor: str
    done_bytes: int
    total_bytes: int
    done_tensors: int
    total_tensors: int
    seconds: float

    @property
    def seconds_left(self) -> float | None:
        if self.done_bytes == 0 or self.seconds <= 0:
            return None
        return self.seconds * (self.total_bytes - self.done_bytes) / self.done_bytes


def stream_weights(
    checkpoint: Checkpoint,
    wanted: Mapping[str, str | None],
    shapes: Mapping[str, tuple[int, ...]],
    packer: Packer = reference_packer,
    progress: Callable[[LoadProgress], None] | None = None,
    ignored: Iterable[str] = IGNORED,
    order: Sequence[str] | None = None,
    piece_bytes: int | None = None,
    parts: Mapping[str, Part] = NO_PARTS,
) -> Iterator[tuple[str, PackedWeight | torch.Tensor]]:
    """Yields the wanted tensors in file order: packed matrices and stacks, and plain tensors where the format is None.

    Names, shapes and formats are checked before the first tensor is read. Besides the yielded tensor, a panel of rows is the
    only memory needed. NaN and infinite weights are refused when they are read.

    Args:
        wanted: parameter name -> weight format, or None for a plain float tensor.
        shapes: the shape that the model expects of each; for a stack count, rows and cols.
        packer: packs a panel; the native one if it is built.
        progress: called after each tensor.
        ignored: patterns (full match) of stored tensor names that may be absent from `wanted`.
        order: names of the tensors to yield, in this order; None: all, in file order.
        piece_bytes: stacks are yielded in pieces of whole experts, one after the other under the same name, each of about this
            size at most; None: whole.
        parts: by name, the rows and columns of matrices, the experts of stacks, or the elements of vectors, to yield instead
            of the whole; None: all of them.

    Raises:
        CheckpointError: a tensor is missing, unexpected, has another shape, or contains NaN. The error names it.
    """
    check_tensors(checkpoint, wanted, shapes, ignored)
    if order is None:
        order = sorted(wanted, key=lambda name: _place(checkpoint, name, shapes[name]))
    return _stream(checkpoint, {name: wanted[name] for name in order}, shapes, packer, progress, piece_bytes, parts)


def check_tensors(
    checkpoint: Checkpoint,
    wanted: Mapping[str, str | None],
    shapes: Mapping[str, tuple[int, ...]],
    ignored: Iterable[str] = IGNORED,
) -> None:
    """Performs the checks of `stream_weights` without reading tensors."""
    needed = {name: checkpoint.stored(name, tuple(shapes[name])) for name in wanted}
    expected = {tensor for stored in needed.values() for tensor in stored}
    if missing := [tensor for stored in needed.values() for tensor in stored if tensor not in checkpoint.tensors]:
        raise CheckpointError(
            f"lacks {_list(missing)}; download it again, or check that config.json belongs to this model",
            file=checkpoint.path,
            tensor=missing[0],
        )
    skip = re.compile("|".join(f"(?:{p})" for p in ignored) or r"(?!)")
    for name in checkpoint.tensors:
        if name not in expected and (why := surplus_expert(name, shapes)):
            raise CheckpointError(why, file=checkpoint.info(name).file, tensor=name)
    surplus = (name for name in checkpoint.tensors if name not in expected and not skip.fullmatch(name))
    if unexpected := [name for name in surplus if not checkpoint.ignores(name)]:
        raise CheckpointError(
            f"contains {_list(unexpected)}, which the model does not have", file=checkpoint.path, tensor=unexpected[0]
        )
    for name, format in wanted.items():
        for tensor, shape in needed[name].items():
            if shape != checkpoint.shape(tensor):
                raise CheckpointError(
                    f"has shape {checkpoint.shape(tensor)}, but the config requires {shape}",
                    file=checkpoint.info(tensor).file,
                    tensor=tensor,
                )
            checkpoint.check_dtype(tensor)
        if format is not None:
            get_format(format)
            if len(shapes[name]) != 3:
                checkpoint.matrix_shape(name)


def _stream(
    checkpoint: Checkpoint,
    wanted: Mapping[str, str | None],
    shapes: Mapping[str, tuple[int, ...]],
    packer: Packer,
    progress: Callable[[LoadProgress], None] | None,
    piece_bytes: int | None,
    parts: Mapping[str, Part],
) -> Iterator[tuple[str, PackedWeight | torch.Tensor]]:
    sizes = {name: sum(checkpoint.info(t).nbytes for t in checkpoint.stored(name, tuple(shapes[name]))) for name in wanted}
    total, done, start = sum(sizes.values()), 0, time.monotonic()
    for count, name in enumerate(wanted, 1):
        format = wanted[name]
        if format is None:
            tensor = checkpoint.read(name)
            checkpoint.check_finite(name, tensor)
            yield name, tensor if name not in parts else part_of(tensor, *parts[name][:2])
            del tensor  # only the caller may keep it alive
        else:
            shape: Any = tuple(shapes[name])
            if name in parts and len(shape) == 3:
                rows, cols, experts = parts[name]
                yield name, checkpoint.packed_stack_part(name, format, shape, experts, rows, cols, packer)
            elif name in parts:
                yield name, checkpoint.packed_part(name, format, *parts[name][:2], packer)
            elif len(shape) != 3:
                yield name, checkpoint.packed(name, format, packer)
            elif piece_bytes is None:
                yield name, checkpoint.packed_stack(name, format, shape, packer)
            else:
                for piece in checkpoint.stack_pieces(name, format, shape, packer, piece_bytes):
                    yield name, piece
                    del piece  # only the caller may keep it alive
        done += sizes[name]
        if progress is not None:
            progress(LoadProgress(name, done, total, count, len(wanted), time.monotonic() - start))


def _place(checkpoint: Checkpoint, name: str, shape: tuple[int, ...]) -> tuple[str, int]:
    """File and offset of the first of a parameter's tensors."""
    infos = (checkpoint.info(tensor) for tensor in checkpoint.stored(name, tuple(shape)))
    return min((str(info.file), info.offset) for info in infos)


def _list(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"{', '.join(names[:_NAMED])}{more}"
