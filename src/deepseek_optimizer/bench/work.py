"""What a run does: lengths and batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product


@dataclass(frozen=True)
class Work:
    """Attributes:
    prompt: tokens of each request's prompt that are computed.
    new: tokens generated for each request, no more and no fewer.
    depth: tokens that the cache holds before the prompt.
    batch: requests at once.
    """

    prompt: int = 512
    new: int = 64
    depth: int = 0
    batch: int = 1

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            low = 0 if name == "depth" else 1
            if value < low:
                raise ValueError(f"{name} must be at least {low}, got {value}")

    @property
    def length(self) -> int:
        """Tokens of a request from the first cached to the last generated."""
        return self.depth + self.prompt + self.new

    def __str__(self) -> str:
        depth = f" after {self.depth}" if self.depth else ""
        return f"{self.prompt} in{depth}, {self.new} out, batch {self.batch}"


def grid(prompt: Sequence[int], new: Sequence[int], depth: Sequence[int], batch: Sequence[int]) -> list[Work]:
    """Every combination."""
    return [Work(p, n, d, b) for p, n, d, b in product(prompt, new, depth, batch)]


def numbers(text: str) -> list[int]:
    """ "1,4,32" as a list.

    Raises: ValueError.
    """
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"expected whole numbers with commas between, got {text!r}") from None
