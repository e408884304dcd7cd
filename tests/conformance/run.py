"""`python -m conformance.run [FAMILY ...]`: Transformers' tests on optimized and on plain models, family by family.

Each family's tests run in two processes in parallel, one per side. The counts are printed, and the command fails if a deviation
has no entry in `exceptions.py`.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from support.outcomes import read_outcomes
from support.rings import ROOT, seed_of

from .compare import Comparison, compare, faults
from .exceptions import KINDS
from .plugin import RESULTS, SIDE
from .source import OFFLINE, SourceError, cached_tests
from .stage import stage

TESTS = Path(__file__).parents[1]
CHECKOUT = "DSO_TRANSFORMERS_TESTS"
# Skipped without --all: they compile with torch for minutes, or are one test in two dozen variants of dtype and kernel.
SLOW = "not compil and not torch_dtype and not test_training_overfit and not (eager_matches_sdpa_inference and not fp32)"
# CI runs these and a few others, drawn by its commit: all of them take half an hour.
ALWAYS = ("llama", "deepseek_v2", "deepseek_v3", "deepseek_v32")
OTHERS = 2
FOREIGN = "not keep_in_fp32_modules_strict"


def _absolute(search_path: str) -> list[str]:
    """The folders of a search path: the tests run in another folder, where a relative one is not found."""
    return [os.path.abspath(folder) for folder in search_path.split(os.pathsep) if folder]


def start(side: str, file: Path, family: str, select: str, results: Path) -> subprocess.Popen[str]:
    """Starts one side's pytest."""
    environment = {
        **os.environ, SIDE: side, RESULTS: str(results), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join([str(TESTS), *_absolute(os.environ.get("PYTHONPATH", ""))]),
    }  # fmt: skip
    command = [
        sys.executable, "-m", "pytest", "-p", "conformance.plugin", "-p", "no:cacheprovider", "-q", "--tb=line",
        "--disable-warnings", f"{file}::Test_{family}", "-k", select,
    ]  # fmt: skip
    log = results.with_suffix(".log").open("w")
    return subprocess.Popen(command, cwd=file.parents[1], env=environment, stdout=log, stderr=subprocess.STDOUT, text=True)


def run_family(family: str, file: Path, folder: Path, select: str, side: str = "optimized") -> Comparison:
    """Runs both sides of one family.

    Raises:
        SystemExit: the control side could not be run.
    """
    paths = {name: folder / f"{family}.{name}.jsonl" for name in ("control", side)}
    running = [start(name, file, family, select, path) for name, path in paths.items()]
    for process in running:
        process.wait()
    if not paths["control"].is_file():
        raise SystemExit(f"{family}: no test was run:\n{paths['control'].with_suffix('.log').read_text()[-2000:]}")
    outcomes = [read_outcomes(path) if path.is_file() else {} for path in paths.values()]
    return compare(family, *outcomes, KINDS)


def drawn(families: Sequence[str]) -> list[str]:
    """The families that CI runs: ALWAYS, and OTHERS more, drawn by the commit."""
    rest = [family for family in families if family not in ALWAYS]
    return [*ALWAYS, *random.Random(f"{seed_of(ROOT)} conformance").sample(rest, OTHERS)]


def main() -> int:
    from deepseek_optimizer.models import ENCODERS, SUPPORTED

    known = (*SUPPORTED, *ENCODERS)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*", help=f"of {', '.join(known)}; unless named, those of CI")
    parser.add_argument("--every-family", action="store_true", help="not only those of CI")
    parser.add_argument("--all", action="store_true", help="the slow tests too")
    parser.add_argument("-k", default="", help="only the tests that fit, as pytest's -k")
    parser.add_argument("--side", default="optimized", choices=("optimized", "broken"))
    given = parser.parse_args()
    if os.environ.get(OFFLINE) == "1":
        print(f"conformance: left out, {OFFLINE}=1")
        return 0
    checkout = Path(os.environ[CHECKOUT]) if os.environ.get(CHECKOUT) else None
    select = " and ".join(f"({part})" for part in (given.k, "" if given.all else SLOW, FOREIGN) if part)
    began, made = time.monotonic(), []
    try:
        tests = cached_tests()
    except SourceError as error:
        print(f"conformance: {error}")
        return 1
    with tempfile.TemporaryDirectory() as folder:
        file = stage(tests, Path(folder) / "staged", checkout)
        for family in given.families or (known if given.every_family else drawn(known)):
            made.append(run_family(family, file, Path(folder), select, given.side))
            print(made[-1].line(), flush=True)
    wrong = faults(made, KINDS, whole=given.every_family and not given.k)
    for line in wrong:
        print(line.replace("\n", " ")[:600])
    seconds, used = time.monotonic() - began, os.times()
    of_cpu = used.children_user + used.children_system
    print(f"conformance: {len(wrong)} faults, {len(KINDS)} kinds of exceptions, {seconds:.0f} s ({of_cpu:.0f} s of one core)")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
