"""The families of models and what is supported for each, derived from `models/families.py` and the graphs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from ..errors import ConfigError, UnsupportedModelError
from ..models import ENCODERS, FAMILIES, MULTIMODAL, Family, build_graph, has_mtp
from .known import MODELS

PLAN, MIXED, GENERAL = "plan", "plan and general", "general"
EVERY_OTHER = "any other of Transformers"


@dataclass(frozen=True)
class FamilyRow:
    """One family.

    Attributes:
        family: `model_type`, or `EVERY_OTHER`.
        path: "plan": an execution plan; "general": Transformers' forward with packed linear layers; "plan and general": a plan
            for the language model of a model that sees.
        formats: weight formats.
        attention: attention modes (`DeepSeekConfig.attention_optimization`).
        drafts: sources of drafts for speculative decoding.
        training: what trains it.
        examples: names of well-known models.
    """

    family: str
    path: str
    formats: tuple[str, ...]
    attention: tuple[str, ...]
    drafts: tuple[str, ...]
    training: tuple[str, ...]
    examples: tuple[str, ...]


def families() -> Iterator[FamilyRow]:
    """All families: those with a plan, those that only training knows, encoders, models that see, well-known ones on the
    general path, and the rest."""
    for name, family in FAMILIES.items():
        if family.alone:
            yield _row(name, family)
    for name in ENCODERS:
        yield replace(_row(name, None), path=PLAN, attention=("bidirectional",), drafts=())
    for name in MULTIMODAL:
        yield replace(_row(name, None), path=MIXED, attention=("flash", "eager"), drafts=("prompt lookup", "draft model"))
    for name in dict.fromkeys(model.family for model in MODELS):
        if name not in FAMILIES and name not in ENCODERS and name not in MULTIMODAL:
            yield _row(name, None)
    yield _row(EVERY_OTHER, None)


def _row(name: str, family: Family | None) -> FamilyRow:
    from ..quant import FORMATS

    planned = family is not None and family.served
    trainers = ("dso train",) if planned else ()
    return FamilyRow(
        family=name,
        path=PLAN if planned else GENERAL,
        formats=tuple(FORMATS),
        attention=_modes(name) if planned else ("Transformers'",),
        drafts=_drafts(name) if planned else ("Transformers'",),
        training=(*trainers, *(_native(family) if family is not None else ("heads", "adapters"))),
        examples=tuple(model.name.rpartition("/")[2] for model in MODELS if model.family == name),
    )


def _modes(family: str) -> tuple[str, ...]:
    """The attention modes that have an effect on the family's first known model, or else on its default config."""
    from transformers import CONFIG_MAPPING

    from ..config import DeepSeekConfig
    from ..graph.attention_mode import apply_mode
    from ..graph.rules import apply

    fields = next((model.fields for model in MODELS if model.family == family), {})
    try:
        graph = apply(build_graph(CONFIG_MAPPING[family](**fields)), None)[0]
    except ConfigError:  # a default that the family file does not support
        return ("flash", "eager")

    def changes(mode: Any) -> bool:
        try:
            return bool(apply_mode(graph, mode)[1])
        except UnsupportedModelError:
            return False

    modes = (DeepSeekConfig(attention_optimization=kind).attention for kind in ("sliding", "sparse"))
    return ("flash", "eager", *(mode.kind for mode in modes if changes(mode)))


def _drafts(family: str) -> tuple[str, ...]:
    return ("prompt lookup", "draft model", *(("MTP layers",) if has_mtp(family) else ()))


def _native(family: Family) -> tuple[str, ...]:
    """The parts of a decoder layer whose training forward and gradient run on our kernels, besides the linear layers."""
    parts = {"attention": family.rotates_halves, "layers": family.plain_residuals, "head": family.plain_head}
    return tuple(f"native {part}" for part, native in parts.items() if native)
