"""This tree's speed beside an earlier commit's, in turns: `make bench-commits BEFORE=COMMIT BENCH="smol-decode serve-16"`.

    python -m benchmarks.commits COMMIT [NAME...] [--rounds 5] [--at-least 0.98]

NAME is a row of the standing set or of serving; only our own sides of it run. The earlier commit is built into the user's cache
directory once, and measured by its own scripts, with the same interpreter and the same models. Prints each figure as the median
over rounds of (now / before), more being better, with the lowest and the highest. Ends with status 1 where a median is below
--at-least. Nothing else may run meanwhile.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

from deepseek_optimizer.bench.hardware import cpu_name, usable_cpus
from deepseek_optimizer.bench.smollm2 import cache_directory

Figures = dict[str, float]
ROOT = Path(__file__).resolve().parents[1]
NOW, BEFORE = "now", "before"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("commit", help="what this tree is compared with")
    parser.add_argument("names", nargs="*", metavar="NAME", default=["smol-decode", "smol-prefill"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--at-least", type=float, default=0.98, help="ratio now / before that passes")
    a = parser.parse_args()
    trees = {BEFORE: earlier(a.commit), NOW: (ROOT, dict(os.environ))}
    print(f"{cpu_name()}, {usable_cpus()} threads; {a.commit} before; median (lowest - highest) of {a.rounds} rounds")
    slower = False
    for name in a.names:
        found: dict[str, list[Figures]] = {side: [] for side in trees}
        for turn in range(a.rounds):
            # Turns alternate, so that what else the machine does affects both alike. The earlier commit is the first: it packs
            # the models that both use, and the later one reads its format.
            order = list(reversed(trees)) if turn % 2 else list(trees)
            for side in order:
                print(f"{name}: round {turn + 1} of {a.rounds}: {side}", file=sys.stderr)
                found[side].append(measured(name, turn, *trees[side]))
        for line, ratio in compared(name, found):
            print(line, flush=True)
            slower = slower or ratio < a.at_least
    raise SystemExit(int(slower))


def compared(name: str, found: dict[str, list[Figures]]) -> list[tuple[str, float]]:
    """Of each figure: a line for people, and the median ratio."""
    lines = []
    for figure in found[NOW][0]:
        ratios = [now[figure] / before[figure] for now, before in zip(found[NOW], found[BEFORE], strict=True)]
        sides = [statistics.median(values[figure] for values in found[side]) for side in (BEFORE, NOW)]
        middle = statistics.median(ratios)
        span = f"{middle:.3f}x ({min(ratios):.3f} - {max(ratios):.3f})"
        lines.append((f"{name:14} {figure:40} {sides[0]:10.1f} -> {sides[1]:10.1f} tok/s  {span}", middle))
    return lines


def measured(name: str, turn: int, tree: Path, environment: dict[str, str]) -> Figures:
    """One side of one round, by the scripts of that tree."""
    script = Path(__file__).with_name("commits_side.py")
    command = [sys.executable, str(script), str(tree), name, str(turn), str(usable_cpus())]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name} failed in {tree}:\n{done.stderr}")
    figures: Figures = json.loads(done.stdout.splitlines()[-1])
    return figures


def earlier(commit: str) -> tuple[Path, dict[str, str]]:
    """A commit's tree and the environment in which its package is imported; built where it is not there yet."""
    sha = _git("rev-parse", "--verify", f"{commit}^{{commit}}").strip()
    target = cache_directory() / "commits" / sha
    tree, site = target / "tree", target / "site"
    if not (target / ".built").exists():
        print(f"building {sha[:10]} in {target}", file=sys.stderr)
        shutil.rmtree(target, ignore_errors=True)
        tree.mkdir(parents=True)
        archive = subprocess.run(["git", "archive", sha], cwd=ROOT, check=True, capture_output=True).stdout
        subprocess.run(["tar", "-x", "-C", str(tree)], input=archive, check=True)
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(tree)]
        subprocess.run(install, check=True, env={**os.environ, "DSO_REQUIRE_NATIVE": "1"})
        (target / ".built").touch()
    return tree, {**os.environ, "PYTHONPATH": str(site)}


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    main()
