"""Mutational fuzzer of checkpoint headers: safetensors, sharded index, GGUF, and packed checkpoints.

    python tests/fuzz/fuzz_headers.py --inputs 1000000 [--seed 0] [--jobs N] [--only K]

An input is a valid file with a few mutations that know the structure of headers: lengths and counts get wrong values, JSON
tokens become other tokens, bytes flip, ranges vanish or repeat. Input K of a seed is always the same; `--only K` runs it alone,
with the traceback. Each is opened, and if that succeeds, its config and tensors are read. Requirements:

- no exception but CheckpointError or ConfigError;
- no input takes longer than two seconds;
- no large allocations: the address space is limited while the inputs run, and every 64th input's Python memory is measured and
  compared with the file's size.

Files are in memory (/dev/shm). If an input violates this, its number is printed and the exit status is 1.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import resource
import signal
import struct
import sys
import tempfile
import time
import traceback
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from deepseek_optimizer.checkpoint import open_checkpoint  # noqa: E402
from deepseek_optimizer.errors import CheckpointError, ConfigError  # noqa: E402
from deepseek_optimizer.quant import pack  # noqa: E402
from support.checkpoint_files import (  # noqa: E402
    STACKS,
    deepseek2_tensors,
    deepseek2_values,
    gguf_bytes,
    model_tensors,
    model_values,
    safetensors_bytes,
)
from support.packed_files import packed_fields  # noqa: E402

ADDRESS_SPACE = 256 << 20  # in addition to that of the process before the first input; no input is larger than 64 KB
PYTHON_MEMORY = 256 << 10  # in addition to the file's size: enough to open the smallest valid file
SECONDS = 2.0
NUMBERS = (*range(4), 7, 8, 13, 31, 32, 33, 63, 64, 127, 128, 255, 256, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1, 2**32,
           2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1)  # fmt: skip
TOKENS = (
    "0", "-1", "1", "2", "32", "1.5", "1e999", "9223372036854775807", "18446744073709551616", "9" * 400, "NaN", "Infinity",
    "null", "true", '""', '"F32"', '"BF16"', '"U8"', '"int4"', '"q4_1"', '"../x"', '"\\u0000"', '"\\ud800"',
    "[]", "{}", "[1,2]", "[0,0]", '{"format":"int8","shape":[16,32]}', "[" * 2000, "{", "}", "[", "]", ",", ":",
)  # fmt: skip

# A case: the files of a checkpoint, the one to mutate, and the size of its header.
Case = tuple[str, dict[str, bytes], str, int]


def seeds() -> list[Case]:
    """Small valid checkpoints of every kind."""
    config = b'{"model_type": "llama", "hidden_size": 64}'
    plain = {"a.weight": torch.randn(5, 40), "b.weight": torch.randn(3, 32).bfloat16(), "norm": torch.ones(3)}
    single = safetensors_bytes(plain)
    packed = {f"{n}.weight": pack(torch.randn(20, 40), n) for n in ("int4", "int8", "q4_1")}
    tiles = safetensors_bytes({name: matrix.data for name, matrix in packed.items()})
    packed_config = json.dumps({"model_type": "llama", **packed_fields(packed)}).encode()
    shards = {"one.safetensors": {"a": torch.ones(3)}, "two.safetensors": {"b": torch.ones(2, 2)}}
    index = json.dumps({"weight_map": {tensor: name for name, tensors in shards.items() for tensor in tensors}}).encode()
    files = {"config.json": config, "model.safetensors.index.json": index} | {
        n: safetensors_bytes(t) for n, t in shards.items()
    }
    cases: list[Case] = [
        ("safetensors", {"config.json": config, "model.safetensors": single}, "model.safetensors", header_size(single)),
        ("packed tiles", {"config.json": packed_config, "model.safetensors": tiles}, "model.safetensors", header_size(tiles)),
        ("packed config", {"config.json": packed_config, "model.safetensors": tiles}, "config.json", len(packed_config)),
        ("index", files, "model.safetensors.index.json", len(index)),
    ]
    for architecture, kind in (("llama", "Q4_0"), ("qwen2", "Q8_0"), ("qwen3", "Q5_0"), ("deepseek2", "Q8_0")):
        if architecture == "deepseek2":
            values, tensors = deepseek2_values(), deepseek2_tensors(kind)
        else:
            values, tensors = model_values(architecture), model_tensors(architecture, kind=kind)
        whole = gguf_bytes(values, tensors)
        cases.append(
            (f"gguf {architecture}", {"x.gguf": whole}, "x.gguf", len(gguf_bytes(values, [(*t[:3], b"") for t in tensors])))
        )
    return cases


def header_size(data: bytes) -> int:
    return 8 + int.from_bytes(data[:8], "little")


def mutate(data: bytes, header: int, rng: random.Random) -> bytes:
    """One to four mutations, nearly all of them in the header."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 2, 3, 4))):
        if not out:
            break
        end = max(1, min(header, len(out)))
        at = rng.randrange(end)
        kind = rng.randrange(10)
        if kind == 0:
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            out[at] = rng.randrange(256)
        elif kind in (2, 3):
            overwrite_number(out, end, rng)
        elif kind in (4, 5):
            replace_token(out, end, rng)
        elif kind == 6:
            del out[at : at + rng.choice((1, 2, 4, 8, 30))]
        elif kind == 7:
            out[at:at] = out[at : at + rng.choice((1, 4, 8, 40))] * rng.choice((1, 2, 9))
        elif kind == 8:
            del out[rng.choice((at, rng.randrange(len(out)), rng.randrange(min(len(out), 40)))) :]
        else:
            out[at:at] = rng.randbytes(rng.choice((1, 4, 8)))
    return bytes(out)


def overwrite_number(out: bytearray, end: int, rng: random.Random) -> None:
    """A wrong value where a number may be: GGUF's have 4 or 8 bytes, often before a name."""
    size, number = rng.choice((4, 8, 8)), rng.choice(NUMBERS)
    at = rng.choice((0, 4, 8, 16)) if rng.random() < 0.1 else rng.randrange(end)
    if rng.random() < 0.5:  # search for bytes that look like a small little-endian number
        for candidate in range(at, min(at + 64, end - size)):
            if out[candidate] and not any(out[candidate + 2 : candidate + size]):
                at = candidate
                break
    if rng.random() < 0.3 and at + size <= len(out):
        number = int.from_bytes(out[at : at + size], "little") + rng.choice((-32, -1, 1, 32))
    out[at : at + size] = struct.pack("<Q", number % 2**64)[:size]


def replace_token(out: bytearray, end: int, rng: random.Random) -> None:
    """Replaces a JSON token by another; in binary headers, digits in names."""
    at = rng.randrange(end)
    while at < end and not (48 <= out[at] <= 57 or out[at] in b'"'):
        at += 1
    stop = at + 1
    while stop < end and (48 <= out[stop] <= 57 if 48 <= out[min(at, len(out) - 1)] <= 57 else out[stop] not in b'"'):
        stop += 1
    if at < end:
        out[at : stop + (out[at] == 34)] = rng.choice(TOKENS).encode()


class Runner:
    """Writes each input to the same files and opens them."""

    def __init__(self, root: Path, seed: int) -> None:
        self.seed, self.cases = seed, seeds()
        self.places = [root / str(i) for i in range(len(self.cases))]
        self.handles: list[int] = []
        for (_, files, name, _), place in zip(self.cases, self.places, strict=True):
            place.mkdir()
            for file, data in files.items():
                (place / file).write_bytes(data)
            self.handles.append(os.open(place / name, os.O_RDWR))
        self.outcomes: Counter[str] = Counter()

    def run(self, k: int, measure: bool = False) -> None:
        """Runs input `k`; raises if it violates a requirement."""
        rng = random.Random(self.seed << 40 | k)
        i = rng.randrange(len(self.cases))
        kind, files, name, header = self.cases[i]
        data = mutate(files[name], header, rng)
        os.ftruncate(self.handles[i], len(data))
        os.pwrite(self.handles[i], data, 0)
        path = self.places[i] / name if name.endswith(".gguf") else self.places[i]
        if measure:
            tracemalloc.start()
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        try:
            exercise(path)
            self.outcomes[f"{kind}: opened"] += 1
        except (CheckpointError, ConfigError):
            self.outcomes[f"{kind}: refused"] += 1
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            if measure:
                peak = tracemalloc.get_traced_memory()[1]
                tracemalloc.stop()
        if measure and peak > PYTHON_MEMORY + sum(len(f) for f in files.values()) + len(data):
            raise AssertionError(f"{peak} bytes of Python memory for a file of {len(data)}")


def exercise(path: Path) -> None:
    """Opens a checkpoint, and reads and packs all its tensors."""
    with open_checkpoint(path) as checkpoint:
        checkpoint.config()
        for name in checkpoint.tensors:
            try:
                checkpoint.read(name)
                if len(checkpoint.shape(name)) == 2:
                    checkpoint.packed(name, checkpoint.natural_format(name))
            except CheckpointError:
                pass
        for name, shape in STACKS.items():  # only the deepseek2 case has these tensors
            if all(
                checkpoint.tensors.get(part) and checkpoint.shape(part) == s
                for part, s in checkpoint.stored(name, shape).items()
            ):
                with contextlib.suppress(CheckpointError):
                    checkpoint.packed_stack(name, checkpoint.own_format(name, shape), shape)


def too_slow(*_: Any) -> None:
    raise TimeoutError(f"more than {SECONDS} seconds")


def work(first: int, last: int, seed: int) -> tuple[Counter[str], str | None]:
    """Runs inputs [first, last) in this process; returns counts of the outcomes, and the first failure."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGALRM, too_slow)
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.TemporaryDirectory(dir=memory) as root:
        runner = Runner(Path(root), seed)
        for place, (_, _, name, _) in zip(runner.places, runner.cases, strict=True):  # imports, before the limit is set
            exercise(place / name if name.endswith(".gguf") else place)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ADDRESS_SPACE, limit[1]))
        try:
            for k in range(first, last):
                try:
                    runner.run(k, measure=k % 64 == 0)
                except Exception:
                    return runner.outcomes, f"input {k} of seed {seed}:\n{traceback.format_exc()}"
        finally:
            resource.setrlimit(resource.RLIMIT_AS, limit)
    return runner.outcomes, None


def main() -> int:
    parser = argparse.ArgumentParser(description="Fuzzes the headers of checkpoint files.")
    parser.add_argument("--inputs", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--only", type=int, help="run this one input")
    arguments = parser.parse_args()
    start = time.monotonic()
    if arguments.only is not None:
        results = [work(arguments.only, arguments.only + 1, arguments.seed)]
    else:
        step = max(1, min(20_000, -(-arguments.inputs // arguments.jobs)))
        spans = [(i, min(i + step, arguments.inputs), arguments.seed) for i in range(0, arguments.inputs, step)]
        with multiprocessing.get_context("spawn").Pool(arguments.jobs) as pool:
            results = pool.starmap(work, spans, chunksize=1)
    seconds = time.monotonic() - start
    outcomes = sum((result for result, _ in results), Counter())
    for name, count in sorted(outcomes.items()):
        print(f"{name:28} {count:10,}")
    failures = [failure for _, failure in results if failure]
    for failure in failures[:3]:
        print(failure, file=sys.stderr)
    total = sum(outcomes.values())
    print(
        json.dumps(
            {"inputs": total, "failures": len(failures), "seconds": round(seconds, 1), "per_second": round(total / seconds)}
        )
    )
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
