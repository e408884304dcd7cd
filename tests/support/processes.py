"""Several processes that train together, as started by torchrun: forked, with gloo on the CPU."""

from __future__ import annotations

import json
import os
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any


def in_processes(work: Callable[[int], Any], count: int = 2, seconds: float = 120.0) -> list[Any]:
    """Runs work(rank) in `count` processes of one process group; returns their results, converted to JSON and back.

    Raises AssertionError with the traceback of a process that failed. The calling process must have no threads; in tests,
    torch has one.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        children = {_fork(work, rank, count, port, Path(folder, str(rank))): rank for rank in range(count)}
        failed = _wait(dict(children), seconds)
        answers = [
            json.loads(Path(folder, str(rank)).read_text()) if Path(folder, str(rank)).exists() else {} for rank in range(count)
        ]
    errors = [
        f"process {rank}: {one.get('error', 'ended without a result')}"
        for rank, one in enumerate(answers)
        if "result" not in one
    ]
    assert not failed and not errors, "\n".join(errors)
    return [one["result"] for one in answers]


def _fork(work: Callable[[int], Any], rank: int, count: int, port: int, answer: Path) -> int:
    child = os.fork()
    if child:
        return child
    try:
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true",
        }  # fmt: skip
        sys.stdout = sys.stderr = open(os.devnull, "w")
        outcome = {"result": work(rank)}
    except BaseException:
        outcome = {"error": traceback.format_exc()}
    answer.write_text(json.dumps(outcome))
    os._exit("error" in outcome)


def _wait(children: dict[int, int], seconds: float) -> bool:
    """Whether one failed. The others, which might wait for it forever, are then killed."""
    failed, end = False, time.monotonic() + seconds
    while children:
        for child in list(children):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                del children[child]
                failed |= status != 0
                if status != 0:
                    end = min(end, time.monotonic() + 5)
        if time.monotonic() > end:
            for child in children:
                os.kill(child, 9)
                os.waitpid(child, 0)
            return True
        time.sleep(0.02)
    return failed
