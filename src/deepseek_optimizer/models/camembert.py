"""CamemBERT (Martin et al. 2020): RoBERTa in French."""

from __future__ import annotations

from ..graph.ir import Graph
from . import bert
from .fields import Fields


def build(fields: Fields) -> Graph:
    """The unfused graph."""
    return bert.build(fields, "camembert")
