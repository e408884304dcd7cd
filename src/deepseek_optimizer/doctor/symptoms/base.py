"""The definition of a symptom."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ..case import Case
from ..finding import Finding


@dataclass(frozen=True)
class Symptom:
    """Attributes:
    measure: the measurement of this symptom, which yields findings.
    checks: names of the checks whose findings may explain it.
    needs_model: whether it occurs only with a model.
    loads: whether measuring loads the model. If so, a model that cannot be loaded is reported instead of measuring.
    """

    measure: Callable[[Case], Iterator[Finding]]
    checks: tuple[str, ...] = ()
    needs_model: bool = True
    loads: bool = True
