"""`reference/ops.md`: the operations of a graph."""

from __future__ import annotations

import importlib
import importlib.util
import inspect

INTRODUCTION = """\
# Graph operations

This page is generated from the code by `python -m docs.generate`. A model is compiled from a graph of these operations;
[Architecture](../architecture.md) says where each step of that lives.
"""


def page() -> str:
    if _table_exists():
        table = importlib.import_module("deepseek_optimizer.graph.ops.markdown").markdown().removeprefix("# Ops")
        return f"{INTRODUCTION.rstrip()}\n\n{table.strip()}"
    from deepseek_optimizer.graph import ir

    return f"{INTRODUCTION.rstrip()}\n\n{_joined(inspect.cleandoc(ir.__doc__ or ''))}"


def _table_exists() -> bool:
    """Whether the table of operations, graph/ops, is there to be rendered; else the docstring of graph/ir.py is shown."""
    try:
        return importlib.util.find_spec("deepseek_optimizer.graph.ops.markdown") is not None
    except ModuleNotFoundError:
        return False


def _joined(text: str) -> str:
    """The docstring with table rows that were wrapped put back on one line each."""
    lines: list[str] = []
    for line in text.splitlines():
        if lines and lines[-1].startswith("|") and not lines[-1].rstrip().endswith("|") and line.strip():
            lines[-1] = f"{lines[-1]} {line.strip()}"
        else:
            lines.append(line)
    return "\n".join(lines)
