"""Throughput of our server beside the offline engine's or an earlier commit's server, batch by batch:

    python -m benchmarks.serving_batches engine [--starts 3] [--batches 8]
    python -m benchmarks.serving_batches COMMIT

Both sides are alive at the same time and answer the same batches in turns, several starts of them: a machine whose memory or
processors differ from process to process or from minute to minute changes the ratio of single runs by a fifth, as the rows
serve-* of `make bench` show. The clients are this tree's for both sides. Prints the ratio of every batch and the median of all;
more is better. Nothing else may run meanwhile.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

from deepseek_optimizer.bench.hardware import cpu_name, usable_cpus
from deepseek_optimizer.bench.served import Served

from . import commits, load
from .measure_serving import VOCABULARY
from .models import model
from .prompts import random_prompts
from .serving import PLAIN, SERVING

ENGINE = "engine"
Side = Callable[[int], float]  # seed of a batch -> output tokens a second


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("other", help=f"{ENGINE!r}, or a commit")
    parser.add_argument("--starts", type=int, default=3, help="of both sides' processes")
    parser.add_argument("--batches", type=int, default=8, help="for each start")
    parser.add_argument("--at-least", type=float, default=0.0, help="median ratio that passes")
    a = parser.parse_args()
    environment = None if a.other == ENGINE else commits.earlier(a.other)[1]
    print(f"{cpu_name()}, {usable_cpus()} threads; 16 clients, 256 tokens in, 128 out; our server compared with {a.other}")
    ratios: list[float] = []
    for _ in range(a.starts):
        with ExitStack() as stack:
            other = _engine() if environment is None else _server(environment)
            ours, theirs = stack.enter_context(_server()), stack.enter_context(other)
            found = in_turns(ours, theirs, a.batches)
        ratios += found
        print("  ".join(f"{ratio:.3f}x" for ratio in found), flush=True)
    middle = statistics.median(ratios)
    print(f"median {middle:.3f}x ({min(ratios):.3f} - {max(ratios):.3f})")
    raise SystemExit(int(middle < a.at_least))


def in_turns(ours: Side, theirs: Side, batches: int) -> list[float]:
    """The ratio of each batch; the first, which is not counted, warms both sides. Who begins changes every time."""
    ratios = []
    for seed in range(1 + batches):
        order = (ours, theirs) if seed % 2 else (theirs, ours)
        speeds = {side: side(seed) for side in order}
        ratios.append(speeds[ours] / speeds[theirs])
    return ratios[1:]


@contextmanager
def _server(environment: Mapping[str, str] | None = None) -> Iterator[Side]:
    with Served(model("smol", _SIDE.form), "--threads", str(usable_cpus()), *PLAIN, environment=environment) as server:
        yield lambda seed: asyncio.run(load.batch(server.port, random_prompts(seed, _BATCH, _PROMPT, VOCABULARY), _NEW))


@contextmanager
def _engine() -> Iterator[Side]:
    path, shape = str(model("smol", _SIDE.form)), ("--batch", str(_BATCH), "--prompt", str(_PROMPT), "--new", str(_NEW))
    command = [sys.executable, "-m", "benchmarks.offline", "batches", path, "--threads", str(usable_cpus()), *PLAIN, *shape]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        requests, answers = process.stdin, process.stdout

        def batch(seed: int) -> float:
            print(seed, file=requests, flush=True)
            return float(answers.readline())

        yield batch
        requests.close()  # it ends
        process.wait()


_SIDE = next(row for row in SERVING if row.name == "serve-16").sides["our server"]
_BATCH, _PROMPT, _NEW = (int(_SIDE.numbers[name]) for name in ("batch", "prompt", "new"))

if __name__ == "__main__":
    main()
