"""The forwards of modules with the layers of a vision tower: the plans if they can serve a call, otherwise Transformers' own
over packed layers. What is before and after the layers is that of Transformers."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPooling

from ...errors import ConfigError, UnsupportedModelError
from ...models import TOWERS, build_tower
from ..bind.instance_method import PLANNED, Replacement
from ..compat import class_output, outputs_are_captured
from .tower import Patches, TowerPlans


class TowerForward(Replacement):
    """A forward that runs the plans.

    Args:
        runtime: the `TowerPlans`.
    """

    runtime: Any  # a TowerPlans
    replaces = "forward"
    runs_plan = True
    served: frozenset[str]  # the arguments that the plans know

    @torch.compiler.disable(reason=PLANNED)
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        plans: TowerPlans = self.runtime
        call = self.named(args, kwargs)
        reason = self._unserved(call) or plans.why_not()
        if reason is None:
            with torch.no_grad(), plans.runtime.backend.thread_context():
                return self._planned(plans.model, plans, call)
        if plans.runtime is not None:
            plans.runtime.warn_once(f"{reason}: the vision tower runs Transformers' own forward, which is slower")
        return self._original(plans.model, **call)

    def _unserved(self, call: dict[str, Any]) -> str | None:
        """Why the plans cannot serve a call with these arguments; None if they can."""
        for name, value in call.items():
            if name not in self.served and value is not None and value is not False:
                return f"argument {name!r} is given"
        if torch.is_grad_enabled() and any(torch.is_tensor(value) and value.requires_grad for value in call.values()):
            return "gradients are needed"
        config = self.runtime.model.config
        if outputs_are_captured() or config.output_hidden_states or config.output_attentions:
            return "hidden states or attentions of the vision tower are requested"
        return None

    def _planned(self, module: Any, plans: TowerPlans, call: dict[str, Any]) -> Any:
        raise NotImplementedError


class EncoderLayers(TowerForward):
    """SigLIP's encoder: rows of pictures of one size, without windows."""

    served = frozenset({"inputs_embeds", "attention_mask"})

    def _unserved(self, call: dict[str, Any]) -> str | None:
        mask = call.get("attention_mask")
        if mask is not None and not bool((mask if mask.dtype is torch.bool else mask == 0).all()):
            return "pictures are padded"
        return super()._unserved(call)

    def _planned(self, module: Any, plans: TowerPlans, call: dict[str, Any]) -> Any:
        x = call["inputs_embeds"]
        count, rows, width = x.shape
        results = plans.run(x.reshape(-1, width), Patches([rows] * count, []))
        return BaseModelOutput(last_hidden_state=results[len(plans.tower.windowed) - 1].view_as(x))


class QwenTower(TowerForward):
    """The towers of Qwen: pictures of any sizes, one after the other; four patches become one token."""

    served = frozenset({"hidden_states", "grid_thw", "return_dict"})

    def _unserved(self, call: dict[str, Any]) -> str | None:
        if call.get("return_dict") is False:
            return "a tuple is requested"
        return super()._unserved(call)

    def _planned(self, module: Any, plans: TowerPlans, call: dict[str, Any]) -> Any:
        from transformers.vision_utils import get_vision_attention_seqlens, get_vision_position_ids, get_vision_window_index

        grid, config = call["grid_thw"], module.config
        x = self._embedded(module, plans, call["hidden_states"], grid)
        positions = get_vision_position_ids(grid, module.spatial_merge_size)
        order, windows = None, []
        if any(plans.tower.windowed):
            index, ends = get_vision_window_index(grid, module.spatial_merge_size, module.window_size, module.patch_size)
            order = _rows_of(index.to(x.device), module.spatial_merge_unit)
            x, positions, windows = x[order], positions.to(order.device)[order], ends.diff().tolist()
        axes = np.zeros((len(x), 3), np.int32)
        axes[:, 1:] = positions.cpu().numpy()
        pictures = get_vision_attention_seqlens(grid, config)[0].diff().tolist()
        results = plans.run(x, Patches(pictures, windows, axes))
        last = results[len(plans.tower.windowed) - 1]
        merged = plans.in_pieces(module.merger, last)
        if order is not None:
            merged = merged[torch.argsort(index.to(merged.device))]
        kept = plans.tower.ends
        features = [
            plans.in_pieces(module.deepstack_merger_list[kept.index(layer)], results[layer])
            for layer in sorted(results)
            if layer in kept
        ]
        if kept:
            own_class: Any = type(module)
            return class_output(own_class)(last_hidden_state=last, pooler_output=merged, deepstack_features=features)
        return BaseModelOutputWithPooling(last_hidden_state=last, pooler_output=merged)

    @staticmethod
    def _embedded(module: Any, plans: TowerPlans, pixels: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
        """The embeddings of the patches. The convolution's stride is its size, so it is a product, which is faster."""
        proj = module.patch_embed.proj
        weight = proj.weight.flatten(1)
        pixels = pixels.view(-1, weight.shape[1]).to(weight.dtype)
        x = plans.in_pieces(lambda rows: F.linear(rows, weight, proj.bias), pixels)
        if not hasattr(module, "pos_embed"):
            return x
        from transformers.vision_utils import get_vision_interpolation_indices_and_weights

        indices, weights = get_vision_interpolation_indices_and_weights(
            grid, num_grid_per_side=module.num_grid_per_side, mode=module.interpolation_mode,
            align_corners=module.interpolation_align_corners, spatial_merge_size=module.config.spatial_merge_size,
        )  # fmt: skip
        return x + (module.pos_embed(indices) * weights[:, :, None]).sum(1).to(x.dtype)


def _rows_of(order: torch.Tensor, unit: int) -> torch.Tensor:
    """The order of rows, given that of groups of `unit` rows."""
    return (order[:, None] * unit + torch.arange(unit, dtype=order.dtype, device=order.device)).flatten()


def plan_towers(runtime: Any, model: Any) -> tuple[dict[str, TowerPlans], dict[str, str]]:
    """Sets the forwards of all vision towers that have plans.

    Args:
        runtime: the `MultimodalRuntime`.
        model: the whole model.

    Returns: by the tower's path in the model the plans, and for the others of a known kind why there are none.
    """
    plans: dict[str, TowerPlans] = {}
    reasons: dict[str, str] = {}
    for path, module in model.named_modules():
        kind = getattr(getattr(module, "config", None), "model_type", None)
        if kind not in TOWERS or not isinstance(module, PreTrainedModel):
            continue
        form = QwenTower if hasattr(module, "blocks") else EncoderLayers
        layers: Any = module if form is QwenTower else module.encoder
        try:
            with torch.device("cpu"):
                tower = build_tower(module.config)
        except (UnsupportedModelError, ConfigError) as error:
            reasons[path] = str(error)
            continue
        plans[path] = own = TowerPlans(runtime, layers, tower)
        layers.__dict__["forward"] = form(own)
    return plans, reasons
