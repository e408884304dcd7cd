"""The documented examples of extensions are complete: the patch applies, and the toy backend passes its tests."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PATCH = ROOT / "docs" / "examples" / "add-an-op.patch"


def test_the_patch_that_adds_an_op_applies_and_touches_four_places():
    touched = [line.split()[-1][2:] for line in PATCH.read_text(encoding="utf-8").splitlines() if line.startswith("diff --git")]
    assert touched == [
        "native/include/dso.h",  # with the next one: the kernel
        "native/kernels/generic/elementwise_ops.hpp",
        "src/deepseek_optimizer/backends/reference/ops.py",
        "src/deepseek_optimizer/graph/ops/elementwise.py",
        "tests/backends/test_reference_ops.py",
    ]
    git = shutil.which("git")
    if git is None:
        pytest.skip("git is not installed")
    done = subprocess.run([git, "apply", "--check", str(PATCH)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_toy_backend_passes_its_tests():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "examples/toy_backend/tests"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout
