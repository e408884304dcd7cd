"""A side that measures a Transformers model, optimized or not:

    python -m deepseek_optimizer.bench.sides.model transformers MODEL --prompt 512 --new 64
    python -m deepseek_optimizer.bench.sides.model optimized MODEL --precision int4 ...

Both go through `model.generate`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...errors import BackendError
from ..work import Work
from .load import SIDES, load_side


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("side", choices=SIDES)
    parser.add_argument("model", type=Path)
    parser.add_argument("--dtype", default="bfloat16", help="of the weights in Transformers")
    parser.add_argument("--config", type=json.loads, default={}, help="fields of DeepSeekConfig, as JSON")
    parser.add_argument("--threads", type=int, required=True)
    for name, value in asdict(Work()).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--repeats", type=int, default=3, help="0: stop after the first token")
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--beside", action="store_true", help="measure how fast the weights can be read, between the tokens")
    parser.add_argument("--cold", action="store_true", help="drop the model's files from the page cache first")
    print(json.dumps(measure(parser.parse_args())))


def measure(a: argparse.Namespace) -> dict[str, Any]:
    from ..machine_limits import read_regions_gb_s
    from ..memory_traffic import matrix_memory
    from ..runs import repeated

    if a.cold:
        drop_from_page_cache(a.model)
    side = load_side(a.side, a.model, threads=a.threads, dtype=a.dtype, config=a.config)
    list(repeated(side.model, Work(prompt=16, new=1), repeats=1, warmup=0))
    to_first_token_s = time.perf_counter() - side.started
    result: dict[str, Any] = {"load_s": side.load_s, "to_first_token_s": to_first_token_s, "runs": []}
    if a.repeats:
        work = Work(a.prompt, a.new, a.depth, a.batch)
        rates: list[float] = []
        regions = sample_of(matrix_memory(side.model)) if a.beside else []

        def beside() -> None:
            if (rate := read_regions_gb_s(regions, a.threads, seconds=0.0)) is not None:
                rates.append(rate)

        runs = repeated(side.model, work, repeats=a.repeats, warmup=a.warmup, beside=beside if regions else None)
        result["runs"] = [asdict(run) for run in runs]
        if rates:
            result["own_read_gb_s"] = statistics.median(rates)
    return {**result, "memory_bytes": side.memory.bytes()}


def sample_of(regions: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The beginnings of all regions, together at most 512 MB: much more than caches hold, and read in little time."""
    share = min(1.0, (512 << 20) / max(1, sum(size for _, size in regions)))
    return [(address, int(size * share)) for address, size in regions]


def drop_from_page_cache(model: Path) -> None:
    """Drops the model's files from the page cache, so that loading reads from disk.

    Raises:
        BackendError: the system has no call for it.
    """
    if not hasattr(os, "posix_fadvise"):  # macOS, Windows
        raise BackendError("this system cannot drop a file from its page cache; measure without --cold")
    for path in model.iterdir() if model.is_dir() else [model]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


if __name__ == "__main__":
    main()
