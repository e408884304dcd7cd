"""`dso doctor`: finds what makes a model fail, run slowly or answer badly, in the machine, the installation or the model.

    with Case(model="path") as case:
        for finding in examine(case): ...

Each check is a file in `checks/`, each symptom one in `symptoms/`. All of them only read.
"""

from __future__ import annotations

from .case import Case
from .examine import examine, examine_symptom
from .finding import Finding, Severity
from .machine import Machine
from .symptoms import SYMPTOMS

__all__ = ["SYMPTOMS", "Case", "Finding", "Machine", "Severity", "examine", "examine_symptom"]
