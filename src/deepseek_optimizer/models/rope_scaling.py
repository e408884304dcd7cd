"""Frequencies of rotary position embedding, for each kind of scaling.

Bitwise equal to the results of Transformers' `modeling_rope_utils` (compared in `tests/models/test_rope.py`). Formulas:

- linear: inv_freq / factor (kaiokendev 2023).
- dynamic: a larger base for sequences longer than the trained length, "NTK-aware" (bloc97 and emozilla 2023).
- yarn: interpolation of low frequencies and extrapolation of high ones (Peng et al. 2023, section 3.2).
- llama3: like yarn, but by wavelength, with a smooth transition (Llama 3.1's reference code).
- proportional: of the frequencies of a whole head those of a share of its pairs, the others are 0 (Gemma 4).
- longrope: one factor per frequency, other ones for sequences longer than the trained length (Ding et al. 2024).
"""

from __future__ import annotations

import math
from typing import Any

import torch


def frequencies(
    parameters: dict[str, Any], head_dim: int, max_positions: int, length: torch.Tensor | None = None
) -> tuple[torch.Tensor, float]:
    """Computes the inverse frequencies.

    Args:
        parameters: `rope_parameters` of a config: `rope_type`, `rope_theta`, and the parameters of the kind.
        head_dim: elements of a head, of which the share `partial_rotary_factor` is rotated; kind "default" rotates all.
        max_positions: `max_position_embeddings` of the config.
        length: number of tokens of the sequence, a float32 scalar, used by "dynamic" and "longrope"; None: at most the trained
            length.

    Returns: inverse frequencies, float32 [rot/2] on the CPU, and the factor of cos and sin.

    Raises:
        ArithmeticError, LookupError, RuntimeError, TypeError, ValueError: the parameters are not valid.
    """
    kind, base = parameters["rope_type"], parameters["rope_theta"]
    with torch.device("cpu"):
        if kind == "default":
            return _inverse(base, head_dim), 1.0
        if kind == "proportional":
            return _proportional(parameters, base, head_dim), 1.0
        rot = int(head_dim * parameters.get("partial_rotary_factor", 1.0))
        if kind == "linear":
            return _inverse(base, rot) / parameters["factor"], 1.0
        if kind == "dynamic":
            return _inverse(_grown(base, rot, parameters["factor"], max_positions, length), rot), 1.0
        if kind == "yarn":
            return _yarn(parameters, base, rot, max_positions)
        if kind == "llama3":
            return _llama3(parameters, _inverse(base, rot)), 1.0
        if kind == "longrope":
            return _longrope(parameters, base, rot, max_positions, length)
    raise ValueError(f"rope_type {kind!r} is not supported")


def _inverse(base: Any, rot: int) -> torch.Tensor:
    """base ** (-2 i / rot) for i < rot / 2."""
    return 1.0 / (base ** (torch.arange(0, rot, 2, dtype=torch.int64, device="cpu").to(dtype=torch.float) / rot))


def _proportional(parameters: dict[str, Any], base: Any, head_dim: int) -> torch.Tensor:
    pairs = int(parameters.get("partial_rotary_factor", 1.0) * head_dim // 2)
    frequencies = torch.zeros(head_dim // 2, dtype=torch.float32, device="cpu")
    frequencies[:pairs] = _inverse(base, head_dim)[:pairs]
    return frequencies / parameters.get("factor", 1.0)


def _grown(base: Any, rot: int, factor: Any, max_positions: int, length: torch.Tensor | None) -> Any:
    reach: Any = max_positions
    if length is not None:
        reach = torch.maximum(length, torch.tensor(max_positions, dtype=length.dtype, device=length.device))
    return base * ((factor * reach / max_positions) - (factor - 1)) ** (rot / (rot - 2))


def _yarn(parameters: dict[str, Any], base: Any, rot: int, max_positions: int) -> tuple[torch.Tensor, float]:
    factor, original = parameters["factor"], parameters["original_max_position_embeddings"]
    if factor is None:
        factor = max_positions / original
    scaling = parameters.get("attention_factor")
    mscale, all_dim = parameters.get("mscale"), parameters.get("mscale_all_dim")
    if scaling is None:
        scaling = _mscale(factor, mscale) / _mscale(factor, all_dim) if mscale and all_dim else _mscale(factor, 1)

    def dimension(rotations: Any) -> float:
        """The dimension that makes this number of rotations within the trained length."""
        return float((rot * math.log(original / (rotations * 2 * math.pi))) / (2 * math.log(base)))

    low: Any = dimension(parameters.get("beta_fast") or 32)
    high: Any = dimension(parameters.get("beta_slow") or 1)
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rot - 1)
    if low == high:
        high += 0.001
    ramp = torch.clamp((torch.arange(rot // 2, dtype=torch.float32, device="cpu") - low) / (high - low), 0, 1)
    share = 1 - ramp.to(dtype=torch.float)  # of extrapolation
    positions = base ** (torch.arange(0, rot, 2, dtype=torch.int64, device="cpu").to(dtype=torch.float) / rot)
    extrapolated, interpolated = 1.0 / positions, 1.0 / (factor * positions)
    return interpolated * (1 - share) + extrapolated * share, float(scaling)


def _longrope(
    parameters: dict[str, Any], base: Any, rot: int, max_positions: int, length: torch.Tensor | None
) -> tuple[torch.Tensor, float]:
    original: Any = parameters["original_max_position_embeddings"]
    factor, scaling = parameters.get("factor"), parameters.get("attention_factor")
    if factor is None:
        factor = max_positions / original
    if scaling is None:
        scaling = 1.0 if factor <= 1.0 else math.sqrt(1 + math.log(factor) / math.log(original))
    factors = parameters["long_factor" if length is not None and length > original else "short_factor"]
    exponents = torch.arange(0, rot, 2, dtype=torch.int64, device="cpu").float() / rot
    return 1.0 / (torch.tensor(factors, dtype=torch.float32, device="cpu") * base**exponents), scaling


def _mscale(factor: Any, mscale: Any) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _llama3(parameters: dict[str, Any], inv_freq: torch.Tensor) -> torch.Tensor:
    factor, original = parameters["factor"], parameters["original_max_position_embeddings"]
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    long, short = original / low, original / high  # wavelengths
    wavelength = 2 * math.pi / inv_freq
    scaled = torch.where(wavelength > long, inv_freq / factor, inv_freq)
    smooth = (original / wavelength - low) / (high - low)
    smoothed = (1 - smooth) * scaled / factor + smooth * scaled
    between = ~(wavelength < short) * ~(wavelength > long)
    return torch.where(between, smoothed, scaled)
