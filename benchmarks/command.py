"""What the commands have in common: which rows, how often, where results go, and how a soak ends."""

from __future__ import annotations

import argparse
import datetime
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from deepseek_optimizer.bench.hardware import cpu_name, usable_cpus
from deepseek_optimizer.bench.served import Served
from deepseek_optimizer.system.memory import free_memory
from deepseek_optimizer.versions import versions

from . import results


@dataclass(frozen=True)
class Asked:
    """Attributes:
    names: of rows, in order.
    directory: for results; None: they are not kept.
    """

    names: list[str]
    rounds: int
    quick: bool
    directory: Path | None

    def facts(self) -> dict[str, Any]:
        """When, where and how often: what every entry of a results file says."""
        return {
            "date": datetime.date.today().isoformat(), "cpu": cpu_name(), "threads": usable_cpus(), "versions": versions(),
            "memory": str(free_memory()), "rounds": self.rounds,
        }  # fmt: skip


def asked(description: str, known: Iterable[str], rounds: int) -> Asked:
    """From the command line.

    Args:
        known: names of rows, all of which are meant where none is given.
        rounds: unless others are asked for; with --quick one.
    """
    known = list(known)
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(known)}; none: all")
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--quick", action="store_true", help="tiny lengths, one round")
    parser.add_argument("--results", type=Path, help="directory; default: benchmarks/results, with --quick none")
    a = parser.parse_args()
    if unknown := set(a.names) - set(known):
        parser.error(f"no row is called {', '.join(sorted(unknown))}; known: {', '.join(known)}")
    directory = a.results or (None if a.quick else results.DIRECTORY)
    return Asked(a.names or known, 1 if a.quick else a.rounds, a.quick, directory)


def conclude(failures: list[str], server: Served) -> NoReturn:
    """Ends a soak: prints what failed, a server among it that ended badly, and exits with status 1 where anything did.

    Args:
        server: has been left.
    """
    if server.process.returncode:
        failures = [*failures, f"the server ended with status {server.process.returncode}"]
    for failure in failures[:20]:
        print(f"FAILED {failure}")
    print("failed" if failures else "passed")
    raise SystemExit(bool(failures))
