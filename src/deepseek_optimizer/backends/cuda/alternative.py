"""What another package's part must say and do to take the place of a kernel of this backend. No Triton is imported here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ProductShape:
    """What decides whether a product has an alternative.

    Attributes:
        format: of the weights.
        coded: whether rows are rounded to FP8, too (`TileLayout.coded`).
        first: the row of the packed matrix that the product begins with, a multiple of 16.
        outputs, columns: size of the weights.
    """

    format: str
    coded: bool
    first: int
    outputs: int
    columns: int


def _nothing_else(device: Any) -> str | None:
    return None


@dataclass(frozen=True)
class Alternative:
    """A product of another package, in place of `kernels.linear_tile.launch_tile`.

    Attributes:
        name: in records, reports and logs.
        replaces: what it replaces, for messages.
        package, oldest: the distribution that has it, and the oldest version that does.
        majors: compute capabilities that it runs on, without the minor number.
        captured: whether a CUDA graph may record it: it neither waits for the device nor depends on values that the host reads,
            and allocates only through torch. Others are used only in steps with more rows than are captured.
        fits: whether it computes a product.
        scratch_bytes: the most bytes that it takes for a number of rows, outputs, columns, and 2 with gate and up, otherwise 1.
        launch: computes a product, with the arguments and the result of `launch_tile`. Imports what it needs when it is called.
        why_not: a further reason why it cannot run on a device, or None.
    """

    name: str
    replaces: str
    package: str
    oldest: str
    majors: tuple[int, ...]
    captured: bool
    fits: Callable[[ProductShape], bool]
    scratch_bytes: Callable[[int, int, int, int], int]
    launch: Callable[..., None]
    why_not: Callable[[Any], str | None] = _nothing_else


@dataclass(frozen=True)
class Choice:
    """An alternative that was measured to be faster on a card.

    Attributes:
        name: of the alternative.
        rows: the fewest rows of a step with which it is used.
        version: of its package when it was measured; any other version is measured anew.
    """

    name: str
    rows: int
    version: str


@dataclass(frozen=True)
class Chosen:
    """An alternative that is used for products of at least `rows` rows that it fits."""

    alternative: Alternative
    rows: int

    def takes(self, rows: int, *products: ProductShape) -> bool:
        """Whether it computes these products, of one number of rows."""
        return rows >= self.rows and all(self.alternative.fits(product) for product in products)
