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
    """Runs work(rank) in that many processes, which see each other; what each returned, as JSON has it.

    AssertionError with the traceback of whoever failed. For processes without threads: tests have one of torch's.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        children = {_fork(work, rank, count, port, Path(folder, str(rank))): rank for rank in range(count)}
        failed = _wait(dict(children), seconds)
        told = [
            json.loads(Path(folder, str(rank)).read_text()) if Path(folder, str(rank)).exists() else {} for rank in range(count)
        ]
    errors = [
        f"process {rank}: {one.get('error', 'ended without a word')}" for rank, one in enumerate(told) if "result" not in one
    ]
    assert not failed and not errors, "\n".join(errors)
    return [one["result"] for one in told]


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
        told = {"result": work(rank)}
    except BaseException:
        told = {"error": traceback.format_exc()}
    answer.write_text(json.dumps(told))
    os._exit("error" in told)


def _wait(children: dict[int, int], seconds: float) -> bool:
    """Whether one failed. Then the others, who may wait for it forever, are ended."""
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
