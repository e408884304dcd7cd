"""`ulimit -v` gives an error that names it, and never kills the process."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from deepseek_optimizer.address_space import MIN_BYTES

LINUX = sys.platform.startswith("linux")
pytestmark = pytest.mark.skipif(not LINUX, reason="RLIMIT_AS is effective only on Linux")


@pytest.mark.parametrize("megabytes", [100, 570, 670, MIN_BYTES // (1 << 20) - 1])
def test_too_little_for_torch_is_reported_before_it_is_loaded(tiny_model, megabytes):
    limit = megabytes << 20
    done = subprocess.run(
        [sys.executable, "-c", "from deepseek_optimizer_cli.app import main; main()", "run", str(tiny_model), "hello"],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)), capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2, f"exit code {done.returncode}: {done.stderr[-500:]}"
    assert done.stderr.startswith("dso: the address space of torch") and "ulimit -v" in done.stderr
    assert done.stderr.count("\n") == 1


def test_running_out_later_is_an_error(tiny_model):
    """In the native library, numpy or torch: whichever allocates next."""
    tests = Path(__file__).parent
    limits = [0, 1, 4, 64, 1000]
    done = subprocess.run(
        [sys.executable, "-m", "support.limited", str(tiny_model), *map(str, limits)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tests), *sys.path])}, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert len(lines) == 2 * len(limits)
    assert all(line.split()[2] == "0" for line in lines), done.stdout  # no signal, and no other kind of abort
    message = [line.split(maxsplit=3)[3] for line in lines]
    assert message[-2:] == ["done", "done"]
    assert any("memory" in words.lower() for words in message)
