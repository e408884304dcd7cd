"""`kl_budget`: chooses formats by their measured KL divergence on a losslessly packed model, and repacks the model in them.

Besides the model, the matrices of the choice being measured are in memory; the chosen ones become the model's own. With
calibration, every matrix in each of the formats below 8 bits is in memory too, and up to three whole choices.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from ...backends.base import Backend
from ...calibration.budget import Choice, total_bytes, total_kl
from ...calibration.built_in import built_in_stretches
from ...calibration.groups import Group, format_groups
from ...calibration.search import Point, front, search, tighten
from ...calibration.sensitivity import FORMATS, Probe, measure
from ...calibration.text import read_text, sample_text, stretches
from ...config import BUILT_IN_TEXT, DeepSeekConfig, larger
from ...graph.min_formats import min_formats
from ...quant import WEIGHED, PackedMatrix, PackedStack, PackedWeight, get_format
from ...quant.base import TILE_ROWS
from ...quant.tiles import empty_stack, empty_tiles, panels
from ...system.progress import show_progress
from ..bind.graphs import mtp_graphs, plan_graph
from ..bind.runtime import kv_dtype, runtime_of
from ..bind.swap import matrices_of, put_in_place, sites, weights_of
from ..model.bind_plan import rebind
from .calibrate import BUILT_IN, ENVIRONMENT
from .rounding import Outcome, round_alone, round_in_place

LENGTH, COUNT = 128, 4  # KL is measured in one step over COUNT stretches of LENGTH tokens, spread over the text
MAX_STRETCHES = 64  # of a user's text
BUILT_IN_STRETCHES = 36  # of the built-in text: 4,096 tokens to round on, as without a budget, and those that KL is measured on
COMPENSATIONS = 3  # maximum number of choices that are rounded as a whole, each of which takes as long as calibration


def calibration_tokens(config: DeepSeekConfig, tokenizer: Any, context: int = LENGTH) -> list[torch.Tensor]:
    """The stretches of text to calibrate on.

    Args:
        config: names the calibration text; Python's documentation if it names none.
        tokenizer: the model's tokenizer.
        context: the model's context length; stretches are not longer.

    Returns: token ids, int64 [1, min(LENGTH, context)] each.

    Raises:
        ConfigError: the text cannot be read, or is too short.
    """
    length = min(LENGTH, context)
    if not _calibrates(config):
        return stretches(tokenizer, sample_text(), length, COUNT)
    if config.calibration_file is None:
        return built_in_stretches(tokenizer, length, BUILT_IN_STRETCHES)
    return stretches(tokenizer, read_text(config.calibration_file), length, MAX_STRETCHES, config.calibration_file)


def _calibrates(config: DeepSeekConfig) -> bool:
    """Whether weights are rounded with error compensation."""
    built_in = config.calibration == BUILT_IN_TEXT and os.environ.get(ENVIRONMENT) != "none"
    return built_in or config.calibration_file is not None


def spread(texts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """COUNT evenly spread stretches, on which KL is measured."""
    return [texts[i] for i in _measured(len(texts))]


def others(texts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The stretches to round on: those that KL is not measured on, or all of a short text."""
    measured = _measured(len(texts)) if len(texts) >= 2 * COUNT else ()
    return [text for i, text in enumerate(texts) if i not in measured]


def _measured(count: int) -> list[int]:
    return [i * count // COUNT for i in range(COUNT)] if count > COUNT else list(range(count))


def adapt(model: Any, texts: Sequence[torch.Tensor]) -> None:
    """Repacks each group of matrices in the format chosen for it within `config.kl_budget`.

    With calibration, matrices are rounded with error compensation on the part of the text that KL is not measured on: each
    alone, to measure and choose formats, then the model as a whole. MTP layers, which have no influence on the results, get
    the format of most weights.

    Args:
        model: an optimized model, packed losslessly.
        texts: the calibration text, token ids, int64 [1, n] each.

    Raises:
        KlBudgetError: even the most precise formats exceed the budget; the model is unchanged.
    """
    config = runtime_of(model).config
    assert config.kl_budget is not None
    trial, kept = _Trial(model, spread(texts)), others(texts)
    if _calibrates(config):
        with show_progress("Rounding each matrix in each format") as progress:
            trial.rounded, trial.outcome = round_alone(model, trial.roundings, kept, progress)
    with show_progress("Measuring each group of matrices in each format") as progress:
        options = measure(trial.probe, trial.groups, trial.held, trial.repack, progress)
    base = trial.base()
    with show_progress("Choosing formats within the KL budget") as progress:
        chosen, curve = search(options, config.kl_budget, base, trial.measure, progress)
    if _calibrates(config):
        whole = _AsAWhole(trial, kept, base)
        tighten(options, config.kl_budget, base, whole.at, COMPENSATIONS, chosen.predicted_kl)
        curve = front([*curve, *whole.results])
        chosen = next(point for point in curve if point.measured_kl <= config.kl_budget)
        best, outcome = whole.results.get(chosen) or trial.all(chosen.choice)
        trial.put(trial.stored)
    else:
        best, outcome = trial.all(chosen.choice)
    trial.put(best)
    weights = sum(math.prod(trial.stored[name].shape) for group in trial.groups for name in group.matrices)
    points = [_described(point, weights, point is chosen) for point in curve]
    rebind(model, points, outcome.described(config.calibration_file or BUILT_IN, kept) if outcome.compensated else {})


class _AsAWhole:
    """Choices rounded with error compensation as a whole: each layer compensates the errors of those before it.

    Attributes:
        results: the matrices of each measured point, and what was rounded.
    """

    def __init__(self, trial: _Trial, texts: Sequence[torch.Tensor], base: float) -> None:
        self._trial, self._texts, self._base = trial, texts, base
        self.results: dict[Point, tuple[dict[str, PackedWeight], Outcome]] = {}

    def at(self, choice: Choice) -> Point:
        """Rounds the losslessly packed model to the formats of a choice, and measures it."""
        known = next((point for point in self.results if point.choice == choice), None)
        if known is not None:
            return known
        trial = self._trial
        formats = {name.removesuffix(".weight"): format for name, format in trial.formats(choice).items()}
        settings = DeepSeekConfig(**{**trial.config.to_dict(), "kl_budget": None, "formats": formats})
        trial.put(trial.stored)
        with show_progress("Rounding in the chosen formats") as progress:
            outcome = round_in_place(trial.model, settings, self._texts, progress)
        matrices = matrices_of(trial.model, trial.whole)
        point = Point(choice, total_bytes(choice), self._base + total_kl(choice), trial.kl(matrices))
        self.results[point] = matrices, outcome
        return point


class _Trial:
    """The model, and the matrices of the choice that was measured last.

    Attributes:
        groups: the groups of matrices that have one format.
        whole: the nodes of the model's graph and of its MTP layers', to look up weights.
        stored: the model's own matrices.
        rounded, outcome: what `round_alone` returned; nothing without calibration.
    """

    def __init__(self, model: Any, texts: Sequence[torch.Tensor]) -> None:
        runtime = runtime_of(model)
        self.model, self.config, self.backend = model, runtime.config, runtime.backend
        graph, _ = plan_graph(model.config, ())
        fused, _ = plan_graph(model.config, None)
        self.groups = format_groups(fused, matrices_of(model, fused))
        self.whole = replace(graph, nodes=[node for g in (graph, *mtp_graphs(model)) for node in g.nodes])
        self.stored = matrices_of(model, self.whole)
        self.minimum = min_formats(self.whole)
        self.rounded: dict[tuple[str, str], PackedWeight] = {}
        self.outcome = Outcome()
        self.packed: dict[str, PackedWeight] = {}
        self._planned = frozenset(name for group in self.groups for name in group.matrices)
        weights = weights_of(model, graph)
        lossless = kv_dtype(DeepSeekConfig(), [self.stored[name].format for name in self._planned])
        self.probe = Probe(runtime.backend, graph, weights, texts, lossless, runtime.compile_options)

    def roundings(self, name: str, own: str) -> list[str]:
        """The formats to round a matrix to with error compensation before its group is measured."""
        tried = dict.fromkeys(self.held(name, format) for format in FORMATS) if name in self._planned else {}
        return [format for format in tried if format in WEIGHED and format != own]

    def held(self, name: str, format: str | None) -> str:
        """The format of a matrix whose group has `format`: the user's if named, its current one if `format` is not smaller."""
        own, fixed = self.stored[name].format, self.config.named_format(name.removesuffix(".weight"))
        if fixed is not None or format is None:
            return fixed or own
        format = larger(format, self.minimum.get(name, format))
        return format if get_format(format).bits < get_format(own).bits else own

    def repack(self, name: str, format: str) -> PackedWeight:
        """The matrix or stack `name` in another format."""
        weight = self.stored[name]
        if weight.format == format:
            return weight
        if (name, format) in self.rounded:
            return self.rounded[name, format]
        if isinstance(weight, PackedMatrix):
            tiles = empty_tiles(*weight.shape, get_format(format).tile_bytes)
            _repack(weight, format, self.backend, tiles)
            return PackedMatrix(format, *weight.shape, tiles)
        stack = empty_stack(*weight.shape, get_format(format).tile_bytes)
        for i in range(weight.count):
            _repack(weight.matrix(i), format, self.backend, stack[i])
        return PackedStack(format, *weight.shape, stack)

    def base(self) -> float:
        """KL divergence caused by the KV cache's format: the user's, or bf16 once any matrix is no longer fp32."""
        kind = kv_dtype(self.config, ["int8"])
        return 0.0 if kind == self.probe.kv_dtype else self.probe.kl({}, kv_dtype=kind)

    def assembled(self, choice: Choice) -> dict[str, PackedWeight]:
        """All matrices in the formats of a choice; those that the previous choice had in common are reused."""
        wanted = _by_name(self.groups, choice)
        self.packed = {name: m for name, m in self.packed.items() if m.format == wanted[name]}  # frees memory before packing
        self.packed = {name: self.packed.get(name) or self.repack(name, format) for name, format in wanted.items()}
        return self.packed

    def formats(self, choice: Choice) -> dict[str, str]:
        """The format of every matrix, those of MTP layers included."""
        chosen = _by_name(self.groups, choice)
        sizes: Counter[str] = Counter()
        for name, format in chosen.items():
            sizes[format] += math.prod(self.stored[name].shape)
        usual = sizes.most_common(1)[0][0]
        return {**{name: self.held(name, usual) for name in self.stored}, **chosen}

    def all(self, choice: Choice) -> tuple[dict[str, PackedWeight], Outcome]:
        """`assembled`, with the matrices of MTP layers, and how it was rounded."""
        planned = self.assembled(choice)
        found = {name: planned.get(name) or self.repack(name, format) for name, format in self.formats(choice).items()}
        alone = {name: matrix for name, matrix in found.items() if (name, matrix.format) in self.rounded}
        every = {name: len(self.roundings(name, self.stored[name].format)) for name in alone}
        plain = {name: count // every[name] for name, count in self.outcome.plain.items() if name in alone}
        count = sum(matrix.count if isinstance(matrix, PackedStack) else 1 for matrix in alone.values())
        return found, Outcome(count - sum(plain.values()), plain=plain)

    def put(self, matrices: Mapping[str, PackedWeight]) -> None:
        """Puts all matrices into the model, where those in it have other formats."""
        put_in_place(sites(self.model, self.whole), matrices)
        runtime_of(self.model).replaced()

    def measure(self, choice: Choice) -> float:
        """KL divergence of a choice from the lossless model, in nats per token."""
        return self.kl(self.assembled(choice))

    def kl(self, matrices: Mapping[str, PackedWeight]) -> float:
        """KL divergence of a model of these matrices from the lossless model, in nats per token."""
        planned = {name: matrix for name, matrix in matrices.items() if name in self._planned}
        return self.probe.kl(planned, kv_dtype=kv_dtype(self.config, [m.format for m in planned.values()]))


def _by_name(groups: Sequence[Group], choice: Choice) -> dict[str, str]:
    """The formats of a choice by the names of matrices."""
    named = (zip(group.matrices, option.formats, strict=True) for group, option in zip(groups, choice, strict=True))
    return {name: format for pairs in named for name, format in pairs}


def _repack(matrix: PackedMatrix, format: str, backend: Backend, tiles: torch.Tensor) -> None:
    """Packs a matrix in another format into `tiles`, panel by panel, so that it is never in memory as floats as a whole."""
    for begin, end in panels(matrix.rows, matrix.cols):
        backend.pack(backend.unpack(matrix, begin, end), format, tiles[begin // TILE_ROWS : -(-end // TILE_ROWS)])


def _described(point: Point, weights: int, chosen: bool) -> dict[str, Any]:
    return {
        "bits": 8 * point.bytes / weights,
        "bytes": point.bytes,
        "predicted_kl": point.predicted_kl,
        "measured_kl": point.measured_kl,
        "formats": point.counts(),
        "chosen": chosen,
    }
