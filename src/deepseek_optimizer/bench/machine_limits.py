"""Measures the machine's limits: memory bandwidth and matrix throughput.

Bandwidth: the native library's loop (`dso_read_bandwidth`): the widest loads of this CPU with an accumulator each, each thread
on its own share in huge pages, the fastest of several rounds. Without the native library: numpy's maximum, which reads up to
40% less. The size matters, since small sizes are read from a cache.
Matrix products: torch.mm of 2048 x 2048 in fp32 and bf16, and torch._int_mm of int8, if this torch has them; the best of
several. These are speeds of a library, not the hardware's peak, so a better kernel can exceed 100%.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

_MEGABYTE = 1 << 20


def read_gb_s(size: int, threads: int, seconds: float = 1.0) -> float:
    """GB/s (1e9 bytes) of reading `size` bytes (1 MiB to 1 GiB) repeatedly, with all threads together."""
    from ..backends.cpu.native import shared_context, unavailable_reason

    size = max(min(size, 1 << 30), _MEGABYTE)
    if unavailable_reason() is None:
        return shared_context(None, threads).read_bandwidth(size, seconds) / 1e9
    return _numpy_read_gb_s(size, threads, seconds)


def read_regions_gb_s(regions: Sequence[tuple[int, int]], threads: int, seconds: float = 1.0) -> float | None:
    """GB/s of reading existing memory, (address, bytes) of each region, repeatedly with all threads together. None without the
    native library, or for less than 1 MiB. Memory is not equally fast everywhere on machines with several memory nodes, and on
    virtual machines whose nodes are hidden."""
    from ..backends.cpu.native import shared_context, unavailable_reason

    if unavailable_reason() is not None or sum(size for _, size in regions) < _MEGABYTE:
        return None
    return shared_context(None, threads).read_bandwidth_of(regions, seconds) / 1e9


def _numpy_read_gb_s(size: int, threads: int, seconds: float) -> float:
    """Uses one Python thread per CPU: numpy releases the GIL."""
    import numpy as np

    count = size // 4
    shares = np.array_split(np.ones(count, np.int32), threads)
    passes = max(1, (256 << 20) // (count * 4))

    def read(share: Any) -> None:
        for _ in range(passes):
            share.max()

    with ThreadPoolExecutor(threads) as pool:
        once = best_seconds(lambda: list(pool.map(read, shares)), seconds)
    return count * 4 * passes / once / 1e9


def matrix_tera(threads: int, size: int = 2048, seconds: float = 0.3) -> dict[str, float]:
    """Data type of a matrix product -> 1e12 multiplications and additions per second."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    tera = {}
    try:
        for name, a in (
            ("fp32", torch.ones(size, size, dtype=torch.float32, device="cpu")),
            ("bf16", torch.ones(size, size, dtype=torch.bfloat16, device="cpu")),
            ("int8", torch.ones(size, size, dtype=torch.int8, device="cpu")),
        ):
            product = torch._int_mm if name == "int8" else torch.mm
            try:
                tera[name] = 2 * size**3 / best_seconds(partial(product, a, a), seconds) / 1e12
            except RuntimeError:
                continue  # this torch does not support it on the CPU
    finally:
        torch.set_num_threads(before)
    return tera


def best_seconds(work: Callable[[], Any], seconds: float) -> float:
    """The shortest time of as many calls as fit into `seconds`, at least four; the first call is not counted."""
    work()
    best, calls, end = float("inf"), 0, time.perf_counter() + seconds
    while calls < 4 or time.perf_counter() < end:
        started = time.perf_counter()
        work()
        best, calls = min(best, time.perf_counter() - started), calls + 1
    return best
