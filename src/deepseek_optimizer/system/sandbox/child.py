"""The process of a `Worker`: reads jobs from stdin and writes answers to stdout. Run by its path, not imported.

Its argument is a name in `platforms.PLATFORMS`.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any


def _load(name: str, path: str) -> ModuleType:
    """A module from its file."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> None:
    platforms = _load("platforms", str(Path(__file__).with_name("platforms.py")))
    jobs, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # output of libraries must not mix with the answers
    platform = platforms.PLATFORMS[sys.argv[1]]()
    platform.begin()

    def read() -> Any:
        """The next message; ends the process if there is none."""
        data = platforms.next_message(jobs)
        if data is None:
            os._exit(0)
        return json.loads(data)

    def write(message: Any) -> None:
        platforms.send_message(answers, json.dumps(message).encode())

    first = read()
    sys.path[:] = first["path"]
    run = _load("job", first["job"]).prepare(first["setup"])
    if first["nice"]:  # not earlier: a caller may wait for the worker to start
        platform.give_way(first["nice"])
    platform.limit_memory(first["memory"])
    write(["ready", None])
    while True:
        payload = read()
        platform.begin_job(first["seconds"])
        try:
            answer = ["done", run(payload)]
        except ValueError as error:
            answer = ["refused", str(error)]
        except MemoryError:
            answer = ["memory", None]
        except RecursionError:
            answer = ["refused", "it is nested too deeply"]
        platform.end_job()
        write(answer)


if __name__ == "__main__":
    main()
