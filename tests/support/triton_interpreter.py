"""Tests of Triton's kernels run in its interpreter, on the CPU: `make test-cuda-interpreter`."""

from __future__ import annotations

import importlib.util
import os

import pytest


def require() -> None:
    """Skips the calling test file unless kernels are interpreted. Triton decides this when it is imported, which other packages
    may do first, so the environment variable must be set before Python starts."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip('Triton is not installed: pip install "deepseek-optimizer[cuda]"', allow_module_level=True)
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("TRITON_INTERPRET=1 must be set: make test-cuda-interpreter", allow_module_level=True)
