"""Which tests run when: a pytest plugin that marks tests `wide` or `slow`.

* `make test` runs the unmarked tests;
* `make test-all` runs `wide`: a sample that changes with every commit; the header of a run shows its seed;
* `-m slow` runs the rest.

Of a function with many cases, such as a product of families, formats and ISAs, FEW are unmarked: always the same, covering as
many values of the parameters as possible. Of the cases that cover the remaining values, WIDE_SHARE are wide, drawn at random,
and of all others SHARE.

Slow functions are listed in wide.txt, with the seconds of processor time per case. Fewer of their cases run: as many as take
FAST_S together in `make test` (none if one case takes longer), and WIDE_S in `make test-all`, where a case that takes still
longer is drawn at random, once every few commits. Functions marked `every_run` are not sampled: all their cases are unmarked.

A function named on the command line is sampled too; -m "" runs all of its cases. `--write-wide` measures MEASURED cases of each
function and updates wide.txt.
"""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import pytest

FEW = 3
WIDE_SHARE = 0.15
SHARE = 0.03
FAST_S = 0.45
WIDE_S = 2.0
MEASURED = 3
ROOT = Path(__file__).parents[2]
LIST = Path(__file__).with_name("wide.txt")

Case = dict[str, int]  # parameter -> index of its value


def covering(cases: Sequence[Case], chosen: Sequence[int] = (), limit: int | None = None) -> list[int]:
    """Indices of a few cases that, with those already chosen, cover every value of every parameter; `limit` at most."""
    missing = {value for case in cases for value in case.items()}
    for i in chosen:
        missing -= cases[i].items()
    result: list[int] = []
    while missing and len(result) != limit:
        gains = [len(missing & case.items()) for case in cases]
        result.append(gains.index(max(gains)))
        missing -= cases[result[-1]].items()
    return result


def rings(name: str, cases: Sequence[Case], cost: float, seed: str, few: int = FEW) -> list[str | None]:
    """The mark of each case of a function.

    Args:
        name: the function's name, so that functions are sampled independently.
        cost: seconds per case.
        few: unmarked cases, at most.
    """
    draw = random.Random(f"{seed} {name}")
    few = few if cost == 0 else min(few, int(FAST_S / cost))
    if len(cases) <= few:
        return [None] * len(cases)
    first = covering(cases, limit=few)
    first += [i for i in range(len(cases)) if i not in first][: few - len(first)]
    second = covering(cases, first) or [i for i in (0,) if i not in first]
    rest = sorted(set(range(len(cases))) - {*first, *second})
    wide = _drawn(draw, second, WIDE_SHARE) + _drawn(draw, rest, SHARE)
    if cost * len(wide) > WIDE_S:
        wide = _drawn(draw, wide, WIDE_S / (cost * len(wide)))
    return [None if i in first else "wide" if i in wide else "slow" for i in range(len(cases))]


def _drawn(draw: random.Random, cases: Sequence[int], share: float) -> list[int]:
    """That share of the cases on average: a fraction of a case is drawn with its probability."""
    count = share * len(cases)
    return draw.sample(cases, int(count) + (draw.random() < count % 1))


def seed_of(root: os.PathLike[str]) -> str:
    """DSO_SAMPLE_SEED, or the start of HEAD's hash; "none" in a tarball."""
    if given := os.environ.get("DSO_SAMPLE_SEED"):
        return given
    try:
        command = ["git", "-C", os.fspath(root), "rev-parse", "--short=12", "HEAD"]
        done = subprocess.run(command, capture_output=True, encoding="utf-8")
    except OSError:
        return "none"
    return done.stdout.strip() or "none"


def listed() -> dict[str, float]:
    """Function -> seconds per case, from wide.txt."""
    lines = [line.split(maxsplit=1) for line in LIST.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    return {name: float(seconds) for seconds, name in lines}


def is_sampled(item: pytest.Item) -> bool:
    """Whether it depends on the item's cost when it runs."""
    return not item.get_closest_marker("slow") and not item.get_closest_marker("every_run")


def function_of(item: pytest.Item) -> str:
    """The node id without parameters."""
    return item.nodeid.partition("[")[0]


class Rings:
    """The plugin."""

    def __init__(self, seed: str, few: int = FEW) -> None:
        self.seed, self.few, self.costs = seed, few, listed()

    def pytest_report_header(self) -> str:
        return f"sample: DSO_SAMPLE_SEED={self.seed}"

    @pytest.hookimpl(tryfirst=True)  # before -m deselects marked tests
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        functions: dict[str, list[pytest.Item]] = {}
        for item in filter(is_sampled, items):
            functions.setdefault(function_of(item), []).append(item)
        self._check(config, {function_of(item) for item in items})
        for name, cases in functions.items():
            values = [item.callspec.indices if hasattr(item, "callspec") else {} for item in cases]
            for item, mark in zip(cases, rings(name, values, self.costs.get(name, 0.0), self.seed, self.few), strict=True):
                if mark:
                    item.add_marker(mark)

    def _check(self, config: pytest.Config, there: set[str]) -> None:
        """Raises UsageError if wide.txt names a missing file, or a function that is not in a collected file."""
        if any("::" in argument for argument in config.args):
            return
        files = {name.partition("::")[0] for name in there}
        if gone := [name for name in self.costs if _is_gone(config.rootpath, name, files, there)]:
            raise pytest.UsageError(f"{LIST.name} names {gone[0]}, which does not exist: rename or delete the line")

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if terminalreporter.stats.get("failed"):
            terminalreporter.write_line(f"to repeat this sample: DSO_SAMPLE_SEED={self.seed}")


def _is_gone(root: Path, name: str, files: set[str], there: set[str]) -> bool:
    file = name.partition("::")[0]
    return not (root / file).is_file() or (file in files and name not in there)


def _spent() -> float:
    """Processor time of this process and of its descendants, such as a browser's processes, running or not, in seconds."""
    result = sum(os.times()[:4])
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            result += sum(child.cpu_times()[:4])
    return result


class Costs:
    """Measures the processor time of functions, including child processes, and writes wide.txt.

    The cost of a fixture that several tests share is divided among them.
    """

    def __init__(self) -> None:
        self.cases: dict[str, int] = {}
        self.fixtures: dict[str, list[str]] = {}
        self.seconds: dict[str, list[float]] = {}
        self.shared: dict[tuple[str, str], float] = {}  # (node id of its scope, fixture) -> seconds
        self._setting_up = 0.0

    def pytest_sessionstart(self) -> None:
        """Imports and starts what every session needs, so that it does not count as a test's cost."""
        import transformers.modeling_utils  # noqa: F401

        import deepseek_optimizer.serving  # noqa: F401
        from support import warm_python

        warm_python.run("")

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Selects MEASURED cases of each function."""
        items[:] = filter(is_sampled, items)
        functions: dict[str, list[pytest.Item]] = {}
        for item in items:
            functions.setdefault(function_of(item), []).append(item)
        self.cases = {name: len(cases) for name, cases in functions.items()}
        self.fixtures = {name: getattr(cases[0], "fixturenames", []) for name, cases in functions.items()}
        measured = {id(case) for cases in functions.values() for case in cases[:: -(-len(cases) // MEASURED)]}
        items[:] = [item for item in items if id(item) in measured]

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        before, self._setting_up = _spent(), 0.0
        try:
            return (yield)
        finally:
            self.seconds.setdefault(function_of(item), []).append(_spent() - before - self._setting_up)

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: pytest.FixtureDef[object], request: pytest.FixtureRequest) -> Iterator[None]:
        before = _spent()
        try:
            return (yield)
        finally:
            if fixturedef.scope != "function":
                key, seconds = (request.node.nodeid, fixturedef.argname), _spent() - before
                self.shared[key] = self.shared.get(key, 0.0) + seconds
                self._setting_up += seconds

    def _shares(self) -> dict[str, float]:
        """Function -> seconds per case of the fixtures that it shares with others."""
        result: dict[str, float] = defaultdict(float)
        for (scope, fixture), seconds in self.shared.items():
            users = [name for name, used in self.fixtures.items() if fixture in used and name.startswith(scope)]
            each = seconds / max(1, sum(self.cases[name] for name in users))
            for name in users:
                result[name] += each
        return result

    def pytest_sessionfinish(self) -> None:
        costs = {
            name: cost
            for name, cost in listed().items()
            if name not in self.seconds and (ROOT / name.partition("::")[0]).is_file()
        }
        shares = self._shares()
        for name, each in self.seconds.items():
            mean = sum(each) / len(each) + shares[name]
            if mean * self.cases[name] > FAST_S:
                costs[name] = mean
        comment = [line for line in LIST.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
        lines = [f"{costs[name]:7.3f} {name}" for name in sorted(costs)]
        LIST.write_text("\n".join([*comment, *lines]) + "\n", encoding="utf-8")
