"""Fusion rules: named rewrites of a graph, one per file, applied in a fixed order.

A rule is a function `rewrite(graph) -> (graph, places)`; `places` names where it was applied, for the report. After every rule
the graph is well formed and computes the same within rounding. To add a rule, write its file and add it to `RULES`, in order.
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

# `last_logits` comes before `layer_norm`, so that the final norm has its own rows and is not merged with the last residual add.
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
    """How often a rule was applied, and to which values or layers."""

    rule: str
    count: int
    places: tuple[str, ...]


def apply(graph: Graph, names: Sequence[str] | None = None) -> tuple[Graph, list[RuleReport]]:
    """Applies fusion rules, always in the order of `RULES`. The given graph is not changed.

    Args:
        graph: the graph.
        names: the rules to apply; None: all.

    Returns: the rewritten graph, and a report for each rule.

    Raises:
        GraphError: there is no rule of this name; the message suggests the most similar one.
    """
    wanted = tuple(RULES) if names is None else tuple(check_name(name) for name in names)
    reports = []
    for name, rewrite in RULES.items():
        if name in wanted:
            graph, places = rewrite(graph)
            reports.append(RuleReport(name, len(places), tuple(places)))
    return graph, reports


def check_name(name: str) -> str:
    """Returns `name` if there is a rule of this name; otherwise raises GraphError."""
    if name in RULES:
        return name
    near = difflib.get_close_matches(str(name), RULES, n=1, cutoff=0.0)
    raise GraphError(f"unknown fusion rule {name!r}; did you mean {near[0]!r}? Rules: {', '.join(RULES)}.")
