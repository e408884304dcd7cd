"""Text is read and written as UTF-8 in every locale: each call names the encoding."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import deepseek_optimizer

SOURCES = [Path(deepseek_optimizer.__file__).parent, Path(deepseek_optimizer.__file__).parents[1] / "deepseek_optimizer_cli"]
_OPENED_AS_TEXT = ("open", "fdopen", "TemporaryFile", "NamedTemporaryFile", "SpooledTemporaryFile")


def silent_places(source: str) -> Iterator[int]:
    """Lines of calls that read or write text in the locale's encoding."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        named = {keyword.arg: keyword.value for keyword in node.keywords}
        method = isinstance(node.func, ast.Attribute)
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if "encoding" in named:
            continue
        if method and name in ("read_text", "write_text"):
            yield node.lineno
        elif "text" in named or "universal_newlines" in named:  # calls of subprocess
            if name in ("run", "Popen", "check_output", "check_call"):
                yield node.lineno
        elif name == "TextIOWrapper" and len(node.args) < 2:
            yield node.lineno
        elif name in _OPENED_AS_TEXT and not (method and getattr(node.func.value, "id", "") == "os" and name == "open"):
            by_name = named.get("mode")
            at = 0 if "Temporary" in name or (method and name == "open") else 1
            mode = by_name or (node.args[at] if len(node.args) > at else None)
            text = mode.value if isinstance(mode, ast.Constant) else None
            if mode is None and ("Temporary" in name or (name == "open" and node.args and method)):  # bytes
                continue
            if mode is None or (isinstance(text, str) and "b" not in text):
                yield node.lineno


@pytest.mark.parametrize(
    "call",
    [
        "open(p)", "open(p, 'w')", "open(p, mode='a')", "path.open()", "path.open('w')", "path.read_text()", "os.fdopen(d)",
        "path.write_text('x')", "subprocess.run(c, text=True)", "tempfile.TemporaryFile('w+')", "io.TextIOWrapper(f)",
    ],
)  # fmt: skip
def test_the_search_detects_missing_encodings(call):
    assert list(silent_places(call)) == [1]
    assert not list(silent_places(call.removesuffix(")") + ("" if call.endswith("()") else ", ") + "encoding='utf-8')"))


@pytest.mark.parametrize("call", ["open(p, 'rb')", "os.open(p, f)", "path.open('wb')", "tempfile.TemporaryFile()", "run(c)"])
def test_binary_modes_need_no_encoding(call):
    assert not list(silent_places(call))


@pytest.mark.every_run
def test_every_text_names_its_encoding():
    actual = [
        f"{path}:{line}"
        for folder in SOURCES
        for path in sorted(folder.rglob("*.py"))
        for line in silent_places(path.read_text(encoding="utf-8"))
    ]
    assert not actual
