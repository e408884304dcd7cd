"""The weights of a float model that packing would round, and its packed checkpoint, for quantization-aware training."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...checkpoint.manifest import Manifest
from ...checkpoint.packed import write_safetensors
from ...config import DeepSeekConfig
from ...errors import ConfigError
from ...graph.min_formats import exact_weights
from ...quant import PackedStack, PackedWeight
from ...quant.transposed_stack import StackLayout
from ..bind.graphs import whole_graph
from ..bind.modules import Packed
from ..bind.swap import expected_tensors, planned_twins
from ..model.save import save_configs


@dataclass(frozen=True)
class PackableWeight:
    """A parameter that packing replaces.

    Attributes:
        name: its name in the model, tied ones once.
        module, leaf: the module that holds it, and its name there.
        packed: its packed form, without data.
        layout: how a stack of experts is stored, see `quant/transposed_stack.py`.
    """

    name: str
    module: nn.Module
    leaf: str
    packed: PackedWeight
    layout: StackLayout = "rows"

    @property
    def parameter(self) -> nn.Parameter:
        parameter: Any = self.module._parameters[self.leaf]  # looked up again: it may be replaced
        return parameter


def packable_weights(model: Any, config: DeepSeekConfig) -> list[PackableWeight]:
    """The parameters that `DynamicGraphOptimizer(config)` would pack, with their formats.

    Args:
        model: a Transformers model with float weights; they may be on the meta device.
        config: the settings.

    Raises:
        ConfigError: the weights are packed already.
        UnsupportedModelError: the model's family is not supported, or it has modules that cannot be packed.
    """
    if any(isinstance(module, Packed) for module in model.modules()):
        raise ConfigError("quantize needs the original weights, but those of this model are packed; load the original model")
    found: dict[str, PackableWeight] = {}
    for site, twin in planned_twins(model, whole_graph(model), config):
        for leaf, name in site.weights.items():
            found.setdefault(name, PackableWeight(name, site.module, leaf, twin.held()[leaf], twin.layout))
    return list(found.values())


@torch.no_grad()
def write_packed(
    model: Any,
    weights: Sequence[PackableWeight],
    config: DeepSeekConfig,
    tiles: Callable[[PackableWeight], torch.Tensor],
    folder: Path,
) -> None:
    """Writes the packed checkpoint of a float model, as `save_pretrained` of the packed model would; the model stays as it is.

    Args:
        model: the model.
        weights: what to pack, from `packable_weights`.
        config: the settings to store in config.json.
        tiles: packs a weight.
        folder: a directory that exists.
    """
    packable, exact = {weight.name: weight for weight in weights}, exact_weights(whole_graph(model))
    tensors: dict[str, PackedWeight | torch.Tensor] = {}
    for name in expected_tensors(model)[0]:
        path, _, leaf = name.rpartition(".")
        tensor = getattr(model.get_submodule(path), leaf).data
        if name in packable:
            tensors[name] = _filled(packable[name].packed, tiles(packable[name]))
        else:
            tensors[name] = (tensor.float() if name in exact else tensor).contiguous()
    twin = copy.copy(model)  # only its config differs
    twin.config = copy.deepcopy(model.config)
    twin.config.quantization_config = config
    write_safetensors(folder / "model.safetensors", tensors)
    save_configs(twin, model.dtype, folder, Manifest.of(tensors))


def _filled(like: PackedWeight, tiles: torch.Tensor) -> PackedWeight:
    if isinstance(like, PackedStack):
        return PackedStack(like.format, *like.shape, tiles)
    return type(like)(like.format, *like.shape, tiles)
