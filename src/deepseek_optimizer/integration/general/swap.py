"""Which layers of a model without a plan are packed, and their replacement.

Packed are the `nn.Linear` and `Conv1D` layers of the base model. Everything else stays as it is: embeddings, heads and whatever
shares a weight with another module, norms, convolutions, and modules with products of their own.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ...config import DeepSeekConfig
from ...errors import ConfigError
from ...quant import Packer
from ..bind.modules import Packed
from ..bind.swap import NATURAL
from .modules import GeneralConv1D, GeneralLinear

# Subclasses whose forward is that of `nn.Linear`, up to rounding. Others may compute something else (routers, heads).
_SAME_FORWARD = ("transformers.models.falcon.modeling_falcon.FalconLinear",)


def linear_layers(model: Any) -> dict[str, Any]:
    """The layers to pack, and those already packed, by name."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    tied = dict(model.all_tied_weights_keys or {})
    shared = {*tied, *tied.values()}
    base, prefix = model.base_model, str(model.base_model_prefix)
    within = f"{prefix}." if base is not model and getattr(model, prefix, None) is base else ""
    return {
        name: module
        for name, module in model.named_modules()
        if name.startswith(within) and module is not head and f"{name}.weight" not in shared and _packable(module)
    }


def _packable(module: Any) -> bool:
    if isinstance(module, GeneralLinear):
        return True
    kind = type(module)
    if kind not in (nn.Linear, Conv1D) and f"{kind.__module__}.{kind.__qualname__}" not in _SAME_FORWARD:
        return False
    weight = module._parameters.get("weight")
    return weight is not None and weight.dtype in NATURAL and weight.dim() == 2 and weight.numel() > 0


def check_formats(layers: Mapping[str, Any], config: DeepSeekConfig) -> None:
    """Raises ConfigError if an entry of `config.formats` names none of the layers."""
    for entry in config.unmatched(layers):
        near = difflib.get_close_matches(entry, layers, n=1, cutoff=0.3)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"formats names {entry!r}, which is not a linear layer that the general path packs{hint}")


def _twin(module: Any, format: str, dtype: torch.dtype) -> GeneralLinear:
    """An empty packed layer on the meta device that can replace `module`; it shares the bias."""
    cols, rows = (module.nx, module.nf) if isinstance(module, Conv1D) else (module.in_features, module.out_features)
    kind = GeneralConv1D if isinstance(module, Conv1D) else GeneralLinear
    twin = kind(cols, rows, format, dtype=dtype, device="meta")
    twin.bias = module.bias
    twin.training = module.training
    return twin


def _substitute(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Replaces a module wherever the model refers to it: some share one among several parents."""
    for parent in list(model.modules()):
        for child, module in list(parent._modules.items()):
            if module is old:
                setattr(parent, child, new)


def _formats(layers: Mapping[str, Any], config: DeepSeekConfig, natural: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    for name in layers:
        yield name, config.format_of(f"{name}.weight", natural[name])


def swap_on_meta(model: Any, config: DeepSeekConfig, dtype: torch.dtype, packed: Mapping[str, str] | None = None) -> None:
    """Replaces layers by empty packed ones before weights are loaded.

    Args:
        model: on the meta device.
        config: the settings.
        dtype: of the model's other parameters. Layers that Transformers keeps in float32 beside fp16 or bf16 ones have float32.
        packed: formats in a packed checkpoint, by module name; they override the config's, and other layers stay as they are.

    Raises:
        ConfigError: `config.formats` names something that is not packed.
    """
    layers = linear_layers(model)
    check_formats(layers, config)
    if packed is not None:
        layers = {name: module for name, module in layers.items() if name in packed}
    in_fp32 = model._get_dtype_plan(dtype)
    dtypes = {name: torch.float32 if any(f".{part}." in f".{name}." for part in in_fp32) else dtype for name in layers}
    formats = packed or dict(_formats(layers, config, {name: NATURAL[own] for name, own in dtypes.items()}))
    for name, module in layers.items():
        _substitute(model, module, _twin(module, formats[name], dtypes[name]))


def pack_in_place(model: Any, config: DeepSeekConfig, packer: Packer) -> None:
    """Packs the layers of a loaded model one by one; the memory of each is freed before the next is packed. Layers packed
    before stay as they are.

    Raises:
        ConfigError: as in `swap_on_meta`.
    """
    layers = linear_layers(model)
    check_formats(layers, config)
    layers = {name: module for name, module in layers.items() if not isinstance(module, Packed)}
    formats = dict(_formats(layers, config, {name: NATURAL[module.weight.dtype] for name, module in layers.items()}))
    for name in list(layers):
        module = layers.pop(name)
        twin = _twin(module, formats[name], module.weight.dtype)
        weight = module.weight.data
        twin._parameters["weight"] = nn.Parameter(
            packer(weight.t() if twin.transposed else weight, twin.format), requires_grad=False
        )
        _substitute(model, module, twin)
        module._parameters.clear()  # frees the weight even if something still refers to the module
