"""Counter-based random bits: those of an element depend only on (seed, step, tensor, element), so they are the same for any
number of threads, in any order, and after a run is resumed.

SplitMix64 (Steele et al., 2014) computes keys from seed, step and tensor; the hash function "lowbias32" (Wellons, "Prospecting
for hash functions", 2018) computes 32 bits from a key and an element's index. `native/kernels/generic/train_numbers.hpp`
implements the same, bit for bit.
"""

from __future__ import annotations

import torch

_WORD = 0xFFFFFFFF
_LONG = 0xFFFFFFFFFFFFFFFF


def _mix(x: int) -> int:
    """The output of SplitMix64 at state x."""
    x = (x + 0x9E3779B97F4A7C15) & _LONG
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _LONG
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _LONG
    return x ^ (x >> 31)


def keys(seed: int, step: int, tensor: int) -> tuple[int, int, int, int]:
    """Four 32-bit keys for a step of a tensor: the first two for its moments, the others for its weights."""
    first = _mix(_mix(_mix(seed & _LONG) ^ (step & _LONG)) ^ (tensor & _LONG))
    second = _mix(first)
    return first & _WORD, first >> 32, second & _WORD, second >> 32


def random_bits(count: int, key: int, second: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """int64 [count]: 32 random bits for each element of a tensor; they repeat after 2^32 elements."""
    x = (torch.arange(count, device=device, dtype=torch.int64) + key) & _WORD
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _WORD
    x = (x + second) & _WORD
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _WORD  # int64 overflow affects only bits above the 32 that are used
    return x ^ (x >> 16)


def stochastic_round(x: torch.Tensor, random: torch.Tensor) -> torch.Tensor:
    """Rounds fp32 to bf16 stochastically: up with a probability equal to the truncated fraction, so that the expected value is
    x. NaN and infinities are preserved.

    Args:
        x: fp32.
        random: int64 of the same shape, random numbers below 2^16.
    """
    upper = ((x.view(torch.int32).to(torch.int64) + random) & 0xFFFF0000).to(torch.int32).view(torch.float32)
    return torch.where(x.isnan(), x, upper).to(torch.bfloat16)
