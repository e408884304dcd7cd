"""Multimodal RoPE: the tokens of a picture have a position in time, height and width each, and every frequency takes one of the
three; for text all three are equal. Source: Wang et al. 2024 (Qwen2-VL)."""

from __future__ import annotations

from dataclasses import replace

from ..errors import ConfigError, UnsupportedModelError, shown
from .fields import Fields
from .rope import RopeSpec


def with_axes(fields: Fields, rope: RopeSpec, default: tuple[int, int, int], interleaved: bool) -> RopeSpec:
    """The RoPE with an axis for each frequency, from `mrope_section`.

    Args:
        fields: the config.
        rope: the frequencies.
        default: the section without that field.
        interleaved: the axes alternate (time, height, width, time, ...), as far as the sections of height and width reach, and
            all later frequencies belong to time (Qwen3-VL); otherwise each axis has consecutive frequencies (Qwen2-VL).

    Raises:
        UnsupportedModelError, ConfigError: the field has a value that is not supported, or not valid.
    """
    if rope.is_dynamic:
        raise UnsupportedModelError(f"config.rope_parameters['rope_type'] {rope.kind!r} is not supported with axes")
    parameters = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    section = parameters.get("mrope_section") or default
    count = len(rope.inv_freq)
    plain = isinstance(section, (list, tuple)) and len(section) == 3
    if not plain or any(isinstance(n, bool) or not isinstance(n, int) or n < 0 for n in section):
        raise ConfigError(f"config.rope_parameters['mrope_section']: expected three numbers, got {shown(section)}")
    if not interleaved:
        if sum(section) != count:
            raise ConfigError(f"config.rope_parameters['mrope_section']: {shown(section)} does not sum to {count} frequencies")
        return replace(rope, axes=tuple(axis for axis, n in enumerate(section) for _ in range(n)))
    axes = [0] * count
    for axis in (1, 2):
        for i in range(axis, min(3 * section[axis], count), 3):
            axes[i] = axis
    return replace(rope, axes=tuple(axes))
