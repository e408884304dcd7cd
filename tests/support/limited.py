"""Loads and runs a tiny model in forked children, each with a limit of some megabytes of additional address space. For
`tests/test_address_space.py`, in its own process with one thread.

python -m support.limited FOLDER MEGABYTES ...     one line each: load or run, megabytes, the child's status and its message
"""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Callable
from typing import Any

import torch

from deepseek_optimizer import load_model


def _run(model: Any, tokens: int) -> Any:
    return model.generate(torch.arange(tokens, dtype=torch.int64)[None], max_new_tokens=3, do_sample=False)


def _limited(megabytes: int, work: Callable[[], Any]) -> tuple[int, str]:
    """Status and message of a child that runs `work` with this much additional address space."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        held = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + (megabytes << 20),) * 2)
        message = b"done"
        try:
            work()
        except Exception as error:
            message = f"{type(error).__name__}: {error}".encode()[:200]
        os.write(writer, message.replace(b"\n", b" "))
        os._exit(0)
    os.close(writer)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), os.read(reader, 300).decode(errors="replace")


if __name__ == "__main__":
    torch.set_num_threads(1)
    path = sys.argv[1]
    model = load_model(path, precision="int8")  # loads every library that the children need
    _run(model, 3)
    for megabytes in map(int, sys.argv[2:]):
        for name, work in (("load", lambda: load_model(path, precision="int8")), ("run", lambda: _run(model, 200))):
            print(name, megabytes, *_limited(megabytes, work), flush=True)
