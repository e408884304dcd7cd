"""System calls fail, or the process is killed at one: the old or the new state is complete, and the error is one line.

The default tests try a few calls of each kind per operation, chosen by a seed; the slow ones try all.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from support.fault_points import compiled
from support.saved_llama import saved_llama

if sys.platform != "linux" or shutil.which("cc") is None:
    pytest.skip("needs Linux and a C compiler", allow_module_level=True)

RUN = Path(__file__).with_name("run.py")
# Operations, and the number of calls at which they fail.
FEW = {
    "convert": 3, "convert to shards": 4, "save_pretrained": 5, "training": 2, "saved blocks": 6, "conversation": 6,
    "load": 3, "generate": 3,
}  # fmt: skip
MANY = {
    "convert": None, "convert to a new directory": None, "convert to shards": None, "save_pretrained": None,
    "save_pretrained to a new directory": None, "training": None, "dso train": 60, "saved blocks": None, "document": None,
    "document cache": None, "conversation": None, "load": None, "generate": None,
}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory, byte_tokenizer) -> Any:
    """run({operation: number of calls to fail at, or None for all}) -> the outcomes."""
    library = compiled(tmp_path_factory.mktemp("shim"))
    model = saved_llama(tmp_path_factory.mktemp("model"), byte_tokenizer, max_position_embeddings=2048, eos_token_id=None)

    def start(wanted: dict[str, int | None]) -> dict[str, Any]:
        names = [name if limit is None else f"{name}:{limit}" for name, limit in wanted.items()]
        command = [sys.executable, str(RUN), str(model), str(tmp_path_factory.mktemp("trials")), *names]
        done = subprocess.run(command, env={**os.environ, "LD_PRELOAD": str(library)}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return start


@pytest.fixture(scope="module")
def few(run) -> dict[str, Any]:
    return run(FEW)


@pytest.mark.parametrize("name", FEW)
def test_some_calls_fail(few, name: str) -> None:
    assert few[name]["problems"] == [] and few[name]["errors"] > 0


@pytest.mark.every_run
def test_writing_in_place_is_detected(run) -> None:
    problems = "\n".join(run({"in place": 7})["in place"]["problems"])
    for sign in ("neither the old state nor the new", "names no file", "the next run fails"):
        assert sign in problems


@pytest.mark.slow
@pytest.mark.parametrize("name", MANY)
def test_every_call_fails(run, name: str) -> None:
    actual = run({name: MANY[name]})[name]
    assert actual["problems"] == [] and actual["errors"] > 0
