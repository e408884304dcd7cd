"""`reference/ops.md`: the operations of a graph."""

from __future__ import annotations

import importlib.util
import inspect

INTRODUCTION = """\
# Graph operations

This page is generated from the code by `python -m docs.generate`. A model is compiled from a graph of these operations;
[Architecture](../architecture.md) says where each step of that lives.
"""


def page() -> str:
    if importlib.util.find_spec("deepseek_optimizer.graph.ops") is not None:
        from deepseek_optimizer.graph import ops  # type: ignore[attr-defined,unused-ignore]

        if hasattr(ops, "markdown"):
            return f"{INTRODUCTION.rstrip()}\n\n{ops.markdown().strip()}"
    from deepseek_optimizer.graph import ir

    return f"{INTRODUCTION.rstrip()}\n\n{_joined(inspect.cleandoc(ir.__doc__ or ''))}"


def _joined(text: str) -> str:
    """The docstring with table rows that were wrapped put back on one line each."""
    lines: list[str] = []
    for line in text.splitlines():
        if lines and lines[-1].startswith("|") and not lines[-1].rstrip().endswith("|") and line.strip():
            lines[-1] = f"{lines[-1]} {line.strip()}"
        else:
            lines.append(line)
    return "\n".join(lines)
