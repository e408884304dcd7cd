"""`kl_budget`: chooses formats by their measured KL divergence on a losslessly packed model, and repacks the model in them.

Besides the model, the matrices of the choice being measured are in memory; the chosen ones become the model's own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from ...backends.base import Backend
from ...calibration.budget import Choice
from ...calibration.groups import Group, format_groups
from ...calibration.search import Point, search
from ...calibration.sensitivity import Probe, measure
from ...calibration.text import read_text, sample_text, stretches
from ...config import DeepSeekConfig, larger
from ...graph.min_formats import min_formats
from ...quant import PackedMatrix, PackedStack, PackedWeight, get_format
from ...quant.base import TILE_ROWS
from ...quant.tiles import empty_stack, empty_tiles, panels
from ...system.progress import show_progress
from ..bind.graphs import plan_graph
from ..bind.runtime import Runtime, kv_dtype, runtime_of
from ..bind.swap import matrices_of, put_in_place, sites, weights_of
from ..model.bind_plan import rebind
from .importance import measure_importance
from .rounding import Outcome, round_in_place

LENGTH, COUNT = 128, 4  # KL is measured in one step over COUNT stretches of LENGTH tokens, spread over the text
MAX_STRETCHES = 64  # of a user's text, to compute column importance; KL is measured on COUNT of them


def calibration_tokens(config: DeepSeekConfig, tokenizer: Any, context: int = LENGTH) -> list[torch.Tensor]:
    """The stretches of text to calibrate on.

    Args:
        config: names the calibration text; the built-in sample if it names none.
        tokenizer: the model's tokenizer.
        context: the model's context length; stretches are not longer.

    Returns: token ids, int64 [1, min(LENGTH, context)] each.

    Raises:
        ConfigError: the text cannot be read, or is too short.
    """
    if config.calibration_file is None:
        return stretches(tokenizer, sample_text(), min(LENGTH, context), COUNT)
    return stretches(
        tokenizer, read_text(config.calibration_file), min(LENGTH, context), MAX_STRETCHES, config.calibration_file
    )


def spread(texts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """COUNT evenly spread stretches, on which KL is measured."""
    return [texts[i * len(texts) // COUNT] for i in range(COUNT)] if len(texts) > COUNT else list(texts)


def adapt(model: Any, texts: Sequence[torch.Tensor]) -> None:
    """Repacks each group of matrices in the format chosen for it within `config.kl_budget`.

    Args:
        model: an optimized model, packed losslessly.
        texts: the calibration text, token ids, int64 [1, n] each. If it comes from the user, rounding minimizes errors weighted
            by the importance of columns measured on it, and the model is finally rounded with error compensation.

    Raises:
        KlBudgetError: even the most precise formats exceed the budget; the model is unchanged.
    """
    runtime = runtime_of(model)
    graph, _ = plan_graph(model.config, None)
    groups = format_groups(graph, matrices_of(model, graph))
    importance = {}
    if runtime.config.calibration_file is not None:
        with show_progress("Calibrating") as progress:
            importance = measure_importance(model, texts, progress)
    trial = _Trial(runtime, groups, spread(texts), importance)
    with show_progress("Measuring each group of matrices in each format") as progress:
        options = measure(trial.probe, groups, trial.held, trial.repack, progress)
    assert runtime.config.kl_budget is not None
    with show_progress("Choosing formats within the KL budget") as progress:
        chosen, curve = search(options, runtime.config.kl_budget, trial.base(), trial.measure, progress)
    matrices, measured, rounding = trial.assembled(chosen.choice), chosen.measured_kl, Outcome()
    if runtime.config.calibration_file is not None:
        compensated, outcome = _compensated(model, matrices, texts)
        kl = trial.kl(compensated)
        if kl < measured:
            matrices, measured, rounding = compensated, kl, outcome
    put_in_place(sites(model, plan_graph(model.config, ())[0]), matrices)
    weights = sum(math.prod(m.shape) for m in matrices.values())
    points = [_described(replace(p, measured_kl=measured) if p is chosen else p, weights, p is chosen) for p in curve]
    rebind(model, points, rounding.described(str(runtime.config.calibration_file), texts) if rounding.compensated else {})


def _compensated(
    model: Any, matrices: Mapping[str, PackedWeight], texts: Sequence[torch.Tensor]
) -> tuple[dict[str, PackedWeight], Outcome]:
    """Rounds the losslessly packed model to the formats of `matrices` with error compensation.

    Returns: its matrices, in place in the model, and what was rounded.
    """
    formats = {name.removesuffix(".weight"): matrix.format for name, matrix in matrices.items()}
    settings = DeepSeekConfig(**{**runtime_of(model).config.to_dict(), "kl_budget": None, "formats": formats})
    with show_progress("Rounding in the chosen formats") as progress:
        outcome = round_in_place(model, settings, texts, progress)
    held = weights_of(model, plan_graph(model.config, ())[0])
    return {name: weight for name, weight in held.items() if isinstance(weight, PackedWeight)}, outcome


class _Trial:
    """The model, and the matrices of the choice that was measured last."""

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
        self.minimum = min_formats(graph)
        self.packed: dict[str, PackedWeight] = {}
        lossless = kv_dtype(DeepSeekConfig(), [m.format for m in self.stored.values()])
        self.probe = Probe(backend, graph, self.weights, texts, lossless, runtime.compile_options)

    def held(self, name: str, format: str | None) -> str:
        """The format of a matrix whose group has `format`: the user's if named, its current one if `format` is not smaller."""
        own, fixed = self.stored[name].format, self.config.named_format(name.removesuffix(".weight"))
        if fixed is not None or format is None:
            return fixed or own
        format = larger(format, self.minimum.get(name, format))
        return format if get_format(format).bits < get_format(own).bits else own

    def repack(self, name: str, format: str) -> PackedWeight:
        """The matrix or stack `name` in another format."""
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
        """KL divergence caused by the KV cache's format: the user's, or bf16 once any matrix is no longer fp32."""
        kind = kv_dtype(self.config, ["int8"])
        return 0.0 if kind == self.probe.kv_dtype else self.probe.kl({}, kv_dtype=kind)

    def assembled(self, choice: Choice) -> dict[str, PackedWeight]:
        """All matrices in the formats of a choice; those that the previous choice had in common are reused."""
        wanted = {
            name: format
            for group, option in zip(self.groups, choice, strict=True)
            for name, format in zip(group.matrices, option.formats, strict=True)
        }
        self.packed = {name: m for name, m in self.packed.items() if m.format == wanted[name]}  # frees memory before packing
        self.packed = {name: self.packed.get(name) or self.repack(name, format) for name, format in wanted.items()}
        return self.packed

    def measure(self, choice: Choice) -> float:
        """KL divergence of a choice from the lossless model, in nats per token."""
        return self.kl(self.assembled(choice))

    def kl(self, matrices: Mapping[str, PackedWeight]) -> float:
        """KL divergence of a model of these matrices from the lossless model, in nats per token."""
        return self.probe.kl(dict(matrices), kv_dtype=kv_dtype(self.config, [m.format for m in matrices.values()]))


def _repack(matrix: PackedMatrix, format: str, backend: Backend, importance: torch.Tensor | None, tiles: torch.Tensor) -> None:
    """Packs a matrix in another format into `tiles`, panel by panel, so that it is never in memory as floats as a whole."""
    for begin, end in panels(matrix.rows, matrix.cols):
        backend.pack(backend.unpack(matrix, begin, end), format, tiles[begin // TILE_ROWS : -(-end // TILE_ROWS)], importance)


def _described(point: Point, weights: int, chosen: bool) -> dict[str, Any]:
    return {
        "bits": 8 * point.bytes / weights,
        "bytes": point.bytes,
        "predicted_kl": point.predicted_kl,
        "measured_kl": point.measured_kl,
        "formats": point.counts(),
        "chosen": chosen,
    }
