"""A row of the standing set, measured: sides in turns, each in a process of its own, then the verdict."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from deepseek_optimizer.bench.against import alternate
from deepseek_optimizer.bench.machine import read_gb_s
from deepseek_optimizer.bench.peers import get_peer
from deepseek_optimizer.bench.peers.base import own_command
from deepseek_optimizer.bench.peers.environments import setup

from . import reads
from .models import model
from .standing import DECODE, OURS, Rival, Row
from .verdict import judge, median, share


def measure(row: Row, *, threads: int, rounds: int, note: Callable[[str], None], seconds: float = 1.0) -> dict[str, Any]:
    """What a results file holds of the row.

    Args:
        seconds: for each measurement of the machine's read bandwidth. It is taken over as many bytes as a side reads, before
            and after the rounds; the larger one counts, since a limit is what the machine can do.
    """
    commands = {rival.label: _command(row, rival, threads) for rival in row.rivals}
    ours = row.ours.label
    commands[ours] = _command(row, row.ours, threads)
    step = {name: r.step_bytes(row.work) for name, r in _reads(row, threads).items()}
    before = {name: read_gb_s(int(size), threads, seconds) for name, size in step.items()}
    found = alternate(commands, rounds, note)
    limits = {name: max(before[name], read_gb_s(int(size), threads, seconds)) for name, size in step.items()}
    read = {name: share(size / row.work.batch, median(found[name], row.figure), limits[name]) for name, size in step.items()}
    return {
        "title": row.title,
        "model": row.model,
        "work": asdict(row.work),
        "figure": row.figure,
        "sides": {name: [values[row.figure] for values in found[name]] for name in commands},
        "read": read,
        "bars": judge(row, found, ours, read),
    }


def _command(row: Row, side: Rival, threads: int) -> list[str]:
    options = {"threads": threads, "repeats": row.repeats, "warmup": row.warmup}
    path = model(row.model, side.form)
    if side.engine != OURS:
        peer = get_peer(side.engine)
        return peer.command(setup(peer), path, row.work, **options)
    command = own_command("optimised", path, row.work, **options, fields=row.fields)
    busy = row.busy and side == row.ours
    return [sys.executable, "-m", "benchmarks.neighbour", *command] if busy else command


def _reads(row: Row, threads: int) -> dict[str, reads.Reads]:
    """Label -> what decoding reads; none for other figures, which reading does not bound."""
    if row.figure != DECODE:
        return {}
    own = reads.of_ours(model(row.model, row.ours.form), {"threads": threads, **row.fields})
    return {r.label: own if r.engine == OURS else reads.of_gguf(model(row.model, r.form)) for r in (*row.rivals, row.ours)}
