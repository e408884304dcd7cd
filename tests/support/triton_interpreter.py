"""Where the tests of Triton's kernels run: in its interpreter, on the CPU (`make test-cuda-interpreter`), and those of whole
models also on a card (`make test-gpu`).
"""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

ON_CARD = os.environ.get("DSO_TEST_GPU") == "1"


def require() -> None:
    """Skips the calling test file unless kernels are interpreted. Triton decides this when it is imported, which other packages
    may do first, so the environment variable must be set before Python starts."""
    _require_triton()
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("TRITON_INTERPRET=1 must be set: make test-cuda-interpreter", allow_module_level=True)


def require_device() -> torch.device:
    """As `require`, or on a card. Returns the device of the kernels. If a card is asked for, its absence is a failure."""
    if not ON_CARD:
        require()
        return torch.device("cpu")
    from deepseek_optimizer.backends.cuda import unavailable_reason

    if (reason := unavailable_reason(torch.device("cuda", 0))) is not None:
        pytest.fail(f"make test-gpu needs a card: {reason}", pytrace=False)
    return torch.device("cuda", 0)


def require_card() -> torch.device:
    """Skips the calling test file unless it runs on a card."""
    if not ON_CARD:
        pytest.skip("needs a card: make test-gpu", allow_module_level=True)
    return require_device()


def _require_triton() -> None:
    if importlib.util.find_spec("triton") is None:
        pytest.skip('Triton is not installed: pip install "deepseek-optimizer[cuda]"', allow_module_level=True)
