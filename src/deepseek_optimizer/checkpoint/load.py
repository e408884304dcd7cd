"""Loading: every tensor a model wants, checked first, then one at a time."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch

from ..errors import CheckpointError
from ..quant import PackedMatrix, Packer, get_format, reference_packer
from .base import Checkpoint

# Buffers that old checkpoints carry and models compute themselves.
IGNORED = (r".*\.rotary_emb\.inv_freq", r".*\.self_attn\.(bias|masked_bias)")
_NAMED = 5  # names that an error lists


@dataclass(frozen=True)
class LoadProgress:
    """How far loading is, after each tensor. Bytes are those of the file; `seconds_left` is None until there is a rate."""

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
    importance: Mapping[str, torch.Tensor] | None = None,
) -> Iterator[tuple[str, PackedMatrix | torch.Tensor]]:
    """The wanted tensors in the order of the file: packed matrices, and plain tensors where the format is None.

    Names, shapes and formats are checked before the first tensor is read. Memory beside what is handed out stays at a panel of
    rows. NaN and infinite weights are refused as they are met.

    Args:
        wanted: parameter name -> weight format, or None for a plain float tensor.
        shapes: the shape the model expects of each.
        packer: packs a panel; the native one where it is built.
        progress: called after each tensor.
        ignored: patterns (whole names) of stored tensors that need not be wanted.
        importance: parameter name -> how much an error in each of its columns weighs, as `Packer` has it; some may be absent.

    Raises:
        CheckpointError: a tensor is missing, left over, or of another shape, or holds NaN. It names the tensor.
    """
    check_tensors(checkpoint, wanted, shapes, ignored)
    return _stream(checkpoint, wanted, packer, progress, importance or {})


def check_tensors(
    checkpoint: Checkpoint,
    wanted: Mapping[str, str | None],
    shapes: Mapping[str, tuple[int, ...]],
    ignored: Iterable[str] = IGNORED,
) -> None:
    """The checks of `stream_weights` alone; nothing is read."""
    if missing := [name for name in wanted if name not in checkpoint.tensors]:
        raise CheckpointError(f"lacks {_list(missing)}", file=checkpoint.path, tensor=missing[0])
    skip = re.compile("|".join(f"(?:{p})" for p in ignored) or r"(?!)")
    if unexpected := [name for name in checkpoint.tensors if name not in wanted and not skip.fullmatch(name)]:
        raise CheckpointError(
            f"has {_list(unexpected)}, which the model does not know", file=checkpoint.path, tensor=unexpected[0]
        )
    for name, format in wanted.items():
        if tuple(shapes[name]) != checkpoint.shape(name):
            raise CheckpointError(
                f"has shape {checkpoint.shape(name)}, but the config makes it {tuple(shapes[name])}",
                file=checkpoint.info(name).file,
                tensor=name,
            )
        if format is not None:
            get_format(format)
            checkpoint.matrix_shape(name)


def _stream(
    checkpoint: Checkpoint,
    wanted: Mapping[str, str | None],
    packer: Packer,
    progress: Callable[[LoadProgress], None] | None,
    importance: Mapping[str, torch.Tensor],
) -> Iterator[tuple[str, PackedMatrix | torch.Tensor]]:
    infos = sorted((checkpoint.info(name) for name in wanted), key=lambda i: (str(i.file), i.offset))
    total, done, start = sum(i.nbytes for i in infos), 0, time.monotonic()
    for count, info in enumerate(infos, 1):
        format = wanted[info.name]
        if format is None:
            tensor = checkpoint.read(info.name)
            checkpoint.check_finite(info.name, tensor)
            yield info.name, tensor
            del tensor  # the caller has it; nothing here may keep it alive
        else:
            weighing = partial(packer, importance=importance[info.name]) if info.name in importance else packer
            yield info.name, checkpoint.packed(info.name, format, weighing)
        done += info.nbytes
        if progress is not None:
            progress(LoadProgress(info.name, done, total, count, len(infos), time.monotonic() - start))


def _list(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"{', '.join(names[:_NAMED])}{more}"
