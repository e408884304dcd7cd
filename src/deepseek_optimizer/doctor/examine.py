"""Running the checks, and one symptom's measurements."""

from __future__ import annotations

from .case import Case
from .checks import OF_THE_MACHINE, OF_THE_MODEL
from .finding import Finding
from .symptoms import get_symptom


def examine(case: Case) -> list[Finding]:
    """What every standing check finds: the machine's, and the model's where one is named."""
    found = [finding for check in OF_THE_MACHINE.values() for finding in check(case)]
    return found if case.model is None else found + examine_model(case)


def examine_model(case: Case) -> list[Finding]:
    """What the model's checks find; a checkpoint that can't be loaded is all there is to say."""
    found: list[Finding] = []
    for check in OF_THE_MODEL.values():
        found += check(case)
        if any(finding.check == "checkpoint" and finding.severity == "error" for finding in found):
            break
    return found


def examine_symptom(case: Case, name: str) -> list[Finding]:
    """What explains a symptom: the checks it depends on, then its own measurements.

    Raises:
        ConfigError: no such symptom, one that comes with a later part, or one that needs a model where none is named.
    """
    symptom = get_symptom(name)
    found = [finding for check in symptom.checks if check in OF_THE_MACHINE for finding in OF_THE_MACHINE[check](case)]
    if symptom.needs_model:
        _ = case.model or case.checkpoint  # raises: it needs one
        found += [f for f in examine_model(case) if f.severity == "error" or f.check in symptom.checks]
    if symptom.loads and any(finding.severity == "error" for finding in found):
        return found  # what would not even start has its cause here
    return found + list(symptom.measure(case))
