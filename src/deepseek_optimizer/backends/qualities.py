"""The qualities at which requests may be computed; `nested_weights.py` has what they mean. No torch is imported here."""

from __future__ import annotations

from typing import Final, Literal

Quality = Literal["fast", "balanced", "exact"]
QUALITIES: Final[tuple[Quality, ...]] = ("fast", "balanced", "exact")  # the lowest first
EXACT: Final = "exact"
