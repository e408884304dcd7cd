"""The allocator for outputs of the training ops. The tensors of a step reuse the memory of those of the previous step.

The C library's allocator places large aligned blocks between small ones, so that a freed block is seldom reused by the next
tensor of its size, and the process grows far beyond what it uses. Memory returned to the system is cleared, page by page, when
it is allocated again.
"""

from __future__ import annotations

import functools

from ...system.tensor_memory import TensorMemory


@functools.cache
def memory() -> TensorMemory:
    """The allocator of this process."""
    return TensorMemory(
        "a tensor of training", "use shorter sequences or a smaller batch", segment=256 << 20, returns=False
    )  # fmt: skip
