"""What a symptom is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ..case import Case
from ..finding import Finding


@dataclass(frozen=True)
class Symptom:
    """Attributes:
    measure: what is measured or inspected for this symptom alone.
    checks: names of the standing checks whose findings may explain it.
    needs_model: whether it shows in a model only.
    loads: whether measuring loads the model; then a model that can't be loaded is the finding, and nothing is measured.
    """

    measure: Callable[[Case], Iterator[Finding]]
    checks: tuple[str, ...] = ()
    needs_model: bool = True
    loads: bool = True
