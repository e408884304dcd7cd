"""The engine does not import torch, except in the runner of plans, its part for pictures and the sampler for `generate`."""

import ast
from pathlib import Path

import deepseek_optimizer.engine as engine

WITH_TORCH = {"runner.py", "picture_steps.py", "torch_sampler.py"}


def imported(tree):
    """Modules that a file imports when it is imported."""
    nodes = list(tree.body)
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.If):
            if "TYPE_CHECKING" not in ast.dump(node.test):
                nodes += [*node.body, *node.orelse]
        elif isinstance(node, (ast.Try, ast.ClassDef)):
            nodes += node.body
        elif isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "")


def test_no_torch():
    folder = Path(engine.__file__).parent
    files = sorted(folder.rglob("*.py"))
    assert len(files) > 25
    for file in files:
        names = set(imported(ast.parse(file.read_text())))
        if file.name in WITH_TORCH:
            assert "torch" in names
            continue
        assert not any(name.split(".")[0] in ("torch", "transformers") for name in names), file
        assert not any(name.rstrip().endswith(("runner", "picture_steps", "torch_sampler")) for name in names), file
