"""Storage formats of Adam's two moments: fp32, bf16, or 8 bits in blocks of 256.

bf16 moments are rounded stochastically: with beta2 = 0.999, a step changes v by less than half a bf16 step, so rounding to
nearest would never change it. The 8-bit format follows FlashOptim (arXiv 2602.23349): m / max |m| of its block is stored on a
softsign scale, sqrt(v) / max sqrt(v) on a linear one, both rounded to nearest. A positive v is never rounded to zero, since the
update divides by its root (the zero-point problem of Li et al., "Memory Efficient Optimizers with 4-bit States", 2023). Blocks
as in Dettmers et al., "8-bit Optimizers via Block-wise Quantization", 2022.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

import torch

from .random_bits import random_bits, stochastic_round

MomentFormat = Literal["bf16", "int8", "fp32"]
BLOCK: Final = 256
_LARGEST: Final = torch.finfo(torch.float32).max


@dataclass
class Moments:
    """The moments of one tensor, contiguous, in its element order.

    Args:
        m, v: fp32, bf16, or int8 and uint8.
        m_scale, v_scale: for 8 bits, fp32 [ceil(elements / 256)]: the largest |m| and the largest sqrt(v) of each block.
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
        m, r = self.read_roots()
        return m, r * r

    def read_roots(self) -> tuple[torch.Tensor, torch.Tensor]:
        """With 8 bits, m and sqrt(v) in fp32, flat: what the codes stand for."""
        assert self.m_scale is not None and self.v_scale is not None
        y, r = _blocks(self.m.reshape(-1).float()) / 127.0, _blocks(self.v.reshape(-1).float()) / 255.0 * self.v_scale[:, None]
        m = y / (2.0 - y.abs()) * self.m_scale[:, None]
        count = self.m.numel()
        return m.reshape(-1)[:count], r.reshape(-1)[:count]

    def write(self, m: torch.Tensor, v: torch.Tensor, key: tuple[int, int, int, int]) -> None:
        """Stores m and v (fp32, flat), rounded to the format; `key`: see `random_bits.keys`."""
        if self.m_scale is not None:
            self.write_roots(m, root(v))
        elif self.m.dtype == torch.bfloat16:
            random = random_bits(m.numel(), key[0], key[1], m.device)
            self.m.copy_(stochastic_round(m, random & 0xFFFF).view_as(self.m))
            self.v.copy_(stochastic_round(v, random >> 16).view_as(self.v))
        else:
            self.m.copy_(m.view_as(self.m))
            self.v.copy_(v.view_as(self.v))

    def write_roots(self, m: torch.Tensor, roots: torch.Tensor) -> None:
        """With 8 bits, stores m and sqrt(v), fp32 and flat. What `read_roots` returned gives the same codes and scales."""
        assert self.m_scale is not None and self.v_scale is not None
        m, roots = _blocks(m), _blocks(roots)
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
    """Correctly rounded square roots of fp32 values. Torch's own can differ in the last bit, by its vector library."""
    return x.double().sqrt().float()


def _blocks(flat: torch.Tensor) -> torch.Tensor:
    """[blocks, 256], the last block padded with zeros."""
    return torch.nn.functional.pad(flat, (0, -flat.numel() % BLOCK)).view(-1, BLOCK)


def _inverse(scale: torch.Tensor) -> torch.Tensor:
    """1 / scale; 0 where that overflows, so that the block is stored as zeros."""
    inverse = 1.0 / scale
    return torch.where(inverse <= _LARGEST, inverse, torch.zeros_like(inverse))
