"""RoBERTa (Liu et al. 2019): BERT whose embeddings count positions from `pad_token_id` + 1."""

from __future__ import annotations

from ..graph.ir import Graph
from . import bert
from .fields import Fields


def build(fields: Fields) -> Graph:
    """The unfused graph."""
    return bert.build(fields, "roberta")
