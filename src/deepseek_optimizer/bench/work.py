"""The parameters of a run: lengths and batch size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product


@dataclass(frozen=True)
class Work:
    """Attributes:
    prompt: computed prompt tokens per request.
    new: exact number of generated tokens per request.
    depth: tokens in the cache before the prompt.
    batch: number of concurrent requests.
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
        """Total tokens of a request, from the first cached to the last generated one."""
        return self.depth + self.prompt + self.new

    def __str__(self) -> str:
        depth = f" after {self.depth}" if self.depth else ""
        return f"{self.prompt} in{depth}, {self.new} out, batch {self.batch}"


def grid(prompt: Sequence[int], new: Sequence[int], depth: Sequence[int], batch: Sequence[int]) -> list[Work]:
    """All combinations."""
    return [Work(p, n, d, b) for p, n, d, b in product(prompt, new, depth, batch)]


def numbers(text: str) -> list[int]:
    """Parses comma-separated integers, such as "1,4,32".

    Raises:
        ValueError: the text has another form.
    """
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"expected integers separated by commas, got {text!r}") from None
