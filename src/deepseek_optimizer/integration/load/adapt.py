"""`kl_budget`: formats chosen by what they cost, on a model that was packed without loss, and put in place.

Beside the model as it is, the matrices of the choice that is being measured are in memory; they become the model's own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ...backends.base import Backend
from ...calibration.budget import Choice
from ...calibration.groups import Group, format_groups
from ...calibration.search import Point, search
from ...calibration.sensitivity import Probe, measure
from ...calibration.text import read_text, sample_text, stretches
from ...config import DeepSeekConfig, larger
from ...graph.least import least_formats
from ...quant import PackedMatrix, PackedStack, PackedWeight, get_format
from ...quant.base import TILE_ROWS
from ...quant.tiles import empty_stack, empty_tiles, panels
from ...system.progress import show_progress
from ..bind.graphs import plan_graph
from ..bind.runtime import Runtime, kv_dtype, runtime_of
from ..bind.swap import matrices_of, packed_twin, sites, weights_of
from ..model.wrapper import rebind
from .importance import measure_importance

LENGTH, COUNT = 128, 4  # KL is measured on stretches of so many tokens, from all over the text, in one step
WEIGHED_BY = 64  # stretches of a user's text that say which columns matter; KL is measured on some of these


def calibration_tokens(config: DeepSeekConfig, tokenizer: Any, context: int = LENGTH) -> list[torch.Tensor]:
    """The stretches to calibrate on, int64 [1, LENGTH] each, or of the model's context where that is shorter.

    Raises:
        ConfigError: the text cannot be read, or is too short.
    """
    if config.calibration is None:
        return stretches(tokenizer, sample_text(), min(LENGTH, context), COUNT)
    return stretches(tokenizer, read_text(config.calibration), min(LENGTH, context), WEIGHED_BY, config.calibration)


def spread(texts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """COUNT of the stretches, evenly spread: those that KL is measured on."""
    return [texts[i * len(texts) // COUNT] for i in range(COUNT)] if len(texts) > COUNT else list(texts)


def adapt(model: Any, texts: Sequence[torch.Tensor]) -> None:
    """Gives each group of matrices the format that `config.kl_budget` leaves it.

    Args:
        model: bound, packed without loss.
        texts: the calibration text, int64 [1, n] each. A text of the user's also weighs the rounding, as it does elsewhere.

    Raises:
        KlBudgetError: even the best formats cost more than the budget; the model is as it was.
    """
    runtime = runtime_of(model)
    graph, _ = plan_graph(model.config, None)
    groups = format_groups(graph, matrices_of(model, graph))
    importance = {}
    if runtime.config.calibration is not None:
        with show_progress("Calibrating") as progress:
            importance = measure_importance(model, texts, progress)
    trial = _Trial(runtime, groups, spread(texts), importance)
    with show_progress("Measuring each group of matrices in each format") as progress:
        options = measure(trial.probe, groups, trial.held, trial.repack, progress)
    assert runtime.config.kl_budget is not None
    with show_progress("Choosing formats within the KL budget") as progress:
        chosen, curve = search(options, runtime.config.kl_budget, trial.base(), trial.measure, progress)
    matrices = trial.assembled(chosen.choice)
    _put_in_place(model, runtime, matrices)
    weights = sum(math.prod(m.shape) for m in matrices.values())
    rebind(model, [_described(point, weights, point is chosen) for point in curve])


class _Trial:
    """The model as it is, and the matrices of the choice that was last measured."""

    def __init__(
        self,
        runtime: Runtime,
        groups: Sequence[Group],
        texts: Sequence[torch.Tensor],
        importance: Mapping[str, torch.Tensor],
    ) -> None:
        model, backend = runtime.model, runtime.backend
        self.config, self.groups, self.backend, self.importance = runtime.config, groups, backend, importance
        graph, _ = plan_graph(model.config, ())
        self.weights = weights_of(model, graph)
        self.stored = {name: w for name, w in self.weights.items() if isinstance(w, PackedWeight)}
        self.least = least_formats(graph)
        self.packed: dict[str, PackedWeight] = {}
        as_it_is = kv_dtype(DeepSeekConfig(), [m.format for m in self.stored.values()])
        self.probe = Probe(backend, graph, self.weights, texts, as_it_is, runtime.compile_options)

    def held(self, name: str, format: str | None) -> str:
        """The format of a matrix whose group has `format`: what the user named, or its own where the other is no smaller."""
        own, fixed = self.stored[name].format, self.config.named_format(name.removesuffix(".weight"))
        if fixed is not None or format is None:
            return fixed or own
        format = larger(format, self.least.get(name, format))
        return format if get_format(format).bits < get_format(own).bits else own

    def repack(self, name: str, format: str) -> PackedWeight:
        weight, importance = self.stored[name], self.importance.get(name)
        if weight.format == format:
            return weight
        if isinstance(weight, PackedMatrix):
            tiles = empty_tiles(*weight.shape, get_format(format).tile_bytes)
            _repack(weight, format, self.backend, importance, tiles)
            return PackedMatrix(format, *weight.shape, tiles)
        stack = empty_stack(*weight.shape, get_format(format).tile_bytes)
        for i in range(weight.count):
            _repack(weight.matrix(i), format, self.backend, importance, stack[i])
        return PackedStack(format, *weight.shape, stack)

    def base(self) -> float:
        """The KL of the cache's storage: what the user asked for, or bf16 as soon as one matrix is no longer fp32."""
        kind = kv_dtype(self.config, ["int8"])
        return 0.0 if kind == self.probe.kv_dtype else self.probe.kl({}, kv_dtype=kind)

    def assembled(self, choice: Choice) -> dict[str, PackedWeight]:
        """All matrices in the formats of a choice; those that the last one had too are not packed again."""
        wanted = {
            name: format
            for group, option in zip(self.groups, choice, strict=True)
            for name, format in zip(group.matrices, option.formats, strict=True)
        }
        self.packed = {name: m for name, m in self.packed.items() if m.format == wanted[name]}  # frees before it packs
        self.packed = {name: self.packed.get(name) or self.repack(name, format) for name, format in wanted.items()}
        return self.packed

    def measure(self, choice: Choice) -> float:
        matrices = self.assembled(choice)
        return self.probe.kl(matrices, kv_dtype=kv_dtype(self.config, [m.format for m in matrices.values()]))


def _repack(matrix: PackedMatrix, format: str, backend: Backend, importance: torch.Tensor | None, tiles: torch.Tensor) -> None:
    """Fills `tiles` with the matrix in another format, by panels of rows: it never stands in memory as floats."""
    for begin, end in panels(matrix.rows, matrix.cols):
        backend.pack(backend.unpack(matrix, begin, end), format, tiles[begin // TILE_ROWS : -(-end // TILE_ROWS)], importance)


def _put_in_place(model: Any, runtime: Runtime, matrices: Mapping[str, PackedWeight]) -> None:
    """Replaces the packed modules whose format changes, tied ones with one parameter again."""
    made: dict[str, nn.Parameter] = {}
    for site in sites(model, plan_graph(model.config, ())[0]):
        module: Any = site.module
        formats = {leaf: matrices[weight].format for leaf, weight in site.weights.items()}
        if all(held.format == formats[leaf] for leaf, held in module.held().items()):
            continue
        twin = packed_twin(module, formats, module.dtype)
        for leaf, weight in site.weights.items():
            setattr(twin, leaf, made.setdefault(weight, nn.Parameter(matrices[weight].data, requires_grad=False)))
        twin.training = module.training
        setattr(site.parent, site.child, twin)


def _described(point: Point, weights: int, chosen: bool) -> dict[str, Any]:
    return {
        "bits": 8 * point.bytes / weights,
        "bytes": point.bytes,
        "predicted_kl": point.predicted_kl,
        "measured_kl": point.measured_kl,
        "formats": point.counts(),
        "chosen": chosen,
    }
