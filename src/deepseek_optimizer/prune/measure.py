"""Measures on a text what may be left out of a model: layers first, then units of the layers that stay."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch

from ..calibration.statistics import ColumnSquares, watching
from ..checkpoint import Checkpoint
from ..errors import ConfigError
from .channels import channel_errors
from .depth import LeftOut, leave_out_layers
from .experts import Uses
from .families import EXPERTS, HEADS, MLP, Width, width_of
from .heads import head_errors, moments_of
from .layerwise import Layerwise
from .selection import Kept, Selection, most_important, remaining

CHANNELS = 32  # channels stay in multiples of it: the width of a group of quantized weights
EVERY = 2  # tokens; the divergence without a layer is measured at each second one
Counts = Mapping[str, int]  # "depth" and kinds -> how many stay


def counts_of(config: Any, fractions: Mapping[str, float]) -> dict[str, int]:
    """How many layers and units stay.

    Args:
        config: a Transformers config.
        fractions: "depth" or a kind -> the fraction to leave out.

    Raises:
        ConfigError: a fraction is invalid or too small, or experts are too few for the router.
        UnsupportedModelError: the family has no such units.
    """
    counts = {}
    for what, fraction in fractions.items():
        if what == "depth":
            counts[what] = remaining(what, fraction, config.num_hidden_layers)
            continue
        units = getattr(config, width_of(config.model_type, what).units)
        groups = expert_groups(config) if what == EXPERTS else 1
        counts[what] = remaining(what, fraction, units, CHANNELS if what == MLP else groups)
        if what == EXPERTS:
            _check_experts(config, counts[what] // groups)
    return counts


def expert_groups(config: Any) -> int:
    """Number of equal groups of experts that the router chooses from."""
    return int(getattr(config, "n_group", None) or 1)


def _check_experts(config: Any, per_group: int) -> None:
    groups = expert_groups(config)
    open_groups = int(getattr(config, "topk_group", None) or 1) if groups > 1 else 1
    # A group's score is the sum of its two best experts' scores.
    needed = max(-(-config.num_experts_per_tok // open_groups), 2 if groups > 1 else 1)
    if per_group < needed:
        raise ConfigError(
            f"experts: {per_group * groups} would stay, but the router needs {needed * groups} to choose "
            f"{config.num_experts_per_tok} for each token; use a smaller fraction"
        )


def choose_layers(model: Any, texts: Sequence[torch.Tensor], count: int, progress: Callable[[int, int], None]) -> list[LeftOut]:
    """The layers to leave out so that `count` stay, see `leave_out_layers`."""
    layerwise = Layerwise(model, texts, EVERY)
    return leave_out_layers(layerwise, len(layerwise.layers) - count, progress)


def choose_units(
    model: Any, checkpoint: Checkpoint, texts: Sequence[torch.Tensor], layers: Sequence[int], counts: Counts
) -> Selection:
    """The units to keep in each of the layers that stay, measured in the model without the other layers.

    Args:
        model: an optimized model, packed losslessly.
        checkpoint: the files that it was loaded from.
        texts: token ids, int64 [1, n] each.
        layers: the layers that stay, ascending.
        counts: kind -> how many units stay in each layer.
    """
    layerwise = Layerwise(model, texts)
    widths = [width_of(model.config.model_type, kind) for kind in counts]
    kept: dict[str, dict[int, tuple[int, ...]]] = {width.kind: {} for width in widths}
    states = layerwise.inputs
    for i in layers:
        layer: Any = layerwise.layers[i]
        here = [width for width in widths if _has(layer, width.reader)]
        seen = {width.kind: _Seen(getattr(model.config, width.units)) for width in here}
        with ExitStack() as stack:
            for width in here:
                seen[width.kind].listen(stack, width, layer.get_submodule(width.reader))
            states = layerwise.run([i], states)
        for width in here:
            groups = expert_groups(model.config) if width.kind == EXPERTS else 1
            weight = None if width.kind == EXPERTS else checkpoint.read(f"model.layers.{i}.{width.reader}.weight")
            scores = seen[width.kind].scores(width.kind, weight)
            kept[width.kind][i] = most_important(scores, counts[width.kind], groups)
    chosen: dict[str, Kept] = dict(kept)
    return Selection(tuple(layers), chosen)


def _has(layer: torch.nn.Module, path: str) -> bool:
    return any(name == path for name, _ in layer.named_modules())


class _Seen:
    """What is seen of one module of a layer: the sums from which a criterion computes scores."""

    def __init__(self, units: int) -> None:
        self._units, self._squares, self._uses = units, ColumnSquares(), Uses(units)
        self._moments: torch.Tensor | None = None

    def listen(self, stack: ExitStack, width: Width, module: Any) -> None:
        """Adds up what the module reads until `stack` closes."""
        if width.kind == EXPERTS:
            module.listener = self._uses.add
            stack.callback(setattr, module, "listener", None)
        else:
            add = self._squares.add if width.kind == MLP else self._add_moments
            stack.enter_context(watching({width.kind: module}, add))

    def _add_moments(self, name: str, x: torch.Tensor) -> None:
        more = moments_of(x, self._units)
        self._moments = more if self._moments is None else self._moments + more

    def scores(self, kind: str, weight: torch.Tensor | None) -> torch.Tensor:
        """The importance of each unit; `weight`: of the module that was watched, if it is a matrix."""
        if weight is None:
            return self._uses.counts
        if kind == HEADS:
            assert self._moments is not None
            return head_errors(self._moments, weight)
        return channel_errors(self._squares.sums()[kind], weight)
