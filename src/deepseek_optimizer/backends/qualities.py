"""The qualities at which requests may be computed; `nested_weights.py` has what they mean. No torch is imported here."""

from __future__ import annotations

from typing import Final, Literal

Quality = Literal["fast", "balanced", "exact"]
QUALITIES: Final[tuple[Quality, ...]] = ("fast", "balanced", "exact")  # the lowest first
EXACT: Final = "exact"


def prompt_quality(quality: Quality) -> Quality:
    """The quality at which the prompt of a request is computed."""
    return EXACT if quality == "balanced" else quality
