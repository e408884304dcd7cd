"""Writes a packed copy of a checkpoint, file to file: only the tensor being packed is in memory, never the whole model."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ...backends.registry import choose_backend
from ...checkpoint import Checkpoint, Manifest, PackedCheckpoint
from ...checkpoint.atomic import naming
from ...checkpoint.layout import Stored
from ...checkpoint.manifest import VERSION
from ...checkpoint.sentence_transformers import copy_embedding_files
from ...checkpoint.shards import SHARD_BYTES, Shard, plan_shards, write_index, write_shard
from ...checkpoint.unfinished import Unfinished
from ...config import DeepSeekConfig
from ...errors import ConfigError, UnsupportedModelError
from ...versions import versions
from ..bind.swap import expected_tensors, stored_tensors
from ..model.save import save_configs
from .calibrate import Calibration, calibrate, calibration_for, without_rounding
from .loader import load, name_source, open_to_load, plain_dtypes, show_reading, sketch, weights_for
from .quantizer import mark_quantized

_PIECE_BYTES = 64 << 20  # of a stack of experts; a layer of DeepSeek-V4-Flash has stacks of 2.3 GB


def pack_checkpoint(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    fields: Mapping[str, Any],
    *,
    tokenizer: Any = None,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
    tell: Callable[[str], None] = lambda line: None,
) -> None:
    """Writes the checkpoint that `load_model(path, **fields).save_pretrained(out)` would write, split into shards if large.

    Memory: the largest packed matrix, or some experts of a layer if they are larger, and a panel of rows; with calibration the
    original model, which is rounded in memory. `out` appears in one step when it is complete. After an interruption, the next
    run with the same source and settings resumes: complete files are reused (see `Unfinished`).

    Args:
        path, fields: as in `load_model`, without `kl_budget`.
        out: the directory to write.
        tokenizer: saved with the model, if given.
        overwrite: replace `out` if it exists.
        shard_bytes: approximate size of a file; layers are not split.
        tell: called with lines for the user, such as what an earlier run left and which weights were rounded twice.

    Raises:
        CheckpointError, ConfigError: as in `load_model`; or `out` exists.
        OSError: the disk has too little free space; raised before anything is written.
    """
    out = Path(out)
    with open_to_load(path, None, dict(fields)) as (checkpoint, no_plan):
        if no_plan is not None:
            raise UnsupportedModelError(f"{no_plan}; use load_model(...) and save_pretrained instead")
        model, settings, dtype = sketch(checkpoint, None, dict(fields))
        packed = checkpoint.manifest if isinstance(checkpoint, PackedCheckpoint) else None
        if settings.kl_budget is not None and packed is None:
            raise ConfigError("kl_budget needs the whole model in memory; use load_model(...) and save_pretrained instead")
        calibration, notes = calibration_for(
            checkpoint, settings, *expected_tensors(model), model.config.max_position_embeddings
        )
        planned = _planned(model, checkpoint)
        shards = plan_shards(planned, shard_bytes)
        identity = _identity(checkpoint, settings, shards, calibration)
        directory = Unfinished(out, identity, [shard.name for shard in shards], overwrite)
        with directory, _telling_of_resumption(directory, tell), naming(out):
            if directory.news:
                tell(directory.news)
            todo = [shard for shard in shards if shard.name not in directory.finished]
            _check_space(out, sum(shard.layout.size for shard in todo))
            if calibration is None:
                notes += _write(model, checkpoint, settings, todo, directory)
                rounding = packed.rounding if packed is not None else {}
            else:
                rounding = _write_calibrated(checkpoint, settings, calibration, todo, directory)
            for note in notes:
                tell(note)
            write_index(directory.folder, shards)
            manifest = Manifest.of(planned, packed.curve if packed is not None else (), rounding)
            mark_quantized(model, settings)
            name_source(model, checkpoint, dtype)
            save_configs(model, dtype, directory.folder, manifest)
            if tokenizer is not None:
                tokenizer.save_pretrained(directory.folder)
            copy_embedding_files(checkpoint.path, directory.folder)
            directory.publish()


@contextmanager
def _telling_of_resumption(directory: Unfinished, tell: Callable[[str], None]) -> Iterator[None]:
    try:
        yield
    except (OSError, KeyboardInterrupt):
        if directory.finished:
            tell(f"interrupted; run the same command again to resume ({directory.path})")
        raise


def _write(
    model: Any,
    checkpoint: Checkpoint,
    settings: DeepSeekConfig,
    shards: Sequence[Shard],
    directory: Unfinished,
) -> list[str]:
    """Writes the given shards; returns notes for the user."""
    if not shards:
        return []
    backend, note = choose_backend(settings, torch.device("cpu"))
    order = [name for shard in shards for name in shard.layout.order]
    with show_reading(checkpoint, "Converting") as progress:
        weights = weights_for(model, checkpoint, backend.pack, progress, order, _PIECE_BYTES)
        for shard in shards:
            with directory.file(shard.name) as file:
                write_shard(file, shard, weights)
    checkpoint.check_unchanged()
    notes = [*filter(None, [note]), *checkpoint.remarks()]
    return notes + (checkpoint.conversions() if settings.precision == "auto" else [])


def _write_calibrated(
    checkpoint: Checkpoint, settings: DeepSeekConfig, calibration: Calibration, shards: Sequence[Shard], directory: Unfinished
) -> Mapping[str, Any]:
    """Writes the given shards of the model rounded with calibration, which is in memory meanwhile; returns its
    `Manifest.rounding`."""
    model = load(checkpoint.path, None, without_rounding(settings), language_alone="it is calibrated")
    calibrate(model, settings, calibration)
    tensors = stored_tensors(model)
    for shard in shards:
        with directory.file(shard.name) as file:
            write_shard(file, shard, ((name, tensors[name]) for name in shard.layout.order))
    rounding: Mapping[str, Any] = model.dso.manifest.rounding
    return rounding


def _planned(model: Any, checkpoint: Checkpoint) -> dict[str, Stored]:
    """The tensors to write, on the meta device, in the model's order."""
    planned, dtypes = stored_tensors(model), plain_dtypes(model, checkpoint)
    for name, tensor in planned.items():
        if isinstance(tensor, torch.Tensor):
            own = checkpoint.float_dtype(name)
            dtype = dtypes.get(name, own) if own.is_floating_point else own
            planned[name] = torch.empty(tensor.shape, dtype=dtype, device="meta")
    return planned


def _identity(
    checkpoint: Checkpoint, settings: DeepSeekConfig, shards: Sequence[Shard], calibration: Calibration | None
) -> dict[str, Any]:
    """Everything that the packed copy depends on: runs with equal identities write the same bytes."""
    files = sorted({info.file for info in checkpoint.tensors.values()})
    facts = [(file, os.stat(file)) for file in files]
    layout = hashlib.sha256(b"".join(shard.layout.header for shard in shards))
    text = hashlib.sha256(repr([text.tolist() for text in calibration.texts] if calibration else None).encode()).hexdigest()
    return {
        "source": [[file.name, status.st_size, status.st_mtime_ns] for file, status in facts],
        "config": checkpoint.config(),
        "quantization": checkpoint.quantization,
        "settings": settings.to_dict(),
        "calibration text": text,
        "layout": layout.hexdigest(),
        "layout version": VERSION,  # tiles of the same size may hold their codes in another order
        "version": versions("deepseek-optimizer"),
    }


def _check_space(out: Path, needed: int) -> None:
    """OSError if the disk has less free space than the remaining files need."""
    free = shutil.disk_usage(Path(os.path.abspath(out)).parent).free
    if needed > free:
        raise OSError(
            errno.ENOSPC, f"{needed / 1e9:,.1f} GB remain to be written, but only {free / 1e9:,.1f} GB are free", str(out)
        )
