"""`dso batch --ray`: the same bytes as on one machine, from two workers, also if one of them is killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from deepseek_optimizer.errors import ConfigError
from deepseek_optimizer_cli.batch import _check_workers
from support.saved_llama import saved_llama

_WORKER = "ray::MapWorker"  # the beginning of a worker's process name
_REQUESTS = 120


def start(model: Path, requests: Path, answers: Path, *options: str) -> subprocess.Popen[str]:
    command = [
        Path(sys.executable).with_name("dso"), "batch", model, requests, answers, "--threads", "1", "--max-running", "4",
        "--kv-cache-memory", 1 << 24, *options,
    ]  # fmt: skip
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen([*map(str, command)], stderr=subprocess.PIPE, text=True, env=environment)


def finish(process: subprocess.Popen[str]) -> None:
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-3000:]


@pytest.fixture(scope="module")
def job(byte_tokenizer, tmp_path_factory) -> tuple[Path, Path, bytes]:
    """The model, the requests, and the answers of one machine without Ray."""
    folder = tmp_path_factory.mktemp("batch")
    model = saved_llama(folder / "model", byte_tokenizer, max_position_embeddings=2048)
    requests = folder / "requests.jsonl"
    with requests.open("w") as file:
        for number in range(_REQUESTS):
            body = {"prompt": f"{number} " * (1 + number % 40), "max_tokens": 4 + number % 60, "ignore_eos": True}
            line = {"custom_id": str(number), "method": "POST", "url": "/v1/completions", "body": body}
            file.write(json.dumps(line) + "\n")
    finish(start(model, requests, folder / "answers.jsonl"))
    return model, requests, (folder / "answers.jsonl").read_bytes()


def test_two_workers_one_of_which_is_killed(job, tmp_path) -> None:
    model, requests, expected = job
    answers = tmp_path / "answers.jsonl"
    partial = answers.with_name("answers.jsonl.partial")
    process = start(model, requests, answers, "--ray", "--workers", "2", "--worker-cpus", "0.5")
    end = time.monotonic() + 240
    while not partial.exists() or partial.read_bytes().count(b"\n") < 10:
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.05)
    children = psutil.Process(process.pid).children(recursive=True)
    workers = [child for child in children if any(part.startswith(_WORKER) for part in child.cmdline())]
    assert len(workers) == 2
    assert {worker.nice() for worker in workers} == {psutil.Process().nice()}
    workers[0].kill()
    finish(process)
    assert answers.read_bytes() == expected


def test_a_worker_that_cannot_load_the_model_says_why(job, tmp_path) -> None:
    model, requests, _ = job
    process = start(model, requests, tmp_path / "answers.jsonl", "--ray", "--kv-cache-memory", str(1 << 50))
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 2 and "Traceback" not in errors, errors[-3000:]
    last = errors.strip().splitlines()[-1]
    assert last.startswith("dso: the KV cache: ") and last.endswith("or free memory"), last


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((False, "auto", 1, None, None), "need --ray"),
        ((False, None, 2, None, None), "need --ray"),
        ((True, "auto", 1, None, None), "needs --worker-cpus"),
        ((True, None, 1, 0.0, None), "greater than 0"),
        ((True, None, 1, None, {"tensor": 2}), "not available with --ray"),
    ],
)
def test_options_that_contradict_each_other(options, message) -> None:
    with pytest.raises(ConfigError, match=message):
        _check_workers(*options)
