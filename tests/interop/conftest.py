"""Other projects' packages with optimized models. They are large, so `make test-interop` has its own environment; these tests
are collected only there."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import pytest

PACKAGES = (
    "agents", "anthropic", "instructor", "litellm", "llama_index", "lm_eval", "ollama", "pydantic_ai", "sentence_transformers",
    "smolagents", "trl",
)  # fmt: skip
if os.environ.get("DSO_INTEROP") == "1":
    collect_ignore_glob: list[str] = []  # a missing package is a failure
elif any(find_spec(name) is None for name in PACKAGES):
    collect_ignore_glob = ["test_*.py", "clients/test_*.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """For `--dist loadgroup`: the tests of a file share servers, and clusters of Ray take all processors that they find."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            name = "ray" if item.path.name.startswith("test_ray") else str(item.path)
            item.add_marker(pytest.mark.xdist_group(name))
