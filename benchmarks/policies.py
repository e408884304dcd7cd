"""Compares policies of scheduling on simulated traces, in seconds: nothing is measured, and no model is needed.

    python -m benchmarks.policies [steady bursty diurnal agents documents mixed] [--step 0.02] [--row 0.0005] [--prompt 0.002]
    python -m benchmarks.policies --learned [--goal latency] [--seed 1] [--rate 1.2]

With `--learned`, the learned policy is compared with the best of the fixed ones that it chooses from, in hindsight. The costs
of a step are seconds: of its weights, of a decoding sequence, and of a prompt token. `--seed` generates other requests of the
same kinds, and `--rate` lets them come faster.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

from deepseek_optimizer.engine.options import EngineOptions
from deepseek_optimizer.engine.scheduling.learned_policy import GOALS
from deepseek_optimizer.serving import STALL
from deepseek_optimizer.tune.regret import regret
from deepseek_optimizer.tune.simulated_traces import TRACES
from deepseek_optimizer.tune.simulation import Machine, simulate
from deepseek_optimizer.tune.traces import Trace

POLICIES = {
    "defaults of a server": EngineOptions(stall=2.5),
    "no limit of stalls": EngineOptions(),
    "chunks of 64": EngineOptions(stall=2.5, step_tokens=64),
    "chunks of 2048": EngineOptions(stall=2.5, step_tokens=2048),
    "8 at once": EngineOptions(stall=2.5, batch_size_range=(1, 8)),
    "32 at once, no fewer": EngineOptions(stall=2.5, batch_size_range=(32, 32)),
    "64 at once": EngineOptions(stall=2.5, batch_size_range=(1, 64)),
    "between tokens 50 ms": EngineOptions(stall=2.5, target_itl=0.05),
    "no prefix cache": EngineOptions(stall=2.5, prefix_cache=False),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("traces", nargs="*", metavar="TRACE", default=[], help=f"of {', '.join(TRACES)}; none: all")
    for name in ("step", "row", "prompt"):
        parser.add_argument(f"--{name}", type=float, default=getattr(Machine(), name))
    parser.add_argument("--learned", action="store_true", help="compare the learned policy with the best fixed one")
    parser.add_argument("--seed", type=int, default=0, help="of the traces")
    parser.add_argument("--rate", type=float, default=1.0, help="how many times as many requests per second")
    parser.add_argument("--goal", choices=GOALS, default=GOALS[0])
    a = parser.parse_args()
    if unknown := set(a.traces) - set(TRACES):
        parser.error(f"no trace is called {', '.join(sorted(unknown))}; known: {', '.join(TRACES)}")
    machine = Machine(a.step, a.row, a.prompt)
    traces = {name: _faster(TRACES[name](seed=a.seed), a.rate) for name in a.traces or TRACES}
    if a.learned:
        _learned(traces, machine, a.goal)
        return
    print("| trace | policy | latency | first token | tok/s |\n|---|---|---|---|---|")
    for name, trace in traces.items():
        for policy, options in POLICIES.items():
            found = simulate(trace, options, machine)
            print(f"| {name} | {policy} | {found.latency_s:.2f} s | {found.first_s:.2f} s | {found.tok_s:,.0f} |", flush=True)


def _faster(trace: Trace, rate: float) -> Trace:
    return tuple(replace(request, at=request.at / rate) for request in trace)


def _learned(traces: dict[str, Trace], machine: Machine, goal: str) -> None:
    """Prints what the learned policy costs, in percent of the engine's own limits and of the best fixed ones."""
    print("| trace | best fixed limits | best fixed / own | learned / own | learned / best fixed |\n|---|---|---|---|---|")
    for name, trace in traces.items():
        found = regret(trace, EngineOptions(stall=STALL), machine, goal)
        own = next(iter(found.fixed.values()))
        best = found.fixed[found.best] / own
        print(f"| {name} | {found.best} | {best:.3f} | {1 + found.over_own:.3f} | {1 + found.over_best:.3f} |", flush=True)


if __name__ == "__main__":
    main()
