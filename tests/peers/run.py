"""`python -m peers.run [SUITE ...]`: other servers' tests against `dso serve`, file by file.

The counts are printed. The command fails if a test that does not pass has no explanation, if an explanation explains nothing,
or if fewer than 85% of the tests that apply pass. `--write` updates the results that the documentation shows.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from support.outcomes import read_outcomes

from .deviations import Deviation, left_out
from .left_out import RESULTS
from .report import write
from .source import OFFLINE, SourceError, cached_files
from .suites import SUITES, Suite
from .tally import FileTally, functions, share, tally

TESTS = Path(__file__).parents[1]
LEAST = 0.85
FILE_SECONDS = 1800


def run_file(suite: Suite, file: str, folder: Path, log: Path, select: str) -> tuple[FileTally, set[Deviation]]:
    """Runs the tests of one file in a process of their own."""
    results = log.with_suffix(".jsonl")
    results.unlink(missing_ok=True)
    # The sources' own Python path comes first, so that the tested package is that of this tree or of this environment.
    search = [str(TESTS), *(os.path.abspath(one) for one in os.environ.get("PYTHONPATH", "").split(os.pathsep) if one)]
    environment = {
        **os.environ, RESULTS: str(results), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": os.pathsep.join(search),
    }  # fmt: skip
    command = [
        sys.executable, "-m", "pytest", "-p", suite.plugin, "-p", "no:cacheprovider", "-q", "--tb=short", "--disable-warnings",
        "-m", "not slow", file, *(["-k", select] if select else []),
    ]  # fmt: skip
    with log.open("w") as output:
        try:
            subprocess.run(command, cwd=folder, env=environment, stdout=output, stderr=output, timeout=FILE_SECONDS)
        except subprocess.TimeoutExpired:
            pass  # the test that was running counts as a crash
    if not results.is_file():
        result = FileTally()
        result.unexplained.append((file, f"no test was run: {log.read_text()[-300:]}"))
        return result, set()
    return tally(read_outcomes(results), suite.deviations)


def run_suite(
    suite: Suite, folder: Path, logs: Path, only: Sequence[str], select: str, store: bool = False
) -> tuple[dict[str, FileTally], list[str]]:
    """The counts by file, and the faults; with `store`, each file's are stored at once."""
    made: dict[str, FileTally] = {}
    used: set[Deviation] = set()
    for file in suite.test_files(folder):
        if only and not any(name in file for name in only):
            continue
        whole = left_out(file, suite.deviations)
        if whole is not None:
            made[file] = FileTally()
            made[file].explain(whole, functions(folder / file))
            used.add(whole)
        else:
            log = logs / f"{suite.name}.{Path(file).stem}.log"
            made[file], explained = run_file(suite, file, folder, log, select)
            used |= explained
        print(line(file, made[file]), flush=True)
        if store:
            write(suite.name, {file: made[file]})
    faults = [f"{test}: {error}" for one in made.values() for test, error in one.unexplained]
    if not only and not select:
        faults += [
            f"{one.tests}: {one.why}: explains nothing any more; remove it" for one in suite.deviations if one not in used
        ]
        if share(made) < LEAST:
            faults.append(f"{suite.name}: {share(made):.0%} of the tests that apply pass, not {LEAST:.0%}")
    return made, faults


def line(file: str, one: FileTally) -> str:
    counts = {"passed": one.passed, "skipped": one.skipped, **{kind: one.count(kind) for kind in one.explained}}
    counts["unexplained"] = len(one.unexplained)
    return f"{file}: " + (", ".join(f"{name} {count}" for name, count in counts.items() if count) or "nothing")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    names = {suite.name.lower(): suite for suite in SUITES}
    parser.add_argument("suites", nargs="*", type=str.lower, help=f"of {', '.join(names)}; all unless named")
    parser.add_argument("--file", action="append", default=[], help="only files with this in their path; repeatable")
    parser.add_argument("-k", default="", help="only the tests that fit, as pytest's -k")
    parser.add_argument("--logs", type=Path, help="folder for the output of pytest, which is otherwise deleted")
    parser.add_argument("--write", action="store_true", help="update the results and the page of the documentation")
    given = parser.parse_args()
    if unknown := set(given.suites) - set(names):
        parser.error(f"there is no suite {unknown.pop()!r}; the suites are {', '.join(names)}")
    if os.environ.get(OFFLINE) == "1":
        print(f"peers: left out, {OFFLINE}=1")
        return 0
    began, failed = time.monotonic(), False
    with tempfile.TemporaryDirectory() as scratch:
        logs = given.logs or Path(scratch) / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        for suite in map(names.__getitem__, given.suites or names):
            try:
                files = cached_files(suite.distribution)
            except SourceError as error:
                print(f"peers: {error}")
                return 1
            folder = suite.stage(files, Path(scratch) / suite.name)
            made, faults = run_suite(suite, folder, logs, given.file, given.k, given.write)
            for fault in faults:
                print(fault.replace("\n", " ")[:600])
            print(f"{suite.name}: {share(made):.1%} of the tests that apply pass, {len(faults)} faults")
            failed = failed or bool(faults)
    print(f"peers: {time.monotonic() - began:.0f} s")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
