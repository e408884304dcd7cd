"""Writes the pruned model as an ordinary Transformers checkpoint: one tensor after the other, none kept."""

from __future__ import annotations

import copy
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING

from ..checkpoint import Checkpoint
from ..checkpoint.layout import Stored
from ..checkpoint.shards import SHARD_BYTES, Shard, plan_shards, write_index, write_shard
from ..errors import CheckpointError, ConfigError
from ..integration.configs import check_config
from .families import EXPERTS, Width, widths_of
from .selection import Selection

_LAYER = re.compile(r"(?P<head>.*\blayers)\.(?P<number>\d+)\.(?P<leaf>.*)")
_EXPERT = re.compile(r"mlp\.experts\.(\d+)\.")
_PER_LAYER = ("layer_types", "no_rope_layers", "mlp_layer_types")  # config fields with an entry for each layer
GENERATION = "generation_config.json"


def pruned_config(config: Any, selection: Selection) -> Any:
    """The config of the pruned model.

    Args:
        config: the original's Transformers config, which stays as it is.
        selection: what stays.

    Raises:
        ConfigError: Transformers or this package would refuse the config, such as a number of heads that does not divide the
            hidden size.
    """
    fields = copy.deepcopy(config).to_dict()
    layers = selection.layers
    for name in _PER_LAYER:
        if isinstance(values := fields.get(name), list):
            fields[name] = [values[i] for i in layers]
    if isinstance(dense := fields.get("first_k_dense_replace"), int):
        fields["first_k_dense_replace"] = sum(i < dense for i in layers)
    if "max_window_layers" in fields:
        fields["max_window_layers"] = sum(i < fields["max_window_layers"] for i in layers)
    if fields.get("num_nextn_predict_layers"):
        fields["num_nextn_predict_layers"] = 0  # they were trained on the original's hidden states
    fields["num_hidden_layers"] = len(layers)
    if fields.get("head_dim") is None and fields.get("kv_lora_rank") is None:  # it would follow from the number of heads
        fields["head_dim"] = fields["hidden_size"] // fields["num_attention_heads"]
    for width in widths_of(config.model_type):
        if kept := selection.kept.get(width.kind):
            units, left = fields[width.units], len(next(iter(kept.values())))
            for name in (width.units, *width.scaled):
                fields[name] = fields[name] * left // units
    try:
        result = CONFIG_MAPPING[config.model_type].from_dict(fields)
    except Exception as error:  # Transformers' checks raise errors of several types
        last = " ".join(str(error).split())
        raise ConfigError(f"Transformers refuses the config of the pruned model: {last}; use another fraction") from error
    check_config(result.to_dict())
    return result


def write_pruned(
    checkpoint: Checkpoint, config: Any, selection: Selection, folder: Path, shard_bytes: int = SHARD_BYTES
) -> None:
    """Writes weights and configs of the pruned model. Multi-token prediction layers are left out.

    Args:
        checkpoint: the original, with float weights.
        config: its Transformers config.
        selection: what stays.
        folder: an existing directory.
        shard_bytes: approximate size of a file.

    Raises:
        CheckpointError: a tensor is damaged, or has a shape that cannot be cut.
        ConfigError: see `pruned_config`.
    """
    smaller = pruned_config(config, selection)
    parts = {part.name: part for part in _parts(checkpoint, config, selection)}
    planned: dict[str, Stored] = {name: part.planned() for name, part in parts.items()}
    shards = plan_shards(planned, shard_bytes)
    for shard in shards:
        with (folder / shard.name).open("wb") as file:
            write_shard(file, shard, _read(shard, parts))
    checkpoint.check_unchanged()
    write_index(folder, shards)
    smaller.save_pretrained(folder)
    if (generation := checkpoint.path / GENERATION).is_file():
        shutil.copyfile(generation, folder / GENERATION)


def _read(shard: Shard, parts: Mapping[str, _Part]) -> Iterator[tuple[str, torch.Tensor]]:
    for name in shard.layout.order:
        yield name, parts[name].read()


class _Part:
    """A tensor of the pruned model. `name`: as it is stored; `cuts`: axis -> number of units, and those that stay."""

    def __init__(
        self, checkpoint: Checkpoint, tensor: str, name: str, cuts: Sequence[tuple[int, int, tuple[int, ...]]]
    ) -> None:
        self._checkpoint, self._tensor, self.name, self._cuts = checkpoint, tensor, name, cuts
        shape = list(checkpoint.shape(tensor))
        for axis, units, kept in cuts:
            if len(shape) <= axis or shape[axis] % units:
                raise CheckpointError(
                    f"has shape {tuple(shape)}, whose axis {axis} is not a multiple of {units}",
                    file=checkpoint.info(tensor).file,
                    tensor=tensor,
                )
            shape[axis] = shape[axis] // units * len(kept)
        self._shape = tuple(shape)

    def planned(self) -> torch.Tensor:
        return torch.empty(self._shape, dtype=self._checkpoint.float_dtype(self._tensor), device="meta")

    def read(self) -> torch.Tensor:
        values = self._checkpoint.read(self._tensor)
        self._checkpoint.check_finite(self._tensor, values)
        for axis, units, kept in self._cuts:
            index = torch.tensor(kept, dtype=torch.int64, device="cpu")
            values = values.unflatten(axis, (units, -1)).index_select(axis, index).flatten(axis, axis + 1)
        return values


def _parts(checkpoint: Checkpoint, config: Any, selection: Selection) -> Iterator[_Part]:
    """The tensors that stay, in the order of the checkpoint."""
    number = {layer: i for i, layer in enumerate(selection.layers)}
    widths = [width for width in widths_of(config.model_type) if width.kind in selection.kept]
    for tensor, info in checkpoint.tensors.items():
        match = _LAYER.fullmatch(tensor)
        if match is None:
            yield _Part(checkpoint, tensor, info.name, ())
            continue
        layer = int(match["number"])
        if layer not in number:
            continue
        name = re.sub(r"(?<=\blayers\.)\d+", str(number[layer]), info.name, count=1)
        expert = _EXPERT.match(match["leaf"])
        if expert is not None and (experts := selection.kept.get(EXPERTS, {}).get(layer)) is not None:
            if int(expert[1]) not in experts:
                continue
            name = re.sub(r"(?<=\.experts\.)\d+", str(experts.index(int(expert[1]))), name, count=1)
        yield _Part(checkpoint, tensor, name, list(_cuts(widths, config, selection, layer, match["leaf"])))


def _cuts(
    widths: Sequence[Width], config: Any, selection: Selection, layer: int, leaf: str
) -> Iterator[tuple[int, int, tuple[int, ...]]]:
    """The cuts of one tensor, given by its name within the layer."""
    for width in widths:
        kept = selection.kept[width.kind].get(layer)
        for pattern, axis in width.cuts.items():
            if kept is not None and re.fullmatch(pattern, leaf):
                yield axis, getattr(config, width.units), kept
