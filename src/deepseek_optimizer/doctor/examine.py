"""Runs the checks, or the measurements of one symptom."""

from __future__ import annotations

from .case import Case
from .checks import OF_THE_MACHINE, OF_THE_MODEL
from .finding import Finding
from .symptoms import get_symptom


def examine(case: Case) -> list[Finding]:
    """Findings of all checks: of the machine, and of the model if the case has one."""
    findings = [finding for check in OF_THE_MACHINE.values() for finding in check(case)]
    return findings if case.model is None else findings + examine_model(case)


def examine_model(case: Case) -> list[Finding]:
    """Findings of the model's checks; it stops at a checkpoint that cannot be loaded, or has no plan to examine."""
    findings: list[Finding] = []
    for check in OF_THE_MODEL.values():
        findings += check(case)
        checkpoint = [finding for finding in findings if finding.check == "checkpoint"]
        if any(finding.severity == "error" or finding.facts.get("path") in ("general", "encoder") for finding in checkpoint):
            break
    return findings


def examine_symptom(case: Case, name: str) -> list[Finding]:
    """Findings that explain a symptom: those of the checks it depends on, then its own measurements.

    Raises:
        ConfigError: the symptom is unknown, or it needs a model and the case has none.
    """
    symptom = get_symptom(name)
    findings = [finding for check in symptom.checks if check in OF_THE_MACHINE for finding in OF_THE_MACHINE[check](case)]
    if symptom.needs_model:
        _ = case.model or case.checkpoint  # raises without a model
        findings += [f for f in examine_model(case) if f.severity == "error" or f.check in symptom.checks]
    if symptom.loads and any(finding.severity == "error" for finding in findings):
        return findings  # a model that cannot be loaded cannot be measured
    return findings + list(symptom.measure(case))
