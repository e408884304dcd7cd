"""What an examination says: one finding a fact that matters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Severity = Literal["ok", "note", "warning", "error"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        check: name of the check that found it.
        severity: "error": something will not work; "warning": it works badly; "note": good to know; "ok": looked at, and well.
        what: what is the case, in a sentence.
        cause: why; "" where there is nothing to explain.
        fix: what to do about it; "" where nothing needs to be done.
        facts: what was measured or read, as JSON types; bytes and seconds unless a name says otherwise.
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
