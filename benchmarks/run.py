"""Measures the standing set, drafts, serving, comparisons with Transformers, all or some, and keeps the results: `make bench`.

    python -m benchmarks.run [NAME...] [--rounds 3] [--quick]

Nothing else may run meanwhile. A row's result is written as soon as it is there. `--quick` shows whether everything works, not
how fast it is: tiny lengths, one round, and results nowhere but in a directory that is named.
"""

from __future__ import annotations

import sys
from typing import Any

from deepseek_optimizer.bench.hardware import usable_cpus
from deepseek_optimizer.bench.machine_limits import read_gb_s

from . import measure, measure_serving, results, speculation, spine
from .command import asked
from .deepseek import DEEPSEEK
from .families import FAMILIES
from .long_context import LONG
from .serving import SERVING, Serving
from .speculation import SPECULATION, Speculation
from .spine import SPINE, Comparison
from .standing import STANDING, Row
from .tables import bar_lines, ratio_lines

SIZES_MB = (76, 900)  # what int4 weights of 135 million and of 1.5 billion parameters take


def main() -> None:
    rows: list[Any] = [*STANDING, *DEEPSEEK, *FAMILIES, *LONG, *SPECULATION, *SERVING, *SPINE]
    known = {row.name: row for row in rows}
    a = asked(__doc__.splitlines()[0], known, rounds=3)
    seconds, threads = 0.1 if a.quick else 1.0, usable_cpus()
    bandwidth = {f"{size} MB": read_gb_s(size * 10**6, threads, seconds) for size in SIZES_MB}
    facts = {**a.facts(), "read_gb_s": bandwidth}
    print(f"{facts['cpu']}, {threads} threads, reads {facts['read_gb_s']} GB/s; {facts['memory']}")
    print(f"median (lowest - highest) of {a.rounds} rounds")
    for name in a.names:
        found, kind, lines = _measure(known[name], a.quick, threads, a.rounds, seconds)
        print("\n".join(lines), flush=True)
        if a.directory:
            results.merge(kind, {name: {**facts, **found}}, a.directory)


def _measure(
    row: Row | Comparison | Speculation | Serving, quick: bool, threads: int, rounds: int, seconds: float
) -> tuple[dict[str, Any], str, list[str]]:
    """What was found, the set that it belongs to, and what to print of it."""

    def note(text: str) -> None:
        print(f"{row.name}: {text}", file=sys.stderr)

    if isinstance(row, Row):
        found = measure.measure(row.quick() if quick else row, threads=threads, rounds=rounds, note=note, seconds=seconds)
        sets = {"deepseek": DEEPSEEK, "families": FAMILIES, "long": LONG}
        kind = next((name for name, rows in sets.items() if row in rows), "standing")
        return found, kind, bar_lines(found)
    if isinstance(row, Speculation):
        found = speculation.measure(row.quick() if quick else row, threads=threads, rounds=rounds, note=note)
        return found, "speculation", speculation.lines(found)
    if isinstance(row, Serving):
        found = measure_serving.measure(row.quick() if quick else row, threads=threads, rounds=rounds, note=note)
        return found, "serving", measure_serving.lines(found)
    found = spine.measure(row.quick() if quick else row, threads=threads, rounds=rounds, note=note)
    return found, "spine", ratio_lines(found)


if __name__ == "__main__":
    main()
