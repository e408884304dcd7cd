"""Every allocation of the native library fails, one at a time: a typed error, and the next call works normally."""

from __future__ import annotations

import errno
import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from deepseek_optimizer import load_model
from deepseek_optimizer.backends.cpu import native
from deepseek_optimizer.cache import BlockManager
from deepseek_optimizer.errors import NotEnoughMemoryError
from support.fault_points import FAIL_ONCE, MEMORY, Faults, chosen, in_child

_PROMPT = [65 + i % 26 for i in range(70)]
STAGES = ("load", "generate")


class Watched:
    """The native library; only allocations during its calls are counted by the shim."""

    def __init__(self, library: Any, faults: Faults) -> None:
        self._library, self._faults = library, faults

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._library, name)

        def call(*arguments: Any) -> Any:
            self._faults.watch(True)
            try:
                return function(*arguments)
            finally:
                self._faults.watch(False)

        return call


def memory_trials(base: Path, model: Path, stage: str, limit: int | None = None, seed: int = 0) -> dict[str, Any]:
    """Lets each allocation of a stage fail; returns what was wrong, as sentences."""
    base.mkdir()
    faults = Faults(base)
    log = os.open(base / "calls", os.O_RDWR | os.O_CREAT)
    counted = in_child(lambda: _try(model, faults, stage, -1, log))
    if counted.error or counted.killed:
        raise AssertionError(f"fails without faults: {counted}")
    calls = (base / "calls").read_text().splitlines()
    assert calls
    problems, errors = [], 0
    for number in chosen(calls, limit, seed):
        outcome = in_child(lambda number=number: _try(model, faults, stage, number))
        if outcome.error == "Refused":
            errors += 1
        elif outcome.error or outcome.killed:
            place = f"{stage}, allocation {number} of {len(calls)} ({calls[number]})"
            problems.append(f"{place}: {outcome.error} {outcome.message}\n{outcome.trace[-1500:]}")
    return {"calls": len(calls), "errors": errors, "problems": problems}


class Refused(Exception):
    """The stage raised the right error, and the next call was correct."""


def _try(model: Path, faults: Faults, stage: str, number: int, log: int = -1) -> None:
    library = native.library()
    faults.watch(False)
    native.library = lambda: Watched(library, faults)  # type: ignore[assignment]

    def loaded() -> Any:
        return load_model(model, precision="int8", backend="cpu", threads=2, kv_cache_memory=1 << 20)

    def generated(of: Any) -> list[int]:
        made = of.generate(torch.tensor([_PROMPT]), max_new_tokens=6, do_sample=False)
        return list(made[0].tolist())

    if stage == "load":
        refused, one = _refused(faults, number, log, loaded)
        one = one or loaded()
        expected = generated(loaded())
    else:
        one = loaded()
        refused, made = _refused(faults, number, log, lambda: generated(one))
        expected = generated(loaded())
        assert refused or made == expected, "a different text without an error"
    assert generated(one) == expected, "a different text after the error"
    gc.collect()
    managers = [o for o in gc.get_objects() if isinstance(o, BlockManager)]
    assert all(m.free_blocks == m.num_blocks for m in managers), "blocks leaked"
    if refused:
        raise Refused


def _refused(faults: Faults, number: int, log: int, work: Callable[[], Any]) -> tuple[bool, Any]:
    """Whether the call raised the right error, and its result otherwise."""
    try:
        with faults.armed(number, FAIL_ONCE, errno.ENOMEM, kinds=MEMORY, smallest=1, log=log):
            return False, work()
    except NotEnoughMemoryError as error:
        assert len(str(error).splitlines()) == 1
        return True, None
