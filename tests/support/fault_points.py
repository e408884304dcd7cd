"""Runs an operation once for every system call at which it can fail, in a forked process each time.

    LD_PRELOAD=faults.so python tests/faults/run.py        (see tests/faults/test_faults.py)

The process that forks has imported everything and runs nothing itself, so a trial takes milliseconds. `trials` first runs the
operation with a log of its calls, then repeats it from the same old state with one call failing, or the process killed there.
After each trial the state must be the old or the new one byte for byte, the error one line that names the place, no temporary
file may remain, and the next run without faults must succeed.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import faulthandler
import hashlib
import io
import json
import os
import random
import re
import shutil
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILES, MEMORY = 1, 2
FAIL_ONCE, FAIL_ON, KILL = 0, 1, 2
# Kinds of faults: the shim's action, and the error.
FAULTS = {"full disk": (FAIL_ON, errno.ENOSPC), "I/O error": (FAIL_ONCE, errno.EIO), "killed": (KILL, 0)}
_CLEANING = ("unlink", "unlinkat", "rmdir")
LIMIT_S = 300  # for one run, which takes less than a second on an idle machine

State = dict[str, str]


@dataclass(frozen=True)
class Operation:
    """
    Args:
        prepare: creates the old state in a directory.
        run: the operation, on that directory; raises, or returns the exit code and stderr of a command.
        resumes: a failed run may leave hidden files that the next run continues from.
        whole: whether a state that is neither the old nor the new one is valid too.
        varies: a pattern of files whose contents differ from run to run.
    """

    prepare: Callable[[Path], None]
    run: Callable[[Path], tuple[int, str] | None]
    resumes: bool = False
    whole: Callable[[Path, State, State], bool] = lambda folder, old, new: False
    varies: str = "$^"


@dataclass(frozen=True)
class Outcome:
    """The outcome of a forked run. `error`: None if it succeeded. `message`: the exception's text, or a command's stderr."""

    killed: bool = False
    error: str | None = None
    message: str = ""
    hit: str = ""
    trace: str = ""


def compiled(folder: Path) -> Path:
    """Compiles the shim."""
    library = folder / "faults.so"
    source = Path(__file__).with_name("faults.c")
    subprocess.run(["cc", "-O1", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True, capture_output=True, text=True)
    return library


class Faults:
    """The shim in this process.

    Args:
        folder: calls on files below it are counted.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = os.fsencode(os.path.realpath(folder))
        self._library = ctypes.CDLL(None)
        self._library.faults_arm.argtypes = [
            ctypes.c_char_p, ctypes.c_int, ctypes.c_long, ctypes.c_int, ctypes.c_int, ctypes.c_size_t, ctypes.c_int,
        ]  # fmt: skip
        self._library.faults_disarm.restype = ctypes.c_long
        self._library.faults_hit.restype = ctypes.c_char_p

    @contextlib.contextmanager
    def armed(self, at: int, how: int, error: int, kinds: int = FILES, smallest: int = 0, log: int = -1) -> Any:
        self._library.faults_arm(self._folder, kinds, at, how, error, smallest, log)
        try:
            yield
        finally:
            self._library.faults_disarm()

    def watch(self, on: bool) -> None:
        """Sets whether this thread's allocations are counted while the shim is armed."""
        self._library.faults_watch(on)

    @property
    def hit(self) -> str:
        return os.fsdecode(self._library.faults_hit())


def in_child(work: Callable[[], tuple[int, str] | None], hit: Callable[[], str] = str) -> Outcome:
    """Runs `work` in a forked process without output; returns its outcome. If it hangs, its stack goes to stderr."""
    reads, writes = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reads)
        faulthandler.dump_traceback_later(LIMIT_S, exit=True, file=os.dup(2))
        null = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(null, fd)
        sys.stdout = sys.stderr = io.StringIO()
        try:
            result = work()
            answer = {} if result is None or result[0] == 0 else {"error": f"exit code {result[0]}", "message": result[1]}
        except BaseException as error:
            answer = {"error": type(error).__name__, "message": str(error), "trace": traceback.format_exc()}
        os.write(writes, json.dumps({**answer, "hit": hit()}).encode()[:60_000])
        os._exit(0)
    os.close(writes)
    with os.fdopen(reads, "rb") as pipe:
        answer = pipe.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return Outcome(killed=True, message=f"signal {os.WTERMSIG(status)}")
    if not answer:
        raise AssertionError(f"a run did not end within {LIMIT_S} seconds")
    return Outcome(**json.loads(answer))


def state_of(folder: Path, varies: str = "$^", hidden: bool = False) -> State:
    """Digest of every file below a directory by its path; `hidden`: also of files whose names begin with a dot."""
    result = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and (hidden or not re.search(r"(^|/)\.", name)):
            result[name] = "" if re.search(varies, name) else hashlib.sha256(path.read_bytes()).hexdigest()
        elif path.is_dir() and hidden:
            result[f"{name}/"] = ""
    return result


def chosen(calls: list[str], limit: int | None, seed: int) -> list[int]:
    """Indices of the calls to fail at: all, or at most `limit`, covering as many kinds of calls as possible."""
    if limit is None or len(calls) <= limit:
        return list(range(len(calls)))
    rng = random.Random(seed)
    kinds: dict[str, list[int]] = {}
    for number, call in enumerate(calls):
        kinds.setdefault(re.sub(r"[0-9a-f]{8,}|\d+", "#", call), []).append(number)
    queues = [rng.sample(numbers, len(numbers)) for numbers in kinds.values()]
    rng.shuffle(queues)
    order = [queue[i] for i in range(len(calls)) for queue in queues if i < len(queue)]
    return sorted(order[:limit])


def trials(base: Path, operation: Operation, limit: int | None = None, seed: int = 0) -> dict[str, Any]:
    """Runs the operation with every fault (or at `limit` calls with one kind of fault each); returns what was wrong, as
    sentences."""
    here, template = base / "here", base / "template"
    template.mkdir(parents=True)
    _prepare(operation, template, here)
    old = state_of(here, operation.varies)
    faults = Faults(here)
    with open(base / "calls", "w+b") as log:

        def logged() -> tuple[int, str] | None:
            with faults.armed(-1, 0, 0, log=log.fileno()):
                return operation.run(here)

        counted = in_child(logged)
        log.seek(0)
        calls = [line.replace(str(here), "", 1) for line in os.fsdecode(log.read()).splitlines()]
    if counted.error:
        raise AssertionError(f"fails without faults: {counted}")
    new, everything = state_of(here, operation.varies), state_of(here, operation.varies, hidden=True)
    assert calls and new != old
    problems, errors = [], 0
    rng = random.Random(seed)
    names = list(FAULTS)
    for number in chosen(calls, limit, seed):
        for fault in names if limit is None else [rng.choice(names)]:
            how, error = FAULTS[fault]
            _restore(template, here)

            def tried(number: int = number, how: int = how, error: int = error) -> tuple[int, str] | None:
                with faults.armed(number, how, error):
                    return operation.run(here)

            outcome = in_child(tried, lambda: faults.hit)
            errors += bool(outcome.error)
            place = f"call {number} of {len(calls)} ({calls[number]}), {fault}"
            problems += [f"{place}: {p}" for p in _wrong(operation, here, outcome, fault, old, new)]
            again = in_child(lambda: operation.run(here))
            left = state_of(here, operation.varies, hidden=True)
            if again.error or again.killed:
                problems.append(f"{place}: the next run fails: {again.error} {again.message} {again.trace}")
            elif left != everything:
                problems.append(f"{place}: after the next run there is another state: {_difference(everything, left)}")
    return {"calls": len(calls), "errors": errors, "problems": problems}


def _wrong(operation: Operation, here: Path, outcome: Outcome, fault: str, old: State, new: State) -> Iterable[str]:
    state = state_of(here, operation.varies)
    if state not in (old, new) and not operation.whole(here, old, new):
        yield f"neither the old state nor the new: {_difference(new, state)}; {outcome.error} {outcome.message}"
    if fault == "killed":
        return
    if outcome.killed:
        yield f"the process died: {outcome.message}"
    if not outcome.error:
        if state != new:
            yield f"no error, and not the new state: {_difference(new, state)}"
    else:
        message = outcome.message.strip()
        last = message.splitlines()[-1] if message else ""
        command = outcome.error.startswith("exit code")
        if command and (outcome.error != "exit code 2" or not last.startswith("dso: ") or "Traceback" in message):
            yield f"{outcome.error}: {message}"
        if not command and (outcome.error not in _TYPED or len(message.splitlines()) != 1):
            yield f"{outcome.error}: {message}\n{outcome.trace}"
        if str(here) not in last:
            yield f"the message names no file: {last}\n{outcome.trace}"
    added = state_of(here, operation.varies, hidden=True).keys() - new.keys() - old.keys()
    hidden = [name for name in added if re.search(r"(^|/)\.", name)]
    if hidden and not operation.resumes and outcome.hit.partition(" ")[0] not in _CLEANING:
        yield f"left behind: {sorted(hidden)}"


_TYPED = {"CheckpointError", "SaveError", "DataError", "OSError", "MemoryError", "NotEnoughMemoryError"}


def _prepare(operation: Operation, template: Path, here: Path) -> None:
    """Creates the old state in the directory where it is used, since a run's settings contain that path."""
    here.mkdir()
    made = in_child(lambda: operation.prepare(here))
    if made.error or made.killed:
        raise AssertionError(f"cannot be prepared: {made}")
    _restore(here, template)


def _restore(source: Path, target: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target, symlinks=True)


def _difference(expected: State, result: State) -> str:
    lines = [f"{name} missing" for name in expected.keys() - result.keys()]
    lines += [f"{name} added" for name in result.keys() - expected.keys()]
    lines += [f"{name} differs" for name in expected.keys() & result.keys() if expected[name] != result[name]]
    return ", ".join(sorted(lines)[:6]) or "none"
