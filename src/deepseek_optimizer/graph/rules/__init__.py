"""Fusion rules: named rewrites of a graph, one a file, applied in a fixed order.

A rule is a function `rewrite(graph) -> (graph, places)`; `places` names where it fired, for the report. Every rule keeps the
graph well formed and its results the same within rounding. To add one, write its file and name it in `RULES`, in order.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from ...errors import GraphError
from ..ir import Graph
from . import attention_softmax, experts, gate_up, last_logits, layer_norm, mla_absorb, qkv, rope_cache

Rewrite = Callable[[Graph], tuple[Graph, list[str]]]

# `last_logits` comes before `layer_norm`: the final norm then has its own rows and stays apart from the last residual add.
RULES: Mapping[str, Rewrite] = MappingProxyType(
    {
        "qkv": qkv.rewrite,
        "rope_cache": rope_cache.rewrite,
        "attention_softmax": attention_softmax.rewrite,
        "mla_absorb": mla_absorb.rewrite,
        "experts": experts.rewrite,
        "last_logits": last_logits.rewrite,
        "layer_norm": layer_norm.rewrite,
        "gate_up": gate_up.rewrite,
    }
)


@dataclass(frozen=True)
class RuleReport:
    """What one rule did: how often it fired, and the values (or layers) where."""

    rule: str
    count: int
    places: tuple[str, ...]


def apply(graph: Graph, names: Sequence[str] | None = None) -> tuple[Graph, list[RuleReport]]:
    """The graph rewritten by the named rules (None: all), in the fixed order whatever order they are named in.

    The graph given is not changed.

    Raises:
        GraphError: a rule of this name does not exist; the message says which is nearest.
    """
    wanted = tuple(RULES) if names is None else tuple(check_name(name) for name in names)
    reports = []
    for name, rewrite in RULES.items():
        if name in wanted:
            graph, places = rewrite(graph)
            reports.append(RuleReport(name, len(places), tuple(places)))
    return graph, reports


def check_name(name: str) -> str:
    """`name` if it is a rule's."""
    if name in RULES:
        return name
    near = difflib.get_close_matches(str(name), RULES, n=1, cutoff=0.0)
    raise GraphError(f"unknown fusion rule {name!r}; did you mean {near[0]!r}? Known: {', '.join(RULES)}.")
