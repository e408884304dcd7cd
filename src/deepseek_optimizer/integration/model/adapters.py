"""PEFT adapters on packed modules: merging them into the weights, and a float head for trainers that multiply by its weight.

PEFT merges by adding to `weight` in place, which packed tiles do not allow, and offers base layers no hook for it. But each of
its operations first iterates over the model's modules. On an optimized model this iteration sets on every adapter of a packed
base a `merge` and an `unmerge` that dequantize, add and pack again. They are set on the adapter's layer, not on PEFT's classes.
"""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ...errors import UnsupportedRequestError
from ...quant import get_format
from ...quant.overflow import overflow_of
from ..bind.instance_method import InstanceMethod
from ..bind.modules import Packed, PackedEmbedding, PackedLinear
from ..bind.runtime import Runtime

_EXACT = ("fp32", "bf16")  # formats that round a sum no more than float weights do


class ModuleWalk(InstanceMethod):
    """`model.named_modules`, which `modules` and `parameters` use too, of the model or of a model around it.

    A module with a float parameter comes first: some libraries (sentence-transformers) take the model's dtype from the first
    parameter, and tiles are uint8.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
        model = self.runtime.model
        if "peft_config" in model.__dict__:  # set by PEFT as long as there are adapters
            for _, module in nn.Module.named_modules(model):
                if isinstance(module._modules.get("base_layer"), Packed) and hasattr(type(module), "merge"):
                    _set_methods(module, model.__dict__["dso"])
        modules = list(nn.Module.named_modules(model, *args, **kwargs))
        first = next((i for i, (_, module) in enumerate(modules) if _is_float(module)), 0)
        if first > 1:
            modules.insert(1, modules.pop(first))
        return iter(modules)


def _is_float(module: nn.Module) -> bool:
    return any(p is not None and p.is_floating_point() for p in module._parameters.values()) and not isinstance(module, Packed)


def _set_methods(layer: Any, runtime: Runtime) -> None:
    merge = layer.__dict__.get("merge")
    if not (isinstance(merge, _Merge) and merge.layer() is layer):  # in a copied model it belongs to the original's layer
        layer.__dict__.update(merge=_Merge(layer, runtime), unmerge=_Unmerge(layer, runtime))


class _LayerMethod:
    """A method of an adapter's layer. References are weak: the layer owns it."""

    def __init__(self, layer: Any, runtime: Runtime) -> None:
        self.layer, self.runtime = weakref.ref(layer), weakref.ref(runtime)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self

    @torch.no_grad()
    def change(self, adapter: str, sign: int, *, check: bool = False) -> None:
        """Replaces W by W + sign * B A of the adapter, in the same format.

        Raises:
            UnsupportedRequestError: the adapter is of another kind.
            ValueError: with `check`, the sum is not finite in the weight's format; the weights are unchanged.
        """
        layer, runtime = self.layer(), self.runtime()
        assert layer is not None and runtime is not None  # a layer's method is called on a layer, of a model
        base = layer.base_layer
        if not isinstance(base, (PackedLinear, PackedEmbedding)) or not hasattr(layer, "get_delta_weight"):
            raise UnsupportedRequestError(
                f"a {type(layer).__module__}.{type(layer).__name__} cannot be merged into packed weights; merge it into the "
                "float model and convert that"
            )
        if adapter in getattr(layer, "lora_variant", ()) or getattr(layer, "lora_bias", {}).get(adapter):
            raise UnsupportedRequestError(
                f"adapter {adapter!r} is not plain LoRA (it has DoRA or a bias); merge it into the float model and convert that"
            )
        merged = base.dequantized().add_(layer.get_delta_weight(adapter).float(), alpha=sign)
        if check and not merged.isfinite().all():
            raise ValueError(f"the merged weights are not finite; adapter {adapter!r} is probably damaged")
        order = base.packed.order
        tiles = runtime.backend.pack(merged if order is None else order.stored(merged), base.format)
        if check and (problem := overflow_of(merged, tiles, base.format)) is not None:
            raise ValueError(f"the merged matrix {problem}")
        base.weight.data.copy_(tiles)
        runtime.rebind()
        if base.format not in _EXACT:
            runtime.warn_once(
                f"an adapter was merged into weights packed as {base.format} ({get_format(base.format).bits:g} bits per "
                "weight), which rounds the sum again; for a smaller error, merge it into the float model and convert that"
            )


class _Merge(_LayerMethod):
    """PEFT's `LoraLayer.merge`. With `safe_merge`, a sum that is not finite is an error and changes nothing."""

    def __call__(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        from peft.tuners.tuners_utils import check_adapters_to_merge

        layer: Any = self.layer()
        for adapter in check_adapters_to_merge(layer, adapter_names):
            if any(adapter in getattr(layer, name) for name in layer.adapter_layer_names):
                self.change(adapter, 1, check=safe_merge)
                layer.merged_adapters.append(adapter)


class _Unmerge(_LayerMethod):
    """PEFT's `LoraLayer.unmerge`."""

    def __call__(self) -> None:
        layer: Any = self.layer()
        if not layer.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        while layer.merged_adapters:
            self.change(layer.merged_adapters[-1], -1)
            layer.merged_adapters.pop()


class OutputEmbeddings(InstanceMethod):
    """`model.get_output_embeddings`: the head, or a float copy of it if a trainer has replaced the model's forward.

    TRL's trainers set their own forward on the model, which multiplies by `lm_head.weight` and never calls the module.
    """

    def __call__(self) -> Any:
        model = self.runtime.model
        head = type(model).get_output_embeddings(model)
        forward = model.__dict__.get("forward")
        if not isinstance(head, PackedLinear) or isinstance(forward, InstanceMethod) or "peft_config" not in model.__dict__:
            return head
        return _float_head(head)


def _float_head(head: PackedLinear) -> nn.Linear:
    """A frozen torch module with a float copy of the head's weights."""
    with torch.device("meta"):
        linear = nn.Linear(head.in_features, head.out_features, bias=False)
    linear.weight = nn.Parameter(head.dequantized(head.dtype), requires_grad=False)
    linear.bias = copy.copy(head.bias)
    return linear
