"""Kernels on this processor's AMX tiles against the vector kernels: from how many tokens on they are faster, with which panel.

    make bench-amx        # about 15 minutes, most of it building

For each size of the panel of unpacked weights, the kernels are built so that tiles compute any number of tokens, and timed
beside those of AVX-512: products, absorbed attention by tokens in the cache, and the indexer. Results go to
benchmarks/results/amx-CPU.json, with the values that DSO_AMX_VECTOR_TOKENS and DSO_AMX_PANEL_GROUPS in
native/kernels/amx/linear_amx.hpp should have here. Not run on a processor with AMX yet.

Without AMX the emulated tiles run, if AVX-512 with VNNI and BF16 is there: it shows that the benchmark works, and is not kept.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from deepseek_optimizer.bench.hardware import cpu_name
from deepseek_optimizer.errors import BackendError

from . import results
from .gpu import slug

_ROOT = Path(__file__).parents[1]
_ISAS = "avx2;avx512_bf16;amx;amx_emulated"

Row = dict[str, Any]  # a line of native/tests/bench_amx.cpp: kernel and format, and microseconds by number of tokens
Runner = Callable[[int, str], list[Row]]  # of a panel and an instruction set


def crossover(row: Row) -> int | None:
    """The least measured number of tokens from which on tiles are faster than vectors; None: not even for the most tokens."""
    found = None
    for tokens, tiles, vectors in zip(reversed(row["tokens"]), reversed(row["tiles"]), reversed(row["vectors"]), strict=True):
        if tiles >= vectors:
            break
        found = int(tokens)
    return found


def _products(rows: list[Row]) -> list[Row]:
    """Those of integer weights, which may use either: floats in tiles differ from those in vectors, whatever their number."""
    return [row for row in rows if row["kernel"] == "linear" and row["format"] not in ("BF16", "FP8")]


def best_panel(runs: dict[int, list[Row]]) -> int:
    """The panel with which products on tiles are fastest: geometric mean over formats and numbers of tokens from 5 on."""

    def mean(rows: list[Row]) -> float:
        times = [us for row in _products(rows) for tokens, us in zip(row["tokens"], row["tiles"], strict=True) if tokens > 4]
        return sum(math.log(us) for us in times) / len(times)

    return min(runs, key=lambda panel: mean(runs[panel]))


def recommended(rows: list[Row]) -> int:
    """How many tokens vectors should compute at most: one less than the median crossover of the integer formats."""
    found = sorted(crossover(row) or math.inf for row in _products(rows))
    middle = found[len(found) // 2]
    return int(middle) - 1 if middle < math.inf else int(rows[0]["tokens"][-1])


def build_and_run(panel: int, isa: str) -> list[Row]:
    """Raises BackendError with the program's message if the instruction set does not run here."""
    build = _ROOT / "build" / f"native-amx-{panel}"
    flags = f"-DDSO_AMX_VECTOR_TOKENS=0 -DDSO_AMX_PANEL_GROUPS={panel}"
    cmake = os.environ.get("CMAKE", "cmake")
    options = ["-DDSO_TESTS=ON", f"-DDSO_ISAS={_ISAS}", f"-DCMAKE_CXX_FLAGS={flags}"]
    subprocess.run([cmake, "-S", str(_ROOT), "-B", str(build), *options], check=True, stdout=subprocess.DEVNULL)
    jobs = str(os.cpu_count() or 1)
    subprocess.run([cmake, "--build", str(build), "-j", jobs, "--target", "bench_amx"], check=True, stdout=subprocess.DEVNULL)
    done = subprocess.run([str(build / "native" / "tests" / "bench_amx"), isa], capture_output=True, text=True)
    if done.returncode != 0:
        raise BackendError(done.stderr.strip() or f"bench_amx ended with {done.returncode}")
    return [json.loads(line) for line in done.stdout.splitlines()]


def report(entry: dict[str, Any]) -> str:
    lines = [f"{entry['cpu']}: panels of {entry['panel_groups']} groups, vectors up to {entry['vector_tokens']} tokens"]
    for row in entry["rows"]:
        ratio = row["vectors"][-1] / row["tiles"][-1]
        first = crossover(row)
        when = f"faster from {first} tokens on" if first is not None else "not faster"
        name = f"{row['kernel']:8} {row['format']:6} kind {row['kind']}"
        lines.append(f"  {name}: tiles are {when}; {ratio:.2f}x at {row['tokens'][-1]} tokens")
    return "\n".join(lines)


def isa_here(why_not: Callable[[str], str | None]) -> str:
    """The instruction set to measure. Raises BackendError, naming what is missing, if not even the emulation runs."""
    real, emulated = why_not("amx"), why_not("amx-emulated")
    if real is None:
        return "amx"
    print(f"no AMX here: {real}", flush=True)
    if emulated is not None:
        raise BackendError(f"nor can its tiles be emulated: {emulated}")
    return "amx-emulated"


def main(
    argv: Sequence[str] | None = None,
    run: Runner = build_and_run,
    why_not: Callable[[str], str | None] | None = None,
    directory: Path = results.DIRECTORY,
) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--panels", nargs="+", type=int, default=[8, 16, 32])
    panels = parser.parse_args(argv).panels
    from deepseek_optimizer.doctor.checks import features

    isa = isa_here(why_not or features.why_not)
    runs = {panel: run(panel, isa) for panel in panels}
    panel = best_panel(runs)
    entry = {
        "date": datetime.date.today().isoformat(), "cpu": cpu_name(), "isa": isa, "panel_groups": panel,
        "vector_tokens": recommended(runs[panel]), "rows": runs[panel],
        "panels": {str(p): rows for p, rows in runs.items() if p != panel},
    }  # fmt: skip
    print(report(entry))
    if isa == "amx":
        results.merge(f"amx-{slug(cpu_name())}", {"kernels": entry}, directory)
    else:
        print("emulated tiles: these times say nothing about AMX, and are not kept")


if __name__ == "__main__":
    main()
