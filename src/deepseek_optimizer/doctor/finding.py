"""The result of an examination: one finding per relevant fact."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Severity = Literal["ok", "note", "warning", "error"]


@dataclass(frozen=True)
class Finding:
    """One fact that was checked.

    Attributes:
        check: name of the check or symptom.
        severity: "error": something will not work; "warning": it works badly; "note": for information; "ok": no problem.
        what: the fact, in one sentence.
        cause: why; "" if there is nothing to explain.
        fix: what to do about it; "" if nothing needs to be done.
        facts: the measured values as JSON types; in bytes and seconds unless a key says otherwise.
    """

    check: str
    severity: Severity
    what: str
    cause: str = ""
    fix: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON types."""
        return {
            "check": self.check, "severity": self.severity, "what": self.what, "cause": self.cause, "fix": self.fix,
            "facts": dict(self.facts),
        }  # fmt: skip
