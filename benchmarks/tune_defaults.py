"""How much better than the defaults are the best of 200 random settings, and those that `dso tune` finds?

    python -m benchmarks.tune_defaults MODEL [--trace bursty agents documents] [--settings 200] [--trials 30] [--seconds 1]

Bar of issue 22: on each of three traces, `dso tune` is at least 15% better at the trace's goal, or the defaults are within 3%
of the best random settings, which are measured only if it is not (or with --random): a search takes 2 to 4 minutes, 200
settings up to 12. Nothing else may run meanwhile. The results of a trace are added to a file, and traces that are in it with
the same options are not measured again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deepseek_optimizer.backends.cpu import thread_limits
from deepseek_optimizer.bench.hardware import cpu_name
from deepseek_optimizer.integration.load.resolve import resolve
from deepseek_optimizer.serving import STALL
from deepseek_optimizer.tune.cost_model import CostModel
from deepseek_optimizer.tune.replay import ModelMeasure
from deepseek_optimizer.tune.search import search
from deepseek_optimizer.tune.settings import Figures, Settings, space

from .tune_race import once, race
from .tune_traces import CASES
from .verdict import MISSED, REACHED

GAIN, WITHIN = 0.15, 0.03  # the bar: of dso tune, and of the defaults
LONGEST = 1.5  # replays that take so many times as long as the defaults' are ended
_FIRST = 3  # replays of the defaults, of which the median one says how long a replay may take


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="path of a model of about 135M parameters")
    parser.add_argument("--trace", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--settings", type=int, default=200, metavar="N", help="random settings (default 200)")
    parser.add_argument("--random", action="store_true", help="measure them even if dso tune reaches the bar")
    parser.add_argument("--trials", type=int, default=24, metavar="N", help="of dso tune (default 24)")
    parser.add_argument("--seconds", type=float, default=1.0, help="of requests in a trace (default 1)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=Path("tune_defaults.json"), metavar="FILE")
    a = parser.parse_args()
    known = json.loads(a.results.read_text(encoding="utf-8")) if a.results.exists() else {}
    asked = {
        "model": Path(a.model).name, "settings": a.settings, "trials": a.trials, "seconds": a.seconds, "seed": a.seed,
        "cpu": cpu_name(), "threads": thread_limits()[0], "random": a.random,
    }  # fmt: skip
    for name in a.trace:
        if known.get(name, {}).get("asked") != asked:
            known[name] = {"asked": asked, **measured(a.model, name, a)}
            a.results.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
        print(line(name, known[name]), flush=True)
    raise SystemExit(any(known[name]["verdict"] != REACHED for name in a.trace))


def measured(model: str, name: str, a: argparse.Namespace) -> dict[str, Any]:
    """The entry of a trace in the file."""
    threads, cpus = thread_limits()
    case, defaults, begin = CASES[name], Settings(threads=threads), time.monotonic()
    costs = CostModel(defaults, STALL)
    measure = ModelMeasure(
        resolve(model), {}, case.make(a.seconds), at_once=case.goal == "throughput", models=2, observe=costs.add
    )
    once(measure, defaults)  # loads the model
    usual, plain = sorted((_timed(measure, defaults) for _ in range(_FIRST)), key=lambda one: one[0])[_FIRST // 2]
    values = space(threads, cpus, ("auto",))
    _note(f"{name}: a replay takes {usual:.2f} s")
    found = search(measure, costs, values, defaults, case.goal, trials=a.trials, seed=a.seed, note=_note)
    entry: dict[str, Any] = {
        "goal": case.goal, "replay_s": usual, "tuned": str(found.best), "gain": found.gain, "tried": len(found.trials),
        "step_error": found.predictions.step_error, "error": found.predictions.error, "ratios": [],
    }  # fmt: skip
    if a.random or found.gain < GAIN:

        def quick(some: Settings) -> Iterator[Figures]:
            measure.longest = LONGEST * usual
            try:
                yield from measure(some)
            finally:
                measure.longest = None

        won = race(quick, measure, drawn(values, defaults, a.settings, a.seed), defaults, plain, case.goal, _note)
        entry |= {"best": str(won.best), "ratios": won.ratios, "ratio": won.ratio, "replayed": won.replayed}
    return {**entry, "seconds": time.monotonic() - begin, "verdict": verdict(found.gain, entry.get("ratio"))}


def verdict(gain: float, ratio: float | None) -> str:
    """gain: of dso tune, 0.2: 20% better; ratio: how many times as good as the defaults the best random settings are, if these
    were measured."""
    return REACHED if gain >= GAIN or (ratio is not None and ratio <= 1 + WITHIN) else MISSED


def drawn(values: Any, defaults: Settings, count: int, seed: int) -> list[Settings]:
    """Random settings, each once, without the defaults; all of them if there are not more."""
    every = [Settings(**dict(zip(values, chosen, strict=True))) for chosen in itertools.product(*values.values())]
    every = [one for one in every if one != defaults]
    return random.Random(seed).sample(every, min(count, len(every)))


def line(name: str, entry: dict[str, Any]) -> str:
    text = f"{name} ({entry['goal']}, replays of {entry['replay_s']:.2f} s)"
    text += f": dso tune found {entry['gain']:+.1%} ({entry['tuned']}) with {entry['tried']} settings measured"
    if entry["error"] is not None:
        text += f", the cost model's median error {entry['error']:.0%} at the goal and {entry['step_error']:.0%} per step"
    if ratios := entry["ratios"]:
        text += (
            f"; the best of {entry['asked']['settings']} random settings is {entry['ratio']:.3f} times as good as the defaults "
            f"({min(ratios):.3f} - {max(ratios):.3f} in {len(ratios)} pairs; {entry['best']})"
        )
    return f"{text}: {entry['verdict']}; {entry['seconds']:.0f} s"


def _timed(measure: ModelMeasure, settings: Settings) -> tuple[float, Figures]:
    begin = time.monotonic()
    figures = once(measure, settings)
    return time.monotonic() - begin, figures


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
