"""How the two moments of Adam are kept: fp32, bf16, or 8 bits by blocks of 256.

bf16 is rounded by chance: at beta2 = 0.999 a step changes v by less than half of what bf16 can tell apart, and rounding to
nearest would leave it where it is. 8 bits after FlashOptim (arXiv 2602.23349): m / max |m| of its block by softsign, sqrt(v) /
max sqrt(v) linearly, both to nearest; a v above zero never becomes zero, as what is divided by it would explode (the zero point
problem of Li and others, "Memory Efficient Optimizers with 4-bit States", 2023). Blocks as in Dettmers and others, "8-bit
Optimizers via Block-wise Quantization", 2022.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

import torch

from .random_bits import random_bits, round_by_chance

MomentFormat = Literal["bf16", "int8", "fp32"]
BLOCK: Final = 256
_LARGEST: Final = torch.finfo(torch.float32).max


@dataclass
class Moments:
    """The moments of one tensor, dense and in its order of elements.

    Args:
        m, v: fp32, bf16, or int8 and uint8.
        m_scale, v_scale: with 8 bits fp32 [ceil(elements / 256)]: the largest |m| and the largest sqrt(v) of each block.
    """

    m: torch.Tensor
    v: torch.Tensor
    m_scale: torch.Tensor | None = None
    v_scale: torch.Tensor | None = None

    @classmethod
    def zeros(cls, shape: torch.Size, kind: MomentFormat, device: torch.device | str = "cpu") -> Moments:
        """Moments before the first step."""

        def zeros(dtype: torch.dtype) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        if kind != "int8":
            dtype = torch.bfloat16 if kind == "bf16" else torch.float32
            return cls(zeros(dtype), zeros(dtype))
        scales = (torch.zeros(-(-shape.numel() // BLOCK), device=device, dtype=torch.float32) for _ in range(2))
        return cls(zeros(torch.int8), zeros(torch.uint8), *scales)

    @property
    def kind(self) -> MomentFormat:
        return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.int8: "int8"}[self.m.dtype]  # type: ignore[return-value]

    def read(self) -> tuple[torch.Tensor, torch.Tensor]:
        """m and v in fp32, flat."""
        if self.m_scale is None or self.v_scale is None:
            return self.m.reshape(-1).float(), self.v.reshape(-1).float()
        y, r = _blocks(self.m.reshape(-1).float()) / 127.0, _blocks(self.v.reshape(-1).float()) / 255.0 * self.v_scale[:, None]
        m = y / (2.0 - y.abs()) * self.m_scale[:, None]
        count = self.m.numel()
        return m.reshape(-1)[:count], (r * r).reshape(-1)[:count]

    def write(self, m: torch.Tensor, v: torch.Tensor, key: tuple[int, int, int, int]) -> None:
        """Keeps m and v (fp32, flat), rounded as the format rounds; key: see `random_bits.keys`."""
        if self.m_scale is not None and self.v_scale is not None:
            self._write_blocks(_blocks(m), _blocks(root(v)))
        elif self.m.dtype == torch.bfloat16:
            chance = random_bits(m.numel(), key[0], key[1], m.device)
            self.m.copy_(round_by_chance(m, chance & 0xFFFF).view_as(self.m))
            self.v.copy_(round_by_chance(v, chance >> 16).view_as(self.v))
        else:
            self.m.copy_(m.view_as(self.m))
            self.v.copy_(v.view_as(self.v))

    def _write_blocks(self, m: torch.Tensor, roots: torch.Tensor) -> None:
        assert self.m_scale is not None and self.v_scale is not None
        torch.amax(m.abs(), 1, out=self.m_scale)
        torch.amax(roots, 1, out=self.v_scale)
        y = m * _inverse(self.m_scale)[:, None]
        soft = (y + y) / (1.0 + y.abs())
        code = (roots * _inverse(self.v_scale)[:, None] * 255.0).round()
        code = torch.where(roots > 0, code.clamp(min=1.0), code)
        count = self.m.numel()
        self.m.copy_((soft * 127.0).round().reshape(-1)[:count].view_as(self.m))
        self.v.copy_(code.reshape(-1)[:count].view_as(self.v))


def root(x: torch.Tensor) -> torch.Tensor:
    """Square roots of fp32 numbers, rounded correctly: torch's own are not in the last bit, by the vector library it uses."""
    return x.double().sqrt().float()


def _blocks(flat: torch.Tensor) -> torch.Tensor:
    """[blocks, 256], the last one filled with zeros."""
    return torch.nn.functional.pad(flat, (0, -flat.numel() % BLOCK)).view(-1, BLOCK)


def _inverse(scale: torch.Tensor) -> torch.Tensor:
    """1 / scale; 0 where that overflows: such a block counts as zeros."""
    inverse = 1.0 / scale
    return torch.where(inverse <= _LARGEST, inverse, torch.zeros_like(inverse))
