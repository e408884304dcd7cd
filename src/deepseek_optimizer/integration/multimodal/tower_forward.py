"""The forwards of modules with the layers of a vision tower: the plans if they can serve a call, otherwise Transformers' own
over packed layers. What is before and after the layers is that of Transformers."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPast, BaseModelOutputWithPooling

from ...errors import ConfigError, UnsupportedModelError
from ...models import TOWERS, build_tower
from ..bind.instance_method import PLANNED, Replacement
from ..compat import class_output, outputs_are_captured
from .tower import PaddedWindows, Patches, TowerPlans


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
    """SigLIP's encoder: rows of pictures of one size, without windows. Padding is encoded too, but nothing attends to it."""

    served = frozenset({"inputs_embeds", "attention_mask"})

    def _unserved(self, call: dict[str, Any]) -> str | None:
        mask = call.get("attention_mask")
        if mask is not None:
            batch, rows, _ = call["inputs_embeds"].shape
            if mask.dim() != 4 or mask.shape[0] != batch or mask.shape[3] != rows or not bool((mask == mask[:, :1, :1]).all()):
                return "the attention mask is not one of padding"
            if not bool(_kept(mask).any(1).all()):
                return "a picture is nothing but padding"
        return super()._unserved(call)

    def _planned(self, module: Any, plans: TowerPlans, call: dict[str, Any]) -> Any:
        x, mask = call["inputs_embeds"], call.get("attention_mask")
        count, rows, width = x.shape
        last = len(plans.tower.windowed) - 1
        if mask is None or bool((kept := _kept(mask)).all()):
            results = plans.run(x.reshape(-1, width), Patches([rows] * count, []))
            return BaseModelOutput(last_hidden_state=results[last].view_as(x))
        order = torch.argsort(~kept, dim=1, stable=True)[..., None].expand_as(x)  # padding after the rest
        sees = kept.sum(1).repeat_interleave(rows).cpu().numpy().astype(np.int32)
        results = plans.run(x.gather(1, order).view(-1, width), Patches([rows] * count, [], sees=sees))
        return BaseModelOutput(last_hidden_state=torch.empty_like(x).scatter_(1, order, results[last].view_as(x)))


class Gemma4Layers(TowerForward):
    """Gemma 4's encoder: pictures of any shapes, padded to the same number of rows. Padding is not encoded: what follows
    discards it."""

    served = frozenset({"inputs_embeds", "attention_mask", "pixel_position_ids"})

    def _unserved(self, call: dict[str, Any]) -> str | None:
        mask = call.get("attention_mask")
        if call.get("pixel_position_ids") is None or mask is None or mask.dim() != 2:
            return "places of patches, or a mask of them, are missing"
        return super()._unserved(call)

    def _planned(self, module: Any, plans: TowerPlans, call: dict[str, Any]) -> Any:
        x, kept = call["inputs_embeds"], call["attention_mask"].bool()
        axes = np.zeros((int(kept.sum()), 3), np.int32)
        axes[:, 2:0:-1] = call["pixel_position_ids"][kept].cpu().numpy()  # (x, y)
        results = plans.run(x[kept], Patches([rows for rows in kept.sum(1).tolist() if rows], [], axes))
        made = torch.zeros_like(x)
        made[kept] = results[len(plans.tower.windowed) - 1]
        return BaseModelOutputWithPast(last_hidden_state=made)


class QueryEncoder(TowerForward):
    """DeepSeek-OCR-2's second encoder: the features of a picture, which see each other, then queries."""

    served = frozenset({"inputs_embeds", "num_patches", "position_ids", "return_dict"})

    def _unserved(self, call: dict[str, Any]) -> str | None:
        if call.get("return_dict") is False:
            return "a tuple is requested"
        return super()._unserved(call)

    def _planned(self, module: Any, plans: TowerPlans, call: dict[str, Any]) -> Any:
        x, positions = call["inputs_embeds"], call.get("position_ids")
        count, rows, width = x.shape
        if positions is None:
            positions = torch.arange(rows, dtype=torch.int64, device="cpu")
        places = positions.expand(count, rows).cpu()
        sees = np.maximum(np.arange(1, rows + 1), call["num_patches"]).astype(np.int32)
        patches = Patches(
            [rows] * count, [], positions=places.numpy().astype(np.int32).ravel(), sees=np.tile(sees, count)
        )  # fmt: skip
        results = plans.run(x.reshape(-1, width), patches)
        return BaseModelOutputWithPast(last_hidden_state=results[len(plans.tower.windowed) - 1].view_as(x))


class SamTower(TowerForward):
    """SAM's towers: pictures of one size, whose windows are filled up with padding. Convolutions are Transformers'."""

    served = frozenset({"pixel_values", "output_hidden_states", "return_dict"})

    def _unserved(self, call: dict[str, Any]) -> str | None:
        if call.get("return_dict") is False:
            return "a tuple is requested"
        pixels, module, plans = call.get("pixel_values"), self.runtime.model, self.runtime
        if pixels is None or pixels.dim() != 4:
            return "pixel_values is not a tensor of 4 axes"
        if (wanted := _hidden_states(call, module)) is None or not wanted <= {layer + 1 for layer in plans.tower.ends}:
            return "hidden states of the vision tower are requested"
        try:
            plans.tower.on_grid(*(side // module.config.patch_size for side in pixels.shape[2:]))
        except UnsupportedModelError as error:
            return str(error)
        return super()._unserved(call)

    def _planned(self, module: Any, plans: TowerPlans, call: dict[str, Any]) -> Any:
        plans.take_turn()
        x = module.patch_embed(call["pixel_values"])
        count, height, width, channels = x.shape
        if module.pos_embed is not None:
            resized = getattr(module, "interpolate_pos_encoding", None)
            x = x + (module.pos_embed if resized is None else resized(height, width))
        results = plans.run(x.reshape(-1, channels), _grid_patches(count, height, width, module.config.window_size))
        results = {layer: rows.view_as(x) for layer, rows in results.items()}
        plans.take_turn()
        made = module.neck(results[len(plans.tower.windowed) - 1])
        if hasattr(module, "proj"):
            plans.take_turn()
            made = module.proj(made)
        own_class: Any = type(module)
        output = class_output(own_class)(last_hidden_state=made)
        if wanted := _hidden_states(call, module):
            states = range(len(plans.tower.windowed) + 1)
            output.hidden_states = tuple(results[index - 1] if index in wanted else None for index in states)
        return output


def _hidden_states(call: dict[str, Any], module: Any) -> set[int] | None:
    """Which hidden states a call asks for; None: all."""
    wanted = call.get("output_hidden_states")
    if wanted is None or wanted is False:
        return set()
    if wanted is True:
        return None
    count = module.config.num_hidden_layers + 1
    return {index % count for index in ([wanted] if isinstance(wanted, int) else wanted)}


def _grid_patches(count: int, height: int, width: int, window: int) -> Patches:
    """The patches of so many pictures of one size, in windows of `window` rows and columns; 0: without windows."""
    rows, cols = np.divmod(np.arange(height * width, dtype=np.int32), np.int32(width))
    axes = np.zeros((count, height * width, 3), np.int32)
    axes[..., 1], axes[..., 2] = rows, cols
    pictures, grid = [height * width] * count, (height, width)
    if not window:
        return Patches(pictures, [], axes.reshape(-1, 3), grid=grid)
    down, across = -(-height // window), -(-width // window)
    filled = np.full((count, down * window, across * window), -1)
    filled[:, :height, :width] = np.arange(count * height * width).reshape(count, height, width)
    places = filled.reshape(count, down, window, across, window).swapaxes(2, 3).reshape(-1, window * window)
    inside = np.zeros((*places.shape, 3), np.int32)
    inside[..., 0] = places < 0
    inside[..., 1], inside[..., 2] = np.divmod(np.arange(window * window), window)
    padded = PaddedWindows(torch.from_numpy(places.ravel()), inside.reshape(-1, 3))
    return Patches(pictures, [window * window] * len(places), axes.reshape(-1, 3), grid=grid, padded=padded)


def _kept(mask: torch.Tensor) -> torch.Tensor:
    """Which rows of each picture are not padding, given a mask [pictures, heads, rows, rows] of that: of booleans, or of
    numbers that are added to scores."""
    keys = mask[:, 0, 0]
    return keys if keys.dtype is torch.bool else keys == 0


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


# By model_type; the others have SigLIP's encoder.
_FORMS: dict[str, type[TowerForward]] = {
    "qwen2_5_vl_vision": QwenTower, "qwen3_vl_vision": QwenTower, "qwen3_5_vision": QwenTower, "gemma4_vision": Gemma4Layers,
    "deepseek_ocr2_encoder": QueryEncoder, "sam_vision_model": SamTower, "deepseek_ocr2_sam_vision_model": SamTower,
}  # fmt: skip


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
        if hasattr(module, "vision_encoder"):  # SAM's module around the tower, with the same config
            continue
        form = _FORMS.get(kind, EncoderLayers)
        layers: Any = getattr(module, "encoder", module)
        try:
            with torch.device("cpu"):
                tower = build_tower(module.config)
        except (UnsupportedModelError, ConfigError) as error:
            reasons[path] = str(error)
            continue
        plans[path] = own = TowerPlans(runtime, layers, tower)
        layers.__dict__["forward"] = form(own)
    return plans, reasons
