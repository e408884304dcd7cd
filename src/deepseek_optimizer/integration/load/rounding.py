"""Rounds the matrices of a losslessly loaded model with error compensation, layer by layer, in place.

Two streams of hidden states pass through the decoder: the original model's, and that of the model as far as it is rounded. The
matrices of a layer are rounded in the order of their use, such that their products with the rounded model's activations are
close to those of the original matrices with the original activations (as in GPTAQ, Li et al. 2025). So a matrix also
compensates the errors of those before it, in its layer and in earlier ones. A matrix whose product is added to the layer's
output is rounded such that this output is close to the original one, which also compensates errors of the hidden states.
Besides the model, the activations of one layer are in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from ...calibration.inputs import Inputs, moment_of
from ...calibration.statistics import ColumnSquares, watching
from ...config import DeepSeekConfig
from ...errors import ConfigError
from ...graph.min_formats import min_formats
from ...quant import GROUP_FORMATS, WEIGHED, PackedMatrix, PackedStack, PackedWeight, Packer, get_format
from ...quant.base import TILE_COLS
from ...quant.compensation import Curvature, compensated, curvature, with_product
from ...quant.overflow import overflow_of
from ...quant.tiles import empty_stack, empty_tiles
from ...system.threads import one_torch_thread
from ..bind.graphs import decoder_path, whole_graph
from ..bind.modules import PackedLinear
from ..bind.packed_experts import PackedExperts
from ..bind.runtime import Runtime, runtime_of
from ..bind.swap import STACKS, Site, put_in_place, sites
from .layer_calls import LayerCalls, first_inputs

# Shares of the errors of inputs and outputs that a matrix compensates. To compensate all of them would fit the calibration text
# alone, more with each layer. Measured on SmolLM2.
INPUT_SHARE = 0.25
OUTPUT_SHARE = 0.5
EMBEDDING_SHARE = 0.1  # of an identity in the second moment of a tied head, since the embedding's rows are read unweighted
EXACT_COLUMNS = 4096  # up to this size, second moments are factored in float64


@dataclass
class Outcome:
    """What was rounded.

    Attributes:
        compensated: number of matrices whose errors were compensated.
        plain: number of matrices, by parameter name, that were rounded without compensation: experts that got too few tokens of
            the text, and matrices that are not used on it, such as an embedding or MTP layers.
        starved: the number of those experts' matrices.
    """

    compensated: int = 0
    starved: int = 0
    plain: dict[str, int] = field(default_factory=dict)

    def described(self, text: str, texts: Sequence[torch.Tensor]) -> dict[str, Any]:
        """`Manifest.rounding`. `text`: the name of the text, of which `texts` are the tokens."""
        return {
            "method": "compensated",
            "text": text,
            "tokens": sum(ids.numel() for ids in texts),
            "matrices": self.compensated,
            "plain": self.plain,
        }


def round_in_place(
    model: Any,
    settings: DeepSeekConfig,
    texts: Sequence[torch.Tensor],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Outcome:
    """Rounds every matrix to the format that `settings` have for it. Afterwards the plan must be bound again (`rebind`).

    Args:
        model: an optimized model, packed losslessly.
        settings: `precision` and `formats`.
        texts: token ids, int64 [1, n] each.
        progress: called after each layer with the number of weights rounded and their total number.
    """
    minimum = min_formats(whole_graph(model))

    def wanted(name: str, own: str) -> list[str]:
        return [settings.format_of(name, own, minimum.get(name))]

    rounding = _Rounding(runtime_of(model), wanted, progress)
    decoder, layers, places = _by_layer(model, rounding)
    last = _LastMatrices()
    with torch.no_grad():
        with one_torch_thread():
            calls = LayerCalls(decoder, layers, texts)
        original = list(calls.inputs)
        # The embedding first, so that the layers compensate its errors too: a head then reads the original hidden states.
        rounding.round(places.get(None, []), _read_by_head(model, texts), None)
        with one_torch_thread():
            rounded = first_inputs(decoder, layers, texts)
        for i, layer in enumerate(layers):
            here, exact = places.get(i, []), Inputs()
            with one_torch_thread():
                with listening(here, exact):
                    original = [calls.run(layer, i, text, hidden) for text, hidden in enumerate(original)]
                added = last.among(calls, layer, i, here, rounded[0])
            for stage in _in_order(here, exact):
                names = {name for site in stage for name in site.weights.values()}
                with one_torch_thread():
                    seen, outputs = _run(calls, layer, i, stage, rounded, bool(names & added))
                rounding.round(stage, seen, exact, _Lag(original, outputs, added))
                added -= names
            with one_torch_thread():
                rounded = [calls.run(layer, i, text, hidden) for text, hidden in enumerate(rounded)]
    return rounding.outcome


def round_alone(
    model: Any,
    wanted: Callable[[str, str], Collection[str]],
    texts: Sequence[torch.Tensor],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[dict[tuple[str, str], PackedWeight], Outcome]:
    """Rounds every matrix of the decoder and its head with error compensation as if it were the only one that is rounded.

    Args:
        model: an optimized model, packed losslessly; it is not changed.
        wanted: the formats to round a weight to, by its name and its own format.
        texts, progress: as in `round_in_place`.

    Returns: the rounded matrices by name and format, and what was rounded, once for each format.
    """
    rounding = _Rounding(runtime_of(model), wanted, progress)
    decoder, layers, places = _by_layer(model, rounding)
    found: dict[tuple[str, str], PackedWeight] = {}
    with torch.no_grad():
        with one_torch_thread():
            calls = LayerCalls(decoder, layers, texts)
        hidden = list(calls.inputs)
        found |= rounding.rounded(places.get(None, []), _read_by_head(model, texts), None)
        for i, layer in enumerate(layers):
            seen = Inputs()
            with one_torch_thread(), listening(places.get(i, []), seen):
                hidden = [calls.run(layer, i, text, states) for text, states in enumerate(hidden)]
            found |= rounding.rounded(places.get(i, []), seen, None)
    return found, rounding.outcome


def _by_layer(model: Any, rounding: _Rounding) -> tuple[Any, list[nn.Module], dict[int | None, list[Site]]]:
    """The decoder, its layers, and the sites by the index of their layer, those outside all layers under None."""
    decoder = model.get_submodule(decoder_path(model))
    layers = list(decoder.layers)[: model.config.num_hidden_layers]
    index = {id(module): i for i, layer in enumerate(layers) for module in layer.modules()}
    places: dict[int | None, list[Site]] = {}
    for site in rounding.places:
        places.setdefault(index.get(id(site.module)), []).append(site)
    return decoder, layers, places


def _read_by_head(model: Any, texts: Sequence[torch.Tensor]) -> Inputs:
    """The inputs of the head, under the name of its weight; none if the model has no packed head."""
    inputs, head = Inputs(), model.get_output_embeddings()
    if isinstance(head, PackedLinear):
        name = next(name for name, module in model.named_modules() if module is head) + ".weight"
        for ids in texts:
            states = model(ids, use_cache=False, output_hidden_states=True, logits_to_keep=1).hidden_states
            inputs.add((model.all_tied_weights_keys or {}).get(name, name), states[-1])
    return inputs


@contextmanager
def listening(places: Sequence[Site], inputs: Inputs) -> Iterator[None]:
    """Adds the inputs of all matrices of these modules; those of a stack of experts as `NAME.INDEX`."""
    linear = {site.weights["weight"]: site.module for site in places if isinstance(site.module, nn.Linear)}
    experts = [site for site in places if isinstance(site.module, PackedExperts)]
    with ExitStack() as stack:
        stack.enter_context(watching(linear, inputs.add))
        for site in experts:
            module: Any = site.module
            gate_up, down = (site.weights[leaf] for leaf in STACKS)
            module.listener = partial(_add_expert, inputs, gate_up, down)
            stack.callback(setattr, module, "listener", None)
        yield


def _add_expert(inputs: Inputs, gate_up: str, down: str, expert: int, x: torch.Tensor, h: torch.Tensor) -> None:
    inputs.add(f"{gate_up}.{2 * expert}", x)
    inputs.add(f"{gate_up}.{2 * expert + 1}", x)
    inputs.add(f"{down}.{expert}", h)


def _in_order(places: Sequence[Site], inputs: Inputs) -> list[list[Site]]:
    """The modules of a layer in the order in which it calls them; those with the same inputs together, and those that were not
    called at the end.

    `inputs`: of their matrices, in the order of the calls.
    """
    owner = {name: site for site in places for name in site.weights.values()}
    called = dict.fromkeys(name if name in owner else name.rpartition(".")[0] for name in inputs.rows)
    first: dict[tuple[int, ...], list[Site]] = {}
    for name in called:
        pointers = tuple(x.data_ptr() for x in inputs.rows.get(name, ())) or (id(owner[name]),)
        stage = first.setdefault(pointers, [])
        stage += [site for site in [owner[name]] if all(site is not other for other in stage)]
    missing = [site for site in places if not any(site is other for stage in first.values() for other in stage)]
    return [*first.values(), *([missing] if missing else [])]


def _run(
    calls: LayerCalls, layer: nn.Module, index: int, stage: Sequence[Site], hidden: Sequence[torch.Tensor], whole: bool
) -> tuple[Inputs, list[torch.Tensor]]:
    """The inputs of some modules of a layer for hidden states, [1, n, H] for each text; with `whole` also its outputs."""
    seen, outputs, last = Inputs(), [], stage[-1].module
    with listening(stage, seen):
        for text, states in enumerate(hidden):
            if whole or not isinstance(last, PackedLinear):
                outputs.append(calls.run(layer, index, text, states))
            else:
                calls.run_until(layer, index, text, states, last)
    return seen, outputs


class _LastMatrices:
    """The matrices whose products layers add to their outputs. It is found out once for each kind of layer and module."""

    def __init__(self) -> None:
        self._known: dict[tuple[type, str], bool] = {}

    def among(
        self, calls: LayerCalls, layer: nn.Module, index: int, places: Sequence[Site], hidden: torch.Tensor
    ) -> frozenset[str]:
        """Names of such weights; the arguments are those of `LayerCalls.adds`."""
        names = {id(module): name for name, module in layer.named_modules()}
        found = set()
        for site in places:
            if isinstance(site.module, PackedLinear) and site.module.out_features == hidden.shape[-1]:
                key = type(layer), names[id(site.module)]
                if key not in self._known:
                    self._known[key] = calls.adds(layer, index, site.module, hidden)
                if self._known[key]:
                    found.add(site.weights["weight"])
        return frozenset(found)


@dataclass(frozen=True)
class _Lag:
    """The outputs of a layer in the original model, and for the rounded model's hidden states, [1, n, H] for each text.

    `names`: the weights whose products are added to the output and that are not rounded yet; without any, the outputs are not
    used.
    """

    original: Sequence[torch.Tensor]
    rounded: Sequence[torch.Tensor]
    names: frozenset[str]

    def rows(self) -> list[torch.Tensor]:
        """What the matrices are to add, each an equal part, [n, H] for each text."""
        pairs = zip(self.original, self.rounded, strict=True)
        return [(a.float() - b.float()).flatten(0, 1) / len(self.names) for a, b in pairs]


@dataclass(frozen=True)
class _Part:
    """A matrix to round: the original, the new format, and where to write its tiles."""

    parameter: str
    source: PackedMatrix
    format: str
    tiles: torch.Tensor


class _Rounding:
    """Rounds and replaces modules. Attributes: places: the sites with matrices to round; outcome.

    Args:
        runtime: of the model.
        wanted: the formats to round a weight to, by its name and its own format.
        progress: see `round_in_place`.
    """

    def __init__(
        self, runtime: Runtime, wanted: Callable[[str, str], Collection[str]], progress: Callable[[int, int], None]
    ) -> None:
        self.runtime, self.backend, self._wanted, self._progress = runtime, runtime.backend, wanted, progress
        self.outcome, self.places = Outcome(), sites(runtime.model, whole_graph(runtime.model))
        self._sizes = {name: weight.nbytes for name, weight in _held(self.places).items()}
        self._done = 0
        self._threads = torch.get_num_threads()

    def round(self, places: Sequence[Site], seen: Inputs, exact: Inputs | None, lag: _Lag | None = None) -> None:
        """Rounds the matrices of some modules, each to its one format, and replaces the modules.

        The arguments are those of `rounded`.
        """
        put_in_place(places, {name: weight for (name, _), weight in self.rounded(places, seen, exact, lag).items()})
        self.runtime.replaced()

    def rounded(
        self, places: Sequence[Site], seen: Inputs, exact: Inputs | None, lag: _Lag | None = None
    ) -> dict[tuple[str, str], PackedWeight]:
        """The matrices of some modules by name and format, rounded; those that already have a format as they are.

        Args:
            places: the modules.
            seen: the inputs of the matrices in the rounded model.
            exact: their inputs in the original model; None: the same.
            lag: the error of the layer's output so far; None: there is none.
        """
        new: dict[tuple[str, str], PackedWeight] = {}
        parts: dict[tuple[str, str], _Part] = {}  # by the name of its inputs, and format
        held = _held(places)
        for name, weight in held.items():
            for format in self._wanted(name, weight.format):
                new[name, format] = weight if weight.format == format else _empty(weight, format)
                parts |= {(part, format): to for part, to in _parts(name, weight, new[name, format]).items()}
        known = [key for key, part in parts.items() if part.format in GROUP_FORMATS and seen.enough(key[0], part.source.cols)]
        # Rounding is thousands of short operations, which several threads of torch would slow down: each matrix has one.
        with one_torch_thread(), ThreadPoolExecutor(self._threads) as pool:
            running = []
            for names in seen.shared(list(dict.fromkeys(name for name, _ in known))):
                for format in dict.fromkeys(format for name, format in known if name in names):
                    same = [name for name in names if (name, format) in parts]
                    chosen = [parts[name, format] for name in same]
                    problem = self._problem(chosen, same[0], seen, exact, lag)
                    running.append(pool.submit(_round_parts, chosen, *problem, self.backend.pack))
            for done in running:
                self.outcome.compensated += done.result()
        importance = _importance_by_parameter({name: part for (name, _), part in parts.items()}, seen)
        for key, part in parts.items():
            if key not in known:
                self._plain(part, importance.get(part.parameter) if part.format in WEIGHED else None)
                self.outcome.starved += exact is not None and part.format in GROUP_FORMATS
        self._done += sum(self._sizes.pop(name, 0) for name in held)
        self._progress(self._done, self._done + sum(self._sizes.values()))
        return new

    def _problem(
        self, parts: Sequence[_Part], name: str, seen: Inputs, exact: Inputs | None, lag: _Lag | None
    ) -> tuple[torch.Tensor, Curvature]:
        """The weights to round of matrices that have the same inputs, one below the other, and the curvature of these inputs.

        `name`: of one of the matrices.
        """
        rows, format = seen.rows[name], GROUP_FORMATS[parts[0].format]
        missing = -parts[0].source.cols % TILE_COLS
        moment = moment_of(rows, rows, self.backend)
        if parts[0].parameter in self._tied:
            moment.diagonal().add_(EMBEDDING_SHARE * moment.diagonal().mean())
        moment = nn.functional.pad(moment, (0, missing, 0, missing))
        exactly = moment.double() if len(moment) <= EXACT_COLUMNS else moment
        factored = curvature(exactly, format.run).to(torch.float32)
        weights = nn.functional.pad(torch.cat([self.backend.unpack(part.source) for part in parts]), (0, missing))
        if lag is None or exact is None or name != parts[0].parameter:  # experts may get other tokens in the original model
            return weights, factored
        if parts[0].parameter in lag.names and len(parts) == 1:
            wanted = OUTPUT_SHARE * moment_of(lag.rows(), rows, self.backend)
        else:
            error = [x.float() - y.float() for x, y in zip(exact.rows[name], rows, strict=True)]
            wanted = INPUT_SHARE * weights[:, : parts[0].source.cols] @ moment_of(error, rows, self.backend)
        wanted = nn.functional.pad(wanted, (0, missing)) / moment.diagonal().mean().clamp_min(1e-30)
        return with_product(weights, wanted, factored), factored

    def _plain(self, part: _Part, importance: torch.Tensor | None) -> None:
        weight = self.backend.unpack(part.source)
        self.backend.pack(weight, part.format, part.tiles, importance)
        _check_overflow(part, weight)
        if part.format in WEIGHED:
            self.outcome.plain[part.parameter] = self.outcome.plain.get(part.parameter, 0) + 1

    @property
    def _tied(self) -> frozenset[str]:
        return frozenset((self.runtime.model.all_tied_weights_keys or {}).values())


def _round_parts(parts: Sequence[_Part], weights: torch.Tensor, curvature: Curvature, packer: Packer) -> int:
    """Rounds matrices that are one below the other in `weights`, and writes their tiles. Returns their number."""
    format = GROUP_FORMATS[parts[0].format]
    found = compensated(weights, curvature, format, packer=packer)
    sizes = [part.source.rows for part in parts]
    columns = zip(*(parameter.split(sizes) for parameter in found.parameters), strict=True)
    for part, codes, parameters in zip(parts, found.codes.split(sizes), columns, strict=True):
        part.tiles.copy_(format.tiles(codes, parameters))
    for part, rows in zip(parts, weights.split(sizes), strict=True):
        _check_overflow(part, rows[:, : part.source.cols])
    return len(parts)


def _check_overflow(part: _Part, weight: torch.Tensor) -> None:
    if (problem := overflow_of(weight, part.tiles, part.format)) is not None:
        raise ConfigError(f"{part.parameter} {problem}")


def _held(places: Sequence[Site]) -> dict[str, PackedWeight]:
    """The weights of modules by name, those that several share once."""
    modules: list[tuple[Site, Any]] = [(site, site.module) for site in places]
    return {site.weights[leaf]: weight for site, module in modules for leaf, weight in module.held().items()}


def _empty(weight: PackedWeight, format: str) -> PackedWeight:
    tile_bytes = get_format(format).tile_bytes
    if isinstance(weight, PackedStack):
        return PackedStack(format, *weight.shape, empty_stack(*weight.shape, tile_bytes))
    return PackedMatrix(format, *weight.shape, empty_tiles(*weight.shape, tile_bytes))


def _parts(name: str, source: PackedWeight, new: PackedWeight) -> dict[str, _Part]:
    """The matrices to round of one parameter, by name: itself, or `NAME.INDEX` for those of a stack; none if it stays."""
    if new is source:
        return {}
    if isinstance(source, PackedStack):
        return {f"{name}.{i}": _Part(name, source.matrix(i), new.format, tiles) for i, tiles in enumerate(new.data)}
    return {name: _Part(name, source, new.format, new.data)}


def _importance_by_parameter(parts: Mapping[str, _Part], seen: Inputs) -> dict[str, torch.Tensor]:
    """Column importance over the inputs of all matrices of a parameter, for those that had too few inputs themselves."""
    columns = ColumnSquares()
    for name, part in parts.items():
        for rows in seen.rows.get(name, ()):
            columns.add(part.parameter, rows)
    return columns.importance()
