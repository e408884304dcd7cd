"""Random bits by counting: those of an element depend on (seed, step, tensor, element) and on nothing else, so that they are
the same on any number of threads, in any order, and after a resume.

SplitMix64 (Steele and others, 2014) makes keys of seed, step and tensor; of a key and an element's number "lowbias32" (Wellons,
"Prospecting for hash functions", 2018) makes 32 bits. `native/kernels/generic/train_numbers.hpp` has the same, bit for bit.
"""

from __future__ import annotations

import torch

_WORD = 0xFFFFFFFF
_LONG = 0xFFFFFFFFFFFFFFFF


def _mix(x: int) -> int:
    """The next number of SplitMix64 behind state x."""
    x = (x + 0x9E3779B97F4A7C15) & _LONG
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _LONG
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _LONG
    return x ^ (x >> 31)


def keys(seed: int, step: int, tensor: int) -> tuple[int, int, int, int]:
    """Four keys of 32 bits for a tensor's step: the first two for its moments, the others for its weights."""
    first = _mix(_mix(_mix(seed & _LONG) ^ (step & _LONG)) ^ (tensor & _LONG))
    second = _mix(first)
    return first & _WORD, first >> 32, second & _WORD, second >> 32


def random_bits(count: int, key: int, second: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """int64 [count]: 32 random bits of each of a tensor's elements (of which the 2^32 th has those of the first again)."""
    x = (torch.arange(count, device=device, dtype=torch.int64) + key) & _WORD
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _WORD
    x = (x + second) & _WORD
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _WORD  # what overflows an int64 is above the 32 bits that are kept
    return x ^ (x >> 16)


def round_by_chance(x: torch.Tensor, sixteen: torch.Tensor) -> torch.Tensor:
    """fp32 to bf16, up with the probability of what is cut off: the expected value is x itself. NaN and infinities stay.

    Args:
        x: fp32.
        sixteen: int64 of the same shape, random numbers below 2^16.
    """
    upper = ((x.view(torch.int32).to(torch.int64) + sixteen) & 0xFFFF0000).to(torch.int32).view(torch.float32)
    return torch.where(x.isnan(), x, upper).to(torch.bfloat16)
