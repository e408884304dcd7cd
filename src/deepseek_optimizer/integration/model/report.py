"""The report about an optimized model, as a table for people and as a dict for programs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ...backends.base import BLOCK_TOKENS
from ...backends.nested_weights import bytes_read
from ...backends.qualities import QUALITIES
from ...config import BUILT_IN_TEXT
from ...graph.attention_mode import forgetting
from ...graph.ir import Graph, LatentSpec
from ...graph.min_formats import min_formats
from ...graph.rules import RULES
from ...quant import WEIGHED, PackedStack, PackedWeight
from ...system.memory import mb
from ..bind.graphs import loaded_mtp_layers, whole_graph
from ..bind.swap import matrices_of
from .parameter_count import parameter_bytes


@dataclass(frozen=True)
class RuleRow:
    """One fusion rule: how often it was applied, and to which nodes."""

    rule: str
    count: int
    places: tuple[str, ...]


@dataclass(frozen=True)
class FormatRow:
    """The matrices of one weight format."""

    format: str
    matrices: int
    weights: int
    bytes: int


@dataclass(frozen=True)
class ExpertsRow:
    """The layers with experts.

    Attributes:
        layers: number of such layers.
        experts, chosen: experts per layer, and how many of them each token uses.
        bytes: size of all experts.
        on_cpu: number of layers whose experts the CPU computes for a model on a device, the first ones.
        placement: where the experts are, and why; "" if there was nothing to decide.
    """

    layers: int
    experts: int
    chosen: int
    bytes: int
    on_cpu: int = 0
    placement: str = ""


@dataclass(frozen=True)
class AttentionRow:
    """The attention mode.

    Attributes:
        mode: its name.
        window, sinks, budget: its settings in tokens; 0 where it has none.
        layers: number of layers in this mode.
        own: number of layers that keep the window or the selection they were trained with.
        forgets: whether the cache drops tokens that are visible to no later token.
        own_forgets: whether it does so only in layers that keep the window they were trained with.
    """

    mode: str
    window: int
    sinks: int
    budget: int
    layers: int
    own: int
    forgets: bool
    own_forgets: bool = False


@dataclass(frozen=True)
class Report:
    """What was optimized in a model, and how.

    Attributes:
        family, backend, detail: the model's family; the backend; its ISA and threads, or its device.
        isa, threads: of the native backend; None for others.
        rules: what each fusion rule changed; rules_left_out: rules that the settings leave out.
        formats: the weight formats.
        curve: if formats were chosen for a `kl_budget`: the sizes and KL divergences that were measured, by ascending size.
        rounding: how the weights were rounded with calibration (`Manifest.rounding`); empty: without.
        kernels: one row per operation of the plan, as described by the backend.
        attention: the attention mode.
        bytes_before, bytes_after: size of the weights as given (in the files, or as float parameters), and now.
        kv_cache, kv_block_bytes, kv_token_bytes: format of the KV cache; bytes of a block of 32 tokens, and of one token
            (without the int8 copies of a sequence's newest tokens that an int4 cache has).
        state_bytes: bytes of a sequence's recurrent states, whatever its length; 0: the model has none.
        kv_limit, kv_limit_why: maximum size of the cache in bytes, and its reason.
        latent: whether the cache holds latents (MLA) instead of keys and values.
        experts: the experts; None: the model has none.
        mtp_layers: number of layers for multi-token prediction; included in the sizes of weights and cache.
        config: the settings.
        qualities: bytes of the weights that each quality of requests reads, if the model has several.
        profile: which profile of `dso tune` was taken, or why none was; None: none was asked for.
        warnings: what works, but more slowly than it could, or is not exactly as stored.
    """

    family: str
    backend: str
    detail: str
    isa: str | None
    threads: int | None
    rules: tuple[RuleRow, ...]
    rules_left_out: tuple[str, ...]
    formats: tuple[FormatRow, ...]
    curve: tuple[dict[str, Any], ...]
    rounding: dict[str, Any]
    kernels: tuple[dict[str, Any], ...]
    attention: AttentionRow
    bytes_before: int | None
    bytes_after: int
    kv_cache: str
    kv_block_bytes: int
    kv_token_bytes: int
    state_bytes: int
    kv_limit: int
    kv_limit_why: str
    latent: bool
    experts: ExpertsRow | None
    mtp_layers: int
    config: dict[str, Any]
    warnings: tuple[str, ...]
    profile: str | None = None
    qualities: dict[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The report as a dict of JSON types."""
        result: dict[str, Any] = _plain(asdict(self))
        return result

    def __rich__(self) -> Any:
        """A table for rich's `print`."""
        from rich.table import Table

        table = Table(title=f"{self.family} on {self.backend} ({self.detail})", title_justify="left", show_header=False)
        table.add_column(style="bold")
        table.add_column(overflow="fold")
        table.add_row("weights", self._weights())
        for row in self.formats:
            size = f"{row.weights / 1e6:,.1f} M weights, {row.bytes / 1e6:,.1f} MB"
            table.add_row(f"  {row.format}", f"{row.matrices} matrices, {size}")
        if self.qualities:
            read = (f"{name} {size / 1e6:,.1f} MB" for name, size in self.qualities.items())
            table.add_row("bytes read", f"by quality of a request: {', '.join(read)}")
        for point in self.curve:
            table.add_row(f"  {point['bits']:.2f} bits{' (chosen)' if point['chosen'] else ''}", _point(point))
        if self.rounding:
            table.add_row("calibrated on", f"{self.rounding['text']}, {self.rounding['tokens']:,} tokens")
        elif self.curve and self.config["calibration"] not in (None, BUILT_IN_TEXT):
            table.add_row("calibration text", self.config["calibration"])
        elif self.config["precision"] in WEIGHED:
            table.add_row("calibrated on", "no text; `dso convert` calibrates, which makes 4-bit weights better")
        if (e := self.experts) is not None:
            table.add_row("experts", f"{e.layers} layers of {e.experts}, {e.chosen} per token, {e.bytes / 1e6:,.1f} MB")
            if e.placement:
                table.add_row("", e.placement)
        if self.mtp_layers:
            table.add_row("MTP layers", f"{self.mtp_layers}, for drafts: generate(use_mtp=True)")
        table.add_row("attention", _attention_text(self.attention))
        kind = f"{self.kv_cache} latents" if self.latent else self.kv_cache
        if self.config["sparse_attention"] and self.config["kv_cache"] == "auto" and self.kv_cache == "int8":
            kind += " (sparse_attention)"
        table.add_row("KV cache", f"{kind}, {self.kv_token_bytes:,} bytes per token ({self.kv_token_bytes / 1024:,.1f} KiB)")
        table.add_row("", f"grows to at most {mb(self.kv_limit)} ({self.kv_limit_why})")
        if self.state_bytes:
            table.add_row("recurrent states", f"fp32, {self.state_bytes / 1e6:,.2f} MB per sequence and stored prefix")
        for rule in self.rules:
            table.add_row(f"rule {rule.rule}", f"applied {rule.count} times{_sample(rule.places)}")
        if self.rules_left_out:
            table.add_row("rules left out", ", ".join(self.rules_left_out))
        for (op, kernel), count in Counter((str(k.get("op")), _kernel(k)) for k in self.kernels).items():
            table.add_row(f"{count} x {op}", kernel)
        if self.profile is not None:
            table.add_row("tuned", self.profile)
        for warning in self.warnings:
            table.add_row("note", warning)
        return table

    def _weights(self) -> str:
        after = f"{self.bytes_after / 1e6:,.1f} MB"
        if not self.bytes_before:
            return after
        return f"{self.bytes_before / 1e6:,.1f} MB -> {after} ({self.bytes_after / self.bytes_before:.0%})"

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=120, highlight=False)
        with console.capture() as capture:
            console.print(self)
        return capture.get().rstrip("\n")


def _attention_text(row: AttentionRow) -> str:
    parts = {
        "sliding": f"the latest {row.window:,} tokens and the first {row.sinks}",
        "sparse": f"at most {row.budget:,} tokens: blocks of the first {row.sinks}, the latest {row.window:,}, and those "
        "ranked highest for a query",
    }
    texts = []
    if row.layers:
        texts.append(f"{parts.get(row.mode, 'all preceding tokens')}, in {_layers(row.layers)}")
    if row.own:
        texts.append(f"as trained in {_layers(row.own)}")
    if row.forgets:
        texts.append("the cache drops the rest")
    if row.own_forgets:
        texts.append("their cache drops the rest")
    return f"{row.mode}: {'; '.join(texts)}"


def _layers(count: int) -> str:
    return f"{count} layer{'' if count == 1 else 's'}"


def _attention(runtime: Any) -> AttentionRow:
    mode, config = runtime.config.attention, runtime.config
    nodes = [n for n in runtime.graph.nodes if n.op in ("attention", "mla_attention", "compressed_attention")]
    limited = sum(bool(n.attrs.get("window")) or len(n.inputs) > 1 for n in nodes)
    own = limited - len(runtime.in_mode)
    return AttentionRow(
        mode=config.attention_optimization if mode.kind == "flash" else mode.kind,
        window=mode.window,
        sinks=mode.sinks if mode.kind != "flash" else 0,
        budget=mode.budget if mode.kind == "sparse" else 0,
        layers=len(nodes) - own,
        own=own,
        forgets=forgetting(runtime.graph) is not None,
        own_forgets=runtime.graph.cache.own_groups > 1,
    )


def _point(point: dict[str, Any]) -> str:
    counts = ", ".join(f"{count} {name}" for name, count in point["formats"].items())
    return f"{point['bytes'] / 1e6:,.1f} MB, KL {point['measured_kl']:.2g}: {counts}"


def _kernel(row: dict[str, Any]) -> str:
    """The properties of an operation's kernel, without names and sizes."""
    own = ("op", "output", "weights", "bytes", "prefill_bytes")
    parts = (f"{name} {value}" for name, value in row.items() if name not in own and value)
    return ", ".join(parts)


def _sample(places: tuple[str, ...], shown: int = 3) -> str:
    if not places:
        return ""
    more = f", ... {places[-1]}" if len(places) > shown else ""
    return f": {', '.join(places[:shown])}{more}"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(v) for name, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def _matrices(weight: PackedWeight) -> int:
    return weight.count if isinstance(weight, PackedStack) else 1


def _experts(graph: Graph, matrices: Mapping[str, PackedWeight], placement: Any) -> ExpertsRow | None:
    routers = [node for node in graph.nodes if node.op in ("router", "hash_router")]
    if not routers:
        return None
    size = sum(weight.nbytes for weight in matrices.values() if isinstance(weight, PackedStack))
    where = (0, "") if placement is None else (placement.on_host, str(placement))
    return ExpertsRow(len(routers), routers[0].attrs["experts"], routers[0].attrs["top_k"], size, *where)


def _kept_larger(config: Any, graph: Graph, matrices: Mapping[str, PackedWeight]) -> list[str]:
    """One line for each kind of matrix that stays larger than `precision`."""
    counts: dict[tuple[str, str], int] = {}
    for name in min_formats(graph):
        path, format = name.removesuffix(".weight"), matrices[name].format
        if config.precision not in ("auto", format) and config.named_format(path) is None:
            key = path.rpartition(".")[2], format
            counts[key] = counts.get(key, 0) + 1
    return [
        f"{count} x {kind} kept in {format}, because {config.precision} loses more quality there; override it with `formats`"
        for (kind, format), count in counts.items()
    ]


def make_report(runtime: Any) -> Report:
    """The report of an optimized model's runtime."""
    backend, graph, whole = runtime.backend, runtime.graph, whole_graph(runtime.model)
    matrices = matrices_of(runtime.model, whole)
    formats: dict[str, list[PackedWeight]] = {}
    for matrix in matrices.values():
        formats.setdefault(matrix.format, []).append(matrix)
    block_bytes, size = backend.block_bytes(graph, runtime.kv_dtype), runtime.cache_size
    applied = tuple(RuleRow(r.rule, r.count, r.places) for r in runtime.rules)
    return Report(
        family=graph.family,
        backend=backend.name,
        detail=backend.detail,
        isa=backend.isa,
        threads=backend.threads,
        rules=applied,
        rules_left_out=tuple(name for name in RULES if name not in {row.rule for row in applied}),
        formats=tuple(
            FormatRow(name, sum(map(_matrices, packed)), sum(math.prod(m.shape) for m in packed), sum(m.nbytes for m in packed))
            for name, packed in formats.items()
        ),
        curve=tuple(dict(point) for point in runtime.manifest.curve),
        rounding=dict(runtime.manifest.rounding),
        kernels=tuple(runtime.plan.describe()),
        bytes_before=runtime.bytes_before,
        bytes_after=parameter_bytes(runtime.model),
        attention=_attention(runtime),
        kv_cache=runtime.kv_dtype,
        kv_block_bytes=block_bytes,
        kv_token_bytes=graph.cache.own_groups * block_bytes // BLOCK_TOKENS,
        state_bytes=backend.state_bytes(graph) if graph.states else 0,
        kv_limit=size.bytes,
        kv_limit_why=size.why,
        latent=isinstance(graph.cache, LatentSpec),
        experts=_experts(whole, matrices, runtime.placement),
        mtp_layers=loaded_mtp_layers(runtime.model),
        config=runtime.config.to_dict(),
        warnings=(*runtime.notes, *_kept_larger(runtime.config, whole, matrices)),
        profile=runtime.profile_note,
        qualities={q: bytes_read(q, graph, matrices) for q in QUALITIES} if runtime.has_qualities else {},
    )
