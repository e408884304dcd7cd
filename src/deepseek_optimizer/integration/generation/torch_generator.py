"""The state of torch's default generator on the CPU, from which a backend draws the numbers that torch would draw.

The layout is that of `CPUGeneratorImplStateLegacy` in ATen/CPUGeneratorImpl.cpp, and variates are drawn as in
ATen/core/DistributionsHelper.h: an exponential variate takes a 64-bit number, of which the lower 53 bits are u 2^53; it is
-log(1 - u). Builds of torch that draw otherwise are recognized by their numbers (`draws_as_expected`).

The generator is the process's: threads that generate take turns (`GENERATOR_LOCK`), so that none draws another's numbers.
"""

from __future__ import annotations

import functools
import threading
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Words = npt.NDArray[np.uint32]
GENERATOR_LOCK = threading.Lock()  # of torch's default generator, which is global itself

_LAYOUT = np.dtype(
    [("seed", "<u8"), ("left", "<i4"), ("seeded", "<i4"), ("next", "<u8"), ("state", "<u8", 624), ("normals", "V40")]
)


def read_state(state: torch.Tensor) -> Words:
    """`DecodeCall.generator` of a generator's state, uint8 [5056]."""
    fields = _fields(state)
    return np.concatenate([[fields["left"], fields["next"]], fields["state"]]).astype(np.uint32)


def written_state(state: torch.Tensor, words: Words) -> torch.Tensor:
    """A copy of a generator's state that continues after `words`."""
    state = state.clone()
    fields = _fields(state)
    fields["left"], fields["next"], fields["state"] = words[0], words[1], words[2:]
    return state


@functools.lru_cache(maxsize=1)
def draws_as_expected() -> bool:
    """Whether this build of torch draws exponential variates as described above."""
    generator = torch.Generator(device="cpu")
    generator.manual_seed(7)
    before = generator.get_state()
    if before.dtype != torch.uint8 or before.numel() != _LAYOUT.itemsize:
        return False
    made = torch.empty(1, 400, dtype=torch.float32, device="cpu").exponential_(generator=generator).numpy()[0]
    words, after = read_state(before), read_state(generator.get_state())
    twister = np.random.MT19937()
    twister.state = {"bit_generator": "MT19937", "state": {"key": words[2:], "pos": 624 if words[0] == 1 else words[1]}}
    outputs = twister.random_raw(800).astype(np.uint64)
    numbers = (outputs[0::2] << np.uint64(32) | outputs[1::2]) & np.uint64((1 << 53) - 1)
    expected = -np.log1p(-numbers.astype(np.float64) * 2.0**-53)
    end: Any = twister.state["state"]
    return bool(np.allclose(made, expected, rtol=1e-5, atol=0) and after[1] == end["pos"] and (after[2:] == end["key"]).all())


def _fields(state: torch.Tensor) -> Any:
    return state.numpy().view(_LAYOUT)[0]
