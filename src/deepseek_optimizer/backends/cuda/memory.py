"""Errors where a device has too little memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ...errors import NotEnoughMemoryError


@contextmanager
def memory_errors(what: str, remedy: str) -> Iterator[None]:
    """Turns torch's error into a NotEnoughMemoryError.

    Args:
        what: what needs memory.
        remedy: what to do, as a sentence without a period.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        reason = str(error).split(". ")[1:2] or [str(error)]  # "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ..."
        raise NotEnoughMemoryError(f"there is no memory for {what}: {reason[0]}", None, None, remedy) from error
