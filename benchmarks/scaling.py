"""Predicts tokens per second on machines with 8 to 192 cores, 1 to 4 memory nodes and 40 to 800 GB/s (`bench/scaling.py`).

    python -m benchmarks.scaling MODEL [--precision int4] [--costs FILE]  # the table
    python -m benchmarks.scaling --measure FILE [--precision int4]        # what is predicted from
    python -m benchmarks.scaling --check [smol.int4 r1q15.int4 ...]       # predictions against measured speeds

Bar of issue 21: the predictions at 1 and 2 cores are within 10% of measured speeds for four models. Nothing else may run
meanwhile. A table from `--costs` needs no quiet machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deepseek_optimizer import load_model
from deepseek_optimizer.bench.hardware import usable_cpus
from deepseek_optimizer.bench.runs import repeated
from deepseek_optimizer.bench.scaling import Costs, Machine, predict
from deepseek_optimizer.bench.scaling_costs import measure_costs
from deepseek_optimizer.bench.step_work import StepWork, step_work
from deepseek_optimizer.bench.work import Work

from . import models
from .verdict import MISSED, REACHED

BAR = 0.10
CHECKED = ("smol.int4", "smol.int8", "r1q15.int4", "v2l6.int4")
MACHINES = (
    Machine(8, 40), Machine(8, 80), Machine(16, 80), Machine(16, 200), Machine(32, 200), Machine(64, 300), Machine(96, 400),
    Machine(64, 400, nodes=2), Machine(128, 600, nodes=2), Machine(128, 800, nodes=4), Machine(192, 800, nodes=2),
    Machine(192, 800, nodes=4),
)  # fmt: skip
# Published, gathered in November 2026. What each has beside it is the prediction of the same ratio for the model of the table.
NODES = ("vLLM, pull request 32792", "tensor parallel over two nodes by shared memory, speed relative to one node", "1.96")
GLOO = ("vLLM before it", "the same over torch.distributed", "0.60")
STREAM = ("llama.cpp, issue 25976", "decoding Q4_K on Neoverse-N2, share of STREAM's bandwidth", "0.54 to 0.63")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"path; with --check: NAME.FORM, by default {CHECKED}")
    parser.add_argument("--precision", default="int4")
    parser.add_argument("--costs", type=Path, help="written by --measure; default: this machine is measured")
    parser.add_argument("--measure", type=Path, metavar="FILE", help="measure this machine, and write this file")
    parser.add_argument("--check", action="store_true", help="compare predictions with measured speeds")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=7)
    a = parser.parse_args()
    work = Work(prompt=a.prompt, new=a.new, batch=a.batch)
    if a.measure:
        a.measure.write_text(json.dumps(measure_costs(precision=a.precision, note=print).to_dict(), indent=1), encoding="utf-8")
    elif a.check:
        raise SystemExit(not check(a.models or CHECKED, work, a.repeats))
    else:
        costs = Costs.from_dict(json.loads(a.costs.read_text(encoding="utf-8"))) if a.costs else measure_costs()
        for path in a.models:
            model = load_model(path, precision=a.precision)
            print("\n".join(table(Path(path).name, step_work(model, work), costs)))


def table(name: str, work: StepWork, costs: Costs) -> Iterator[str]:
    """Lines of Markdown: the predictions for MACHINES, and ratios of these beside published ones."""
    yield f"{name}: {work.weight_bytes / 1e6:,.0f} MB of weights in {work.hand_overs} stages, batch {work.batch}"
    yield ""
    yield "| cores | nodes | GB/s | tok/s | weights | cache | hand-overs | outside |"
    yield "|---|---|---|---|---|---|---|---|"
    for machine in MACHINES:
        found = predict(work, costs, machine)
        shares = " | ".join(f"{100 * share:.0f}%" for share in found.shares.values())
        yield f"| {machine.cores} | {machine.nodes} | {machine.gb_s:g} | {found.low:,.1f} to {found.high:,.1f} | {shares} |"
    yield ""
    yield "| published by | what | published | predicted |"
    yield "|---|---|---|---|"
    one, two = predict(work, costs, Machine(32, 200)), predict(work, costs, Machine(64, 400, nodes=2))
    between = f"{two.low / one.low:.2f} to {two.high / one.high:.2f} (32 cores and 200 GB/s each)"
    yield f"| {' | '.join(NODES)} | {between} |"
    yield f"| {' | '.join(GLOO)} | not predicted |"
    read = (work.weight_bytes + work.cache_bytes) / work.batch / 1e9 / 200
    yield f"| {' | '.join(STREAM)} | {one.low * read:.2f} to {one.high * read:.2f} (32 cores, 200 GB/s) |"


def check(names: Any, work: Work, repeats: int) -> bool:
    """Prints a line for each model and number of threads; returns whether all reach the bar."""
    costs: dict[str, Costs] = {}
    reached = True
    for name in names:
        model, _, form = name.partition(".")
        if form not in costs:
            costs[form] = measure_costs([n for n in (1, 2) if n <= usable_cpus()], form)
        for threads in costs[form].product_gb_s:
            result = compare(models.model(model, form), work, costs[form], threads, repeats)
            reached = reached and result["verdict"] == REACHED
            print(json.dumps({"model": name, **result}), flush=True)
    return reached


def compare(path: Path, work: Work, costs: Costs, threads: int, repeats: int) -> dict[str, Any]:
    """The predicted and the measured speed of a model on this machine."""
    model = load_model(path, threads=threads)
    speeds = [work.batch / run.tpot_s for run in repeated(model, work, repeats=repeats) if run.tpot_s]
    found = predict(step_work(model, work), costs, Machine(threads, costs.read_gb_s))
    measured = statistics.median(speeds)
    error = found.middle / measured - 1
    return {
        "threads": threads, "measured_tok_s": measured, "predicted_tok_s": found.middle, "error": error,
        "shares": dict(found.shares), "verdict": REACHED if abs(error) <= BAR else MISSED,
    }  # fmt: skip


if __name__ == "__main__":
    main()
