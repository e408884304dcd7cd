"""A row of the standing set, measured: sides in turns, each in a process of its own, then the verdict."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from deepseek_optimizer.bench.against import Command, alternate, run_json
from deepseek_optimizer.bench.machine_limits import read_gb_s
from deepseek_optimizer.bench.peers import get_peer
from deepseek_optimizer.bench.peers.base import own_command
from deepseek_optimizer.bench.peers.environments import setup

from . import reads
from .models import model
from .standing import DECODE, OURS, Rival, Row
from .verdict import judge, share


def measure(row: Row, *, threads: int, rounds: int, note: Callable[[str], None], seconds: float = 1.0) -> dict[str, Any]:
    """What a results file holds of the row.

    Args:
        seconds: for each measurement of the read bandwidth, over as many bytes as a side reads, before and after it in every
            round; the larger one counts. Our side measures that of its own weights instead, unless a core is busy.
    """
    sides = (*row.rivals, row.ours)
    commands = {side.label: _command(row, side, threads) for side in sides}
    ours = row.ours.label
    work = {side.label: side.work or row.work for side in sides}
    step = {name: r.step_bytes(work[name]) for name, r in _reads(row, threads).items()}
    limits: dict[str, list[float]] = {name: [] for name in step}

    def run(name: str, command: Command) -> dict[str, Any]:
        if name not in step:
            return run_json(command)
        before = read_gb_s(int(step[name]), threads, seconds)
        result = run_json(command)
        after = read_gb_s(int(step[name]), threads, seconds)
        limits[name].append(result.get("own_read_gb_s") or max(before, after))
        return result

    found = alternate(commands, rounds, note, run)
    speeds = {name: [values[row.figure] for values in found[name]] for name in commands}
    read = {name: share(size / work[name].batch, speeds[name], limits[name]) for name, size in step.items()}
    return {
        "title": row.title,
        "model": row.model,
        "work": asdict(row.work),
        "figure": row.figure,
        "sides": speeds,
        "read": read,
        "bars": judge(row, found, ours, read),
    }


def _command(row: Row, side: Rival, threads: int) -> list[str]:
    options = {"threads": threads, "repeats": row.repeats, "warmup": row.warmup}
    path, work = model(row.model, side.form), side.work or row.work
    if side.engine != OURS:
        peer = get_peer(side.engine)
        return peer.command(setup(peer), path, work, **options)
    command = own_command("optimized", path, work, **options, fields=row.fields)
    if row.figure == DECODE and not row.busy:
        command.append("--beside")
    busy = row.busy and side == row.ours
    return [sys.executable, "-m", "benchmarks.neighbor", *command] if busy else command


def _reads(row: Row, threads: int) -> dict[str, reads.Reads]:
    """Label -> what decoding reads, of ours and of llama.cpp; none for other figures, which reading does not bound."""
    if row.figure != DECODE:
        return {}
    sides = (*row.rivals, row.ours)
    forms = dict.fromkeys(side.form for side in sides if side.engine == OURS)
    own = {form: reads.of_ours(model(row.model, form), {"threads": threads, **row.fields}) for form in forms}
    files = {side.form: side for side in sides if side.engine.startswith("llama.cpp")}
    theirs = {form: reads.of_gguf(model(row.model, form)) for form in files}
    found = {side.label: own[side.form] if side.engine == OURS else theirs.get(side.form) for side in sides}
    return {label: r for label, r in found.items() if r is not None}
