"""Compares policies of scheduling on simulated traces, in seconds: nothing is measured, and no model is needed.

    python -m benchmarks.policies [chat documents agents bursty diurnal] [--step 0.02] [--row 0.0005] [--prompt 0.002]

The costs of a step are seconds: of its weights, of a decoding sequence, and of a prompt token.
"""

from __future__ import annotations

import argparse

from deepseek_optimizer.engine.options import EngineOptions
from deepseek_optimizer.tune.simulation import TRACES, Machine, simulate

POLICIES = {
    "defaults of a server": EngineOptions(stall=2.5),
    "no limit of stalls": EngineOptions(),
    "chunks of 64": EngineOptions(stall=2.5, step_tokens=64),
    "chunks of 2048": EngineOptions(stall=2.5, step_tokens=2048),
    "8 at once": EngineOptions(stall=2.5, batch_size_range=(1, 8)),
    "64 at once": EngineOptions(stall=2.5, batch_size_range=(1, 64)),
    "between tokens 50 ms": EngineOptions(stall=2.5, target_itl=0.05),
    "no prefix cache": EngineOptions(stall=2.5, prefix_cache=False),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("traces", nargs="*", metavar="TRACE", default=[], help=f"of {', '.join(TRACES)}; none: all")
    for name in ("step", "row", "prompt"):
        parser.add_argument(f"--{name}", type=float, default=getattr(Machine(), name))
    a = parser.parse_args()
    if unknown := set(a.traces) - set(TRACES):
        parser.error(f"no trace is called {', '.join(sorted(unknown))}; known: {', '.join(TRACES)}")
    machine = Machine(a.step, a.row, a.prompt)
    print("| trace | policy | latency | first token | tok/s |\n|---|---|---|---|---|")
    for name in a.traces or TRACES:
        for policy, options in POLICIES.items():
            found = simulate(TRACES[name](), options, machine)
            print(f"| {name} | {policy} | {found.latency_s:.2f} s | {found.first_s:.2f} s | {found.tok_s:,.0f} |", flush=True)


if __name__ == "__main__":
    main()
