"""The table of ops as Markdown, for the documentation."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator

from . import OPS
from .spec import REQUIRED, Attr, Operand, OpSpec

_ORIGINS = {
    "model": "Ops of model graphs",
    "rule": "Ops created by fusion rules and attention modes",
    "lowering": "Ops created by a backend during compilation",
}
_INTRO = """\
A graph describes one step of a decoder over T token rows, without padding. Of these, R rows are selected for logits. Values are
float rows `[T, width]`, or `[R, width]` once rows have been selected. Nodes run in list order, which matters where they use the
cache. V: size of the vocabulary; H: hidden size; E: number of experts. A block is 32 tokens of the cache.
"""


def markdown() -> str:
    """One section per op: formula, source, operands, attributes, effects."""
    parts = ["# Ops", _INTRO]
    for origin, title in _ORIGINS.items():
        parts.append(f"## {title}")
        parts += ["\n".join(_section(spec)) for spec in OPS.values() if spec.origin == origin]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _section(spec: OpSpec) -> Iterator[str]:
    yield f"### {spec.name}\n\n{inspect.cleandoc(spec.doc)}\n"
    yield f"- Inputs: {_operands(spec.inputs)}"
    yield f"- Outputs: {_operands(spec.outputs)}"
    if spec.weights:
        yield f"- Weights: {_operands(spec.weights)}"
    if spec.attrs:
        yield "- Attributes: " + "; ".join(map(_attribute, spec.attrs))
    effects = [
        f"{verb} the {part} of its layer" for verb, part in (("reads", spec.reads), ("writes", spec.writes)) if part is not None
    ]
    effects += [f"returns {spec.returns}"] if spec.returns else []
    if effects:
        yield f"- Effects: {', '.join(effects)}"
    if spec.in_place:
        pairs = (f"`{spec.outputs[out].name}` over `{spec.inputs[source].name}`" for out, source in spec.in_place)
        yield f"- In place: {', '.join(pairs)}"
    if spec.kernels:
        yield f"- Native kernels: {spec.kernels}"


def _operands(operands: Iterable[Operand]) -> str:
    texts = (f"`{o.name} {o.shape}`" + (", optional" if o.optional else ", one or more" if o.many else "") for o in operands)
    return "; ".join(texts) or "none"


def _attribute(attr: Attr) -> str:
    default = "" if attr.default is REQUIRED else f", default {attr.default}"
    return f"`{attr.name}` ({attr.type.text}{default})" + (f": {attr.doc}" if attr.doc else "")
