"""Which layers of a model without a plan are packed, and their replacement.

Packed are the `nn.Linear` and `Conv1D` layers of the base model, and the merged experts of mixtures. Everything else stays as
it is: embeddings, heads (see `head.py`), whatever shares a weight with another module, norms, convolutions, and modules that
multiply weights themselves.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ...config import DeepSeekConfig
from ...errors import ConfigError
from ...quant import Packer
from ..bind.modules import Packed
from ..bind.packed_experts import PackedExperts
from ..bind.swap import NATURAL, STACKS, packed_tiles, packed_twin, substitute
from .head import head_name
from .modules import GeneralConv1D, GeneralLinear

# Subclasses whose forward is that of `nn.Linear`, up to rounding. Others may compute something else (routers, heads).
_SAME_FORWARD = ("transformers.models.falcon.modeling_falcon.FalconLinear",)
# What `use_experts_implementation` sets on a module of experts that computes what `PackedExperts` does.
_EXPERTS = {"has_gate": True, "has_bias": False, "is_transposed": False, "is_concatenated": True, "has_post_expert_norm": False}


def packable_layers(model: Any, without: str = "") -> dict[str, Any]:
    """The linear layers and modules of experts to pack, and those already packed, by name; not those under path `without`."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    tied = dict(model.all_tied_weights_keys or {})
    shared = {*tied, *tied.values()}
    base, prefix = model.base_model, str(model.base_model_prefix)
    within = f"{prefix}." if base is not model and getattr(model, prefix, None) is base else ""
    experts = packs_experts(model)
    return {
        name: module
        for name, module in model.named_modules()
        if name.startswith(within)
        and not (without and name.startswith(f"{without}."))
        and module is not head
        and f"{name}.weight" not in shared
        and (_is_linear(module) or (experts and _has_stacks(module)))
    }


def packs_experts(model: Any) -> bool:
    """Whether the model has merged experts, and all of them can be packed."""
    stacks = [module for module in model.modules() if _has_stacks(module)]
    return bool(stacks) and all(map(_is_plain_experts, stacks))


def _is_linear(module: Any) -> bool:
    kind = type(module)
    if isinstance(module, GeneralLinear):
        return True
    if kind not in (nn.Linear, Conv1D) and f"{kind.__module__}.{kind.__qualname__}" not in _SAME_FORWARD:
        return False
    weight = module._parameters.get("weight")
    return weight is not None and weight.dtype in NATURAL and weight.dim() == 2 and weight.numel() > 0


def _has_stacks(module: Any) -> bool:
    return set(STACKS) <= module._parameters.keys()


def _is_plain_experts(module: Any) -> bool:
    if isinstance(module, PackedExperts):
        return True
    if tuple(module._parameters) != STACKS or any(getattr(module, name, value) != value for name, value in _EXPERTS.items()):
        return False
    names = ("num_experts", "hidden_dim", "intermediate_dim", "act_fn")
    gate = getattr(type(module), "_apply_gate", None)
    if not all(hasattr(module, name) for name in names) or getattr(gate, "__module__", "") != "transformers.integrations.moe":
        return False
    count, hidden, inner = module.num_experts, module.hidden_dim, module.intermediate_dim
    return module.gate_up_proj.shape == (count, 2 * inner, hidden) and module.down_proj.shape == (count, hidden, inner)


def _weights(name: str, module: Any) -> dict[str, str]:
    """The packed parameters of a layer: name in the module -> name in settings and manifests."""
    return {leaf: f"{name}.{leaf}" for leaf in STACKS} if _has_stacks(module) else {"weight": name}


def _formats(
    layers: Mapping[str, Any], config: DeepSeekConfig, natural: Mapping[str, str], head: str | None
) -> dict[str, dict[str, str]]:
    """Format of each parameter of each layer. Raises ConfigError if an entry of `config.formats` names none of them."""
    names = [entry for name, module in layers.items() for entry in _weights(name, module).values()]
    names += [] if head is None else [head]
    for entry in config.unmatched(names):
        near = difflib.get_close_matches(entry, names, n=1, cutoff=0.3)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"formats names {entry!r}, which is not a linear layer that the general path packs{hint}")
    return {
        name: {leaf: config.format_of(entry, natural[name]) for leaf, entry in _weights(name, module).items()}
        for name, module in layers.items()
    }


def _twin(module: Any, formats: Mapping[str, str], dtype: torch.dtype) -> Any:
    """An empty packed layer on the meta device that can replace `module`; it shares the bias."""
    if _has_stacks(module):
        return packed_twin(module, formats, dtype)
    cols, rows = (module.nx, module.nf) if isinstance(module, Conv1D) else (module.in_features, module.out_features)
    kind = GeneralConv1D if isinstance(module, Conv1D) else GeneralLinear
    twin = kind(cols, rows, formats["weight"], dtype=dtype, device="meta")
    twin.bias = module.bias
    return twin


def swap_on_meta(
    model: Any, config: DeepSeekConfig, dtype: torch.dtype, packed: Mapping[str, str] | None = None, without: str = ""
) -> None:
    """Replaces layers by empty packed ones before weights are loaded.

    Args:
        model: on the meta device.
        config: the settings.
        dtype: of the model's other parameters. Layers that Transformers keeps in float32 beside fp16 or bf16 ones have float32.
        packed: formats in a packed checkpoint, by module name; they override the config's, and other layers stay as they are.
        without: path of a module whose layers stay as they are.

    Raises:
        ConfigError: `config.formats` names something that is not packed.
    """
    layers = packable_layers(model, without)
    in_fp32 = model._get_dtype_plan(dtype)
    dtypes = {name: torch.float32 if any(f".{part}." in f".{name}." for part in in_fp32) else dtype for name in layers}
    formats = _formats(layers, config, {name: NATURAL[own] for name, own in dtypes.items()}, head_name(model))
    for name, module in layers.items():
        own = formats[name]
        if packed is not None:
            own = {leaf: packed[entry] for leaf, entry in _weights(name, module).items() if entry in packed}
        if own:
            substitute(model, module, _twin(module, own, dtypes[name]))


def pack_in_place(model: Any, config: DeepSeekConfig, packer: Packer, without: str = "") -> None:
    """Packs the layers of a loaded model one by one; the memory of each is freed before the next is packed. Layers packed
    before stay as they are, and so do those under path `without`.

    Raises:
        ConfigError: as in `swap_on_meta`.
    """
    layers = packable_layers(model, without)
    natural = {name: NATURAL.get(next(module.parameters()).dtype, "") for name, module in layers.items()}
    formats = _formats(layers, config, natural, head_name(model))
    for name in list(layers):
        module = layers.pop(name)
        if isinstance(module, Packed):
            continue
        twin = _twin(module, formats[name], next(module.parameters()).dtype)
        for leaf, like in twin.held().items():
            weight = getattr(module, leaf).data
            tiles = packed_tiles(f"{name}.{leaf}", weight if twin.layout == "rows" else weight.t(), like, packer)
            twin._parameters[leaf] = nn.Parameter(tiles, requires_grad=False)
            del module._parameters[leaf]  # frees the weight even if something still refers to the module
        substitute(model, module, twin)
