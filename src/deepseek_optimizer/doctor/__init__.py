"""`dso doctor`: what in a machine, an installation or a model makes it fail, or run slower or worse than it could.

    with Case(model="path") as case:
        for finding in examine(case): ...

A check is a file in `checks/`, a symptom one in `symptoms/`. Nothing here changes anything.
"""

from __future__ import annotations

from .case import Case
from .examine import examine, examine_symptom
from .finding import Finding, Severity
from .machine import Machine
from .symptoms import SYMPTOMS

__all__ = ["SYMPTOMS", "Case", "Finding", "Machine", "Severity", "examine", "examine_symptom"]
