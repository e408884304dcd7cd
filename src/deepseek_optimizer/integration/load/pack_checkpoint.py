"""A packed copy of a checkpoint, made from file to file: no model is ever in memory, only the tensor that is being packed."""

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
from ...calibration.text import read_text
from ...checkpoint import Checkpoint, Manifest, PackedCheckpoint, open_checkpoint
from ...checkpoint.atomic import naming
from ...checkpoint.layout import Stored
from ...checkpoint.manifest import PackedEntry
from ...checkpoint.shards import SHARD_BYTES, Shard, plan_shards, write_index, write_shard
from ...checkpoint.unfinished import Unfinished
from ...config import DeepSeekConfig
from ...errors import ConfigError
from ...graph.least import exact_weights
from ...versions import versions
from ..bind.graphs import whole_graph
from ..bind.swap import expected_tensors
from ..model.save import save_configs
from ..model.wrapper import describe
from .importance import importance_for
from .loader import load, name_source, resolve, show_reading, sketch, weights_for
from .quantizer import mark_quantized


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
    """Writes what `load_model(path, **fields).save_pretrained(out)` would, over several files where it is large.

    Memory: the largest tensor (a layer's experts are one or two) as packed, and a panel of rows. A calibration text needs the
    original in memory besides, once. `out` appears at once, when all is there. A run that was killed is gone on with by the
    next one for the same source and settings: files that are whole are kept (see `Unfinished`).

    Args:
        path, fields: as `load_model` takes them, but for `kl_budget`.
        tokenizer: saved along, if there is one.
        overwrite: replace `out` where it exists.
        shard_bytes: about how large a file becomes; a layer is not split.
        tell: takes lines for the user: what was found of an earlier run, what was rounded twice.

    Raises:
        CheckpointError, ConfigError: as `load_model` does; or `out` exists.
        OSError: the disk is too small, said before the first byte is written.
    """
    out = Path(out)
    with open_checkpoint(resolve(path)) as checkpoint:
        model, settings, dtype = sketch(checkpoint, None, dict(fields))
        packed = checkpoint.manifest if isinstance(checkpoint, PackedCheckpoint) else None
        if settings.kl_budget is not None and packed is None:
            raise ConfigError("kl_budget measures the whole model; load it with load_model and use save_pretrained")
        cast = dtype if settings.precision == "fp32" else None
        planned = _planned(model, checkpoint, cast)
        shards = plan_shards(planned, shard_bytes)
        identity = _identity(checkpoint, settings, shards)
        directory = Unfinished(out, identity, [shard.name for shard in shards], overwrite)
        with directory, _telling_what_stays(directory, tell), naming(out):
            if directory.news:
                tell(directory.news)
            todo = [shard for shard in shards if shard.name not in directory.finished]
            _check_space(out, sum(shard.layout.size for shard in todo))
            for note in _write(model, checkpoint, settings, cast, todo, directory):
                tell(note)
            write_index(directory.folder, shards)
            manifest = Manifest.of(planned, packed.curve if packed is not None else ())
            mark_quantized(model, settings)
            describe(model, settings, manifest)
            name_source(model, checkpoint.path, dtype)
            save_configs(model, dtype, directory.folder, manifest)
            if tokenizer is not None:
                tokenizer.save_pretrained(directory.folder)
            directory.publish()


@contextmanager
def _telling_what_stays(directory: Unfinished, tell: Callable[[str], None]) -> Iterator[None]:
    try:
        yield
    except (OSError, KeyboardInterrupt):
        if directory.finished:
            tell(f"interrupted; the same command goes on where it was ({directory.path})")
        raise


def _write(
    model: Any,
    checkpoint: Checkpoint,
    settings: DeepSeekConfig,
    cast: torch.dtype | None,
    shards: Sequence[Shard],
    directory: Unfinished,
) -> list[str]:
    """Writes these shards; notes for the user."""
    if not shards:
        return []
    backend, note = choose_backend(settings, torch.device("cpu"))
    same_machine = {name: getattr(settings, name) for name in ("threads", "isa", "backend")}
    importance, notes = importance_for(
        checkpoint, settings, expected_tensors(model)[0], lambda: load(checkpoint.path, None, same_machine)
    )
    order = [name for shard in shards for name in shard.layout.order]
    with show_reading(checkpoint, "Converting") as progress:
        weights = weights_for(model, checkpoint, backend.pack, cast, progress, importance, order)
        for shard in shards:
            with directory.file(shard.name) as file:
                write_shard(file, shard, weights)
    checkpoint.check_unchanged()
    notes += [*filter(None, [note]), *checkpoint.remarks()]
    return notes + (checkpoint.conversions() if settings.precision == "auto" else [])


def _planned(model: Any, checkpoint: Checkpoint, cast: torch.dtype | None) -> dict[str, Stored]:
    """What will be written, on the meta device, in the model's order."""
    (formats, shapes), exact = expected_tensors(model), exact_weights(whole_graph(model))
    planned: dict[str, Stored] = {}
    for name, format in formats.items():
        if format is None:
            dtype = torch.float32 if name in exact else cast or checkpoint.float_dtype(name)
            planned[name] = torch.empty(shapes[name], dtype=dtype, device="meta")
        else:
            planned[name] = PackedEntry(format, shapes[name]).promise()
    return planned


def _identity(checkpoint: Checkpoint, settings: DeepSeekConfig, shards: Sequence[Shard]) -> dict[str, Any]:
    """What a packed copy depends on: two runs that agree in this write the same bytes."""
    files = sorted({info.file for info in checkpoint.tensors.values()})
    facts = [(file, os.stat(file)) for file in files]
    layout = hashlib.sha256(b"".join(shard.layout.header for shard in shards))
    text = None if settings.calibration is None else hashlib.sha256(read_text(settings.calibration).encode()).hexdigest()
    return {
        "source": [[file.name, status.st_size, status.st_mtime_ns] for file, status in facts],
        "config": checkpoint.config(),
        "settings": settings.to_dict(),
        "calibration text": text,
        "layout": layout.hexdigest(),
        "version": versions("deepseek-optimizer"),
    }


def _check_space(out: Path, needed: int) -> None:
    """OSError if the disk has less room than the files still to be written take."""
    free = shutil.disk_usage(Path(os.path.abspath(out)).parent).free
    if needed > free:
        raise OSError(
            errno.ENOSPC, f"{needed / 1e9:,.1f} GB are still to be written, but {free / 1e9:,.1f} GB are free", str(out)
        )
