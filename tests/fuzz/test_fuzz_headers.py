"""A short run of the header fuzzer, and proof that it detects faults."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from support import warm_python

FUZZER = Path(__file__).with_name("fuzz_headers.py")


def fuzz(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(FUZZER), *arguments], capture_output=True, text=True, timeout=300)


def test_twenty_thousand_inputs() -> None:
    run = fuzz("--inputs", "20000", "--seed", "7", "--jobs", "2")
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout.splitlines()[-1])["inputs"] == 20_000
    for kind in (
        "safetensors",
        "packed tiles",
        "packed config",
        "index",
        "gguf llama",
        "gguf qwen2",
        "gguf qwen3",
        "gguf deepseek2",
    ):
        for outcome in ("opened", "refused"):  # if every input were rejected, only the first check would be tested
            assert f"{kind}: {outcome}" in run.stdout


@pytest.mark.parametrize(
    "broken, sign",
    [
        ("files.json.loads = lambda *a, **k: 1 / 0", "ZeroDivisionError"),
        ("gguf_header._Cursor.skip = lambda self, n: time.sleep(60)", "TimeoutError"),
        ("gguf_header._Cursor.string = lambda self: str(bytearray(3 << 20))", "Python memory"),
        ("files.DataFile.read = lambda self, at, n: torch.empty(1 << 29, dtype=torch.uint8)", "RuntimeError"),
    ],
)
def test_faults_are_detected(broken: str, sign: str) -> None:
    """Readers that crash, hang or allocate too much: the fuzzer must report them."""
    code = f"""
import sys, time, torch
sys.path.insert(0, {str(FUZZER.parent)!r})
import fuzz_headers
from deepseek_optimizer.checkpoint import files, gguf_header
exercise, calls = fuzz_headers.exercise, [0]
def later(path):  # the readers are sound until the warm-up is over
    calls[0] += 1
    if calls[0] == len(fuzz_headers.seeds()) + 1:
        {broken}
    exercise(path)
fuzz_headers.exercise = later
print(fuzz_headers.work(0, 500, 0)[1])
"""
    run = warm_python.run(code)
    assert sign in run.stdout, run.stdout + run.stderr
