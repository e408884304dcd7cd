"""The process of a `Worker`: reads jobs from stdin and writes answers to stdout. Run by its path, not imported."""

from __future__ import annotations

import importlib.util
import json
import os
import resource
import signal
import sys
from typing import Any, BinaryIO

_HEADER = 8


def _read(pipe: BinaryIO) -> Any:
    """Returns the next message; ends the process if there is none."""
    header = pipe.read(_HEADER)
    if len(header) < _HEADER:
        os._exit(0)
    return json.loads(pipe.read(int.from_bytes(header, "little")))


def _write(pipe: BinaryIO, message: Any) -> None:
    data = json.dumps(message).encode()
    pipe.write(len(data).to_bytes(_HEADER, "little") + data)
    pipe.flush()


def _limit_memory(more: int) -> None:
    """Limits the address space to its current size plus `more` bytes."""
    with open("/proc/self/statm", encoding="utf-8") as file:
        pages = int(file.read().split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + more
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _give_way(nice: int) -> None:
    """Lowers the priority of this process by `nice`."""
    os.nice(nice)
    try:  # with autogroups, the kernel schedules by session first and applies niceness only within one
        with open("/proc/self/autogroup", "w", encoding="ascii") as file:
            file.write(str(nice))
    except OSError:
        pass


def main() -> None:
    jobs, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # output of libraries must not mix with the answers
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    first = _read(jobs)
    sys.path[:] = first["path"]
    spec = importlib.util.spec_from_file_location("job", first["job"])
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    run = module.prepare(first["setup"])
    if first["nice"]:  # not earlier: a caller may wait for the worker to start
        _give_way(first["nice"])
    if sys.platform == "linux":
        _limit_memory(first["memory"])
    _write(answers, ["ready", None])
    while True:
        payload = _read(jobs)
        signal.setitimer(signal.ITIMER_PROF, first["seconds"])  # SIGPROF ends the process, whatever it is executing
        try:
            answer = ["done", run(payload)]
        except ValueError as error:
            answer = ["refused", str(error)]
        except MemoryError:
            answer = ["memory", None]
        except RecursionError:
            answer = ["refused", "it is nested too deeply"]
        signal.setitimer(signal.ITIMER_PROF, 0)
        _write(answers, answer)


if __name__ == "__main__":
    main()
