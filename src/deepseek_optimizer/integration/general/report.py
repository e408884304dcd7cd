"""The report about a model on the general path: what runs on our kernels, and what does not."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from ...quant import PackedStack, PackedWeight
from ..attention.registration import DSO_NATIVE
from ..bind.modules import Packed
from ..bind.packed_experts import PackedExperts
from ..bind.packed_model import PackedModel
from ..model.parameter_count import parameter_bytes
from ..model.report import FormatRow
from .feed_forward import FusedFeedForward
from .head import PackedHead
from .modules import GeneralLinear
from .norms import FusedNorm
from .swap import packable_layers

TRANSFORMERS = "attention, other activations, cache and generate: Transformers' own"
ATTENDING = "other activations, cache and generate: Transformers' own"


@dataclass(frozen=True)
class GeneralReport:
    """What was optimized in a model without an execution plan.

    Attributes:
        path: "general".
        family, model_class: `model_type` and Transformers' class of the model.
        reason: why there is no plan.
        backend, detail: the backend of the linear layers; its ISA and threads, or its device.
        isa, threads: of the native backend; None for others.
        formats: the weight formats of the packed layers.
        layers, experts: number of linear layers, and of modules of merged experts, that run on our kernels.
        blocks, norms: number of feed-forward blocks that run as one native call, and of norms that our kernels compute.
        native_attention: whether our kernels compute attention.
        head: format of the packed copy of the language model head's weight; None: it has none.
        parameters, packed_parameters: number of parameters, and how many of them are in these layers.
        in_torch: number of the other parameters by the class of their module, the most first.
        bytes_before, bytes_after: size of the weights as float parameters, and now.
        config: the settings.
        warnings: what works, but more slowly than it could, or is not exactly as stored.
    """

    path: str
    family: str
    model_class: str
    reason: str
    backend: str
    detail: str
    isa: str | None
    threads: int | None
    formats: tuple[FormatRow, ...]
    layers: int
    experts: int
    blocks: int
    norms: int
    native_attention: bool
    head: str | None
    parameters: int
    packed_parameters: int
    in_torch: dict[str, int]
    bytes_before: int | None
    bytes_after: int
    config: dict[str, Any]
    warnings: tuple[str, ...]

    title: ClassVar[str] = "general path"

    def remarks(self) -> list[tuple[str, str]]:
        """Rows of the table about what computes the rest of the model."""
        return [("", ATTENDING if self.native_attention else TRANSFORMERS), ("no plan", self.reason)]

    def to_dict(self) -> dict[str, Any]:
        """The report as a dict of JSON types."""
        return {**asdict(self), "formats": [asdict(row) for row in self.formats], "warnings": list(self.warnings)}

    def __rich__(self) -> Any:
        """A table for rich's `print`."""
        from rich.table import Table

        title = f"{self.model_class} ({self.family}) on {self.backend} ({self.detail}): {self.title}"
        table = Table(title=title, title_justify="left", show_header=False)
        table.add_column(style="bold")
        table.add_column(overflow="fold")
        before = f"{self.bytes_before / 1e6:,.1f} MB -> " if self.bytes_before else ""
        table.add_row("weights", f"{before}{self.bytes_after / 1e6:,.1f} MB")
        share = self.packed_parameters / max(self.parameters, 1)
        experts = f" and {self.experts} modules of experts" if self.experts else ""
        table.add_row("native", f"{self.layers} linear layers{experts}, {share:.0%} of the parameters")
        if self.blocks or self.norms:
            table.add_row("", f"{self.blocks} feed-forward blocks with their activations, {self.norms} norms")
        if self.native_attention:
            table.add_row("", "attention")
        if self.head is not None:
            table.add_row("", f"the head, by a {self.head} copy of its weight")
        for row in self.formats:
            size = f"{row.weights / 1e6:,.1f} M weights, {row.bytes / 1e6:,.1f} MB"
            table.add_row(f"  {row.format}", f"{row.matrices} matrices, {size}")
        rest = ", ".join(f"{kind} {count / 1e6:,.1f} M" for kind, count in self.in_torch.items())
        table.add_row("torch", f"parameters of {rest}" if rest else "")
        for name, text in self.remarks():
            table.add_row(name, text)
        for warning in self.warnings:
            table.add_row("note", warning)
        return table

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=120, highlight=False)
        with console.capture() as capture:
            console.print(self)
        return capture.get().rstrip("\n")


def make_report(runtime: PackedModel) -> GeneralReport:
    """The report of a model on the general path."""
    model, backend = runtime.model, runtime.backend
    layers = [layer for layer in packable_layers(model).values() if isinstance(layer, Packed)]
    packed = [weight for layer in layers for weight in layer.held().values()]
    formats: dict[str, list[PackedWeight]] = {}
    for weight in packed:
        formats.setdefault(weight.format, []).append(weight)
    rest: Counter[str] = Counter()
    counted: set[int] = set()
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None and not isinstance(module, Packed) and id(parameter) not in counted:
                counted.add(id(parameter))
                rest[type(module).__name__] += parameter.numel()
    biases = sum(layer.bias.numel() for layer in layers if isinstance(layer, GeneralLinear) and layer.bias is not None)
    native = sum(math.prod(weight.shape) for weight in packed) + biases
    return GeneralReport(
        path="general",
        family=str(model.config.model_type),
        model_class=type(model).__name__,
        reason=str(runtime.no_plan),
        backend=backend.name,
        detail=backend.detail,
        isa=backend.isa,
        threads=backend.threads,
        formats=tuple(
            FormatRow(name, sum(map(_count, ws)), sum(math.prod(w.shape) for w in ws), sum(w.nbytes for w in ws))
            for name, ws in formats.items()
        ),
        layers=sum(isinstance(layer, GeneralLinear) for layer in layers),
        experts=sum(isinstance(layer, PackedExperts) for layer in layers),
        blocks=sum(isinstance(module, FusedFeedForward) for module in model.modules()),
        norms=sum(isinstance(module, FusedNorm) for module in model.modules()),
        native_attention=model.config._attn_implementation == DSO_NATIVE,
        head=next((module.format for module in model.modules() if isinstance(module, PackedHead)), None),
        parameters=native + sum(rest.values()),
        packed_parameters=native,
        in_torch=dict(rest.most_common()),
        bytes_before=runtime.bytes_before,
        bytes_after=parameter_bytes(model) + sum(m.tiles.nbytes for m in model.modules() if isinstance(m, PackedHead)),
        config=runtime.config.to_dict(),
        warnings=tuple(runtime.notes),
    )


def _count(weight: PackedWeight) -> int:
    return weight.count if isinstance(weight, PackedStack) else 1
