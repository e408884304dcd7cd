"""A row of serving, measured: sides in turns, each in processes of its own, then what is claimed of them."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from deepseek_optimizer.bench.against import run_json, values_of
from deepseek_optimizer.bench.peers import get_peer
from deepseek_optimizer.bench.peers.environments import setup
from deepseek_optimizer.bench.sections import number
from deepseek_optimizer.bench.served import Served
from deepseek_optimizer.bench.work import Work

from .models import model
from .serving import HTTP, OFFLINE, Claim, Serving, Side
from .verdict import MISSED, REACHED

Figures = dict[str, float]
VOCABULARY = 49152  # SmolLM2's
_RUNS_A_ROUND = 100  # seeds that a round may use


def measure(row: Serving, *, threads: int, rounds: int, note: Callable[[str], None]) -> dict[str, Any]:
    """What a results file holds of the row: {"title", "sides": label -> figures of each round, "claims"}."""
    found: dict[str, list[Figures]] = {label: [] for label in row.sides}
    for turn in range(rounds):
        for label, side in row.sides.items():
            note(f"round {turn + 1} of {rounds}: {label}")
            found[label].append(figures(side, turn, threads))
    return {"title": row.title, "sides": found, "claims": [judged(claim, found) for claim in row.claims]}


def figures(side: Side, turn: int, threads: int) -> Figures:
    """Of a round. All sides of a round are asked the same, and of no two rounds."""
    numbers = {"seed": 1 + turn * _RUNS_A_ROUND, **side.numbers}
    asked = [text for name, value in numbers.items() for text in (f"--{name}", str(value))]
    path = model("smol", side.form)
    if side.where == OFFLINE:
        command = [sys.executable, "-m", "benchmarks.offline", side.what, str(path), "--threads", str(threads)]
        return run_json([*command, *side.options, *asked])
    if side.where == HTTP:
        with Served(path, "--threads", str(threads), *side.options) as server:
            command = [sys.executable, "-m", "benchmarks.load", side.what, "--port", str(server.port)]
            return run_json([*command, "--vocabulary", str(VOCABULARY), *asked])
    work = Work(**{name: int(side.numbers[name]) for name in ("prompt", "new", "batch")})
    peer = get_peer(side.where)
    command = peer.command(setup(peer), path, work, threads=threads, repeats=int(side.numbers["repeats"]), warmup=1)
    return {"output_tok_s": values_of(run_json(command))["output_tok_s"]}


def judged(claim: Claim, found: Mapping[str, list[Figures]]) -> dict[str, Any]:
    """The median of the rounds' own values, with the lowest and the highest; and the verdict, None where nothing is asked."""
    of, against = ([values[figure] for values in found[label]] for label, figure in (claim.of, claim.against))
    values = [claim.value(a, b) for a, b in zip(of, against, strict=True)]
    middle = statistics.median(values)
    return {
        "title": claim.title,
        "against": statistics.median(against),
        "of": statistics.median(of),
        "unit": _unit(claim.of[1]),
        "value": middle,
        "lowest": min(values),
        "highest": max(values),
        "difference": claim.difference,
        "asked": claim.asked,
        "verdict": (REACHED if claim.holds(middle) else MISSED) if claim.asked else None,
    }


def _unit(figure: str) -> str:
    return "ms" if figure.endswith("_ms") else "tok/s" if figure.endswith("_tok_s") else ""


def cells(entry: Mapping[str, Any]) -> Iterator[list[str]]:
    """A measured row in text, a claim a line: title, what it is measured against, it, the value, what was asked, verdict."""
    for claim in entry["claims"]:
        sides = [_figure(claim[name], claim["unit"]) for name in ("against", "of")]
        yield [f"{entry['title']}: {claim['title']}", *sides, _value(claim), claim["asked"], claim["verdict"] or ""]


def _figure(value: float, unit: str) -> str:
    """Without a unit it is a count."""
    return number(value, unit) if unit else f"{value:,.0f}"


def _value(claim: Mapping[str, Any]) -> str:
    sign, unit = ("+", " ms") if claim["difference"] else ("", "x")
    value, lowest, highest = (f"{claim[name]:{sign}.2f}" for name in ("value", "lowest", "highest"))
    return f"{value}{unit} ({lowest} - {highest})"


def lines(entry: Mapping[str, Any]) -> list[str]:
    """A measured row in the terminal."""
    found = [entry["title"]]
    for claim in entry["claims"]:
        sides = " -> ".join(_figure(claim[name], claim["unit"]) for name in ("against", "of"))
        asked = f", {claim['asked']}: {claim['verdict']}" if claim["asked"] else ""
        found.append(f"  {claim['title']:44} {sides:28} {_value(claim)}{asked}")
    return found
