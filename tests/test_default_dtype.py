"""The host program's default dtype and device of torch do not change our results."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
import torch

import deepseek_optimizer
from deepseek_optimizer.models.fields import Fields
from deepseek_optimizer.models.rope import read_rope
from support import warm_python

FACTORIES = {
    "arange", "as_tensor", "asarray", "empty", "empty_strided", "eye", "frombuffer", "full", "linspace", "logspace", "normal",
    "ones", "rand", "randint", "randn", "randperm", "range", "scalar_tensor", "tensor", "tril_indices", "triu_indices", "zeros",
}  # fmt: skip
SOURCE = Path(deepseek_optimizer.__file__).parent


def unnamed(tree: ast.AST) -> list[str]:
    """Calls of torch's factories without an explicit dtype or device."""
    result = []
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Attribute(value=ast.Name(id="torch"), attr=name)) if name in FACTORIES:
                wanted = {"dtype"} if name == "frombuffer" else {"dtype", "device"}  # frombuffer is always on the CPU
                if missing := sorted(wanted - {keyword.arg for keyword in node.keywords}):
                    result.append(f"line {node.lineno}: torch.{name} without {' and '.join(missing)}")
    return result


@pytest.mark.every_run
def test_every_factory_names_its_dtype_and_device():
    files = sorted(SOURCE.rglob("*.py"))
    assert len(files) > 200
    wrong = [f"{file.relative_to(SOURCE)}: {what}" for file in files for what in unnamed(ast.parse(file.read_text()))]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("code", "count"),
    [
        ("torch.empty(3)", 1),
        ("torch.zeros((2, 3), dtype=torch.float32)", 1),
        ("torch.full(s, 0.0, device='cpu')", 1),
        ("torch.rand((), dtype=torch.float32, device='cpu')", 0),
        ("torch.zeros_like(x) + x.new_empty(3)", 0),
        ("torch.frombuffer(b, dtype=torch.uint8)", 0),
    ],
)
def test_a_factory_without_them_is_detected(code, count):
    assert len(unnamed(ast.parse(code))) == count


def test_answers_are_the_same_under_every_default(tiny_model):
    """Bitwise equal, from forwards, generation, the engine, a cache's contents, files and training."""
    defaults = ["float32", "bfloat16", "float64", "device:meta"]
    code = "import runpy; runpy.run_module('support.answers', run_name='__main__')"
    done = warm_python.run(code, tiny_model, *defaults, timeout=300)
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stderr[-3000:]}"
    expected, *others = map(json.loads, done.stdout.splitlines())
    assert len(expected) > 20 and len(others) == 3
    for default, actual in zip(defaults[1:], others, strict=True):
        assert {k for k in expected if actual[k] != expected[k]} == set(), default


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_frequencies_of_a_long_context_are_the_same(dtype):
    fields = Fields({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 3.3}})
    spec = read_rope(fields, 64, 128)
    expected = spec.inv_freq_at(777)
    torch.set_default_dtype(dtype)
    try:
        actual = spec.inv_freq_at(777)
    finally:
        torch.set_default_dtype(torch.float32)
    assert (actual == expected).all()
