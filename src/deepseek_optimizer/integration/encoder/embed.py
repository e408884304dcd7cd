"""The embeddings of a batch's rows, by the model's own module, in parts and on several threads.

torch's threads are off while a plan runs (`system/threads.py`), and one core would take a noticeable part of the time that the
plan takes on all. Rows do not depend on each other, so their bits do not depend on the division.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from .rows import Rows

_PART = 256  # rows: torch's temporary results stay in a core's cache, which takes a seventh of the time of all rows at once
_THREAD = 4  # parts, below which a thread costs more than it saves


def embed(embeddings: Any, rows: Rows, width: int, threads: int) -> torch.Tensor:
    """float32 [tokens, width].

    Args:
        embeddings: the model's embeddings module.
        rows: the tokens.
        width: the hidden size.
        threads: maximum number of threads.
    """
    tokens = len(rows.positions)
    given = [value for value in rows.arguments.values() if value is not None]
    with torch.inference_mode(False):  # which threads do not inherit: only a plain tensor can be written by all
        states = torch.empty(tokens, width, dtype=torch.float32, device=given[0].device)

    def compute(part: slice) -> None:
        with torch.no_grad():
            arguments = {name: None if value is None else value[:, part] for name, value in rows.arguments.items()}
            states[part] = embeddings(**arguments)[0]

    parts = [slice(begin, begin + _PART) for begin in range(0, tokens, _PART)]
    threads = min(threads, len(parts) // _THREAD)
    if threads < 2:
        for part in parts:
            compute(part)
        return states
    # A new thread adopts the process's number of torch threads, which is 1 here.
    with ThreadPoolExecutor(threads, "dso-embeddings", torch.get_num_threads) as pool:
        list(pool.map(compute, parts))
    return states
