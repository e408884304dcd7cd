"""`reference/ops.md`: the operations of a graph."""

from __future__ import annotations

from deepseek_optimizer.graph.ops.markdown import markdown

INTRODUCTION = """\
# Graph operations

This page is generated from the code by `python -m docs.generate`. A model is compiled from a graph of these operations;
[Architecture](../architecture.md) describes how.
"""


def page() -> str:
    return f"{INTRODUCTION.rstrip()}\n\n{markdown().removeprefix('# Ops').strip()}"
