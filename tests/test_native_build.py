"""CMakeLists.txt refuses a DSO_ISAS that would build fewer variants than it names."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.skipif(
    shutil.which("cmake") is None or sys.platform != "linux" or platform.machine() != "x86_64",
    reason="needs cmake, and x86-64 Linux",
)


@pytest.mark.parametrize(
    "isas, message",
    [
        ("amx", 'amx shares kernels with avx512_bf16; add it: -DDSO_ISAS="avx512_bf16;amx"'),
        ("avx2;avx512bf16", "there is no variant avx512bf16; choose among avx2;"),
    ],
)
def test_a_selection_that_cannot_be_built_is_an_error(isas, message, tmp_path):
    command = ["cmake", "-S", str(ROOT), "-B", str(tmp_path), f"-DDSO_ISAS={isas}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert message in re.sub(r"\s+", " ", done.stderr)
