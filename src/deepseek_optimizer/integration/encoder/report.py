"""The report about an encoder: that of the general path, and its plan."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, fields
from typing import Any

from ..general.report import GeneralReport
from ..general.report import make_report as make_general


@dataclass(frozen=True)
class EncoderReport(GeneralReport):
    """What was optimized in an encoder.

    Attributes: those of `GeneralReport`, with path "plan"; reason: what the plan does not do; and
        rules: how often each fusion rule was applied.
        ops: number of the plan's steps by op.
    """

    rules: dict[str, int]
    ops: dict[str, int]

    title = "plan"

    def remarks(self) -> list[tuple[str, str]]:
        rows = [("plan", ", ".join(f"{count} {op}" for op, count in self.ops.items()))]
        rows.append(("rules", ", ".join(f"{name}: {count}" for name, count in self.rules.items())))
        rows.append(("torch", "embeddings, pooler, head: Transformers' own modules, with packed layers"))
        return rows


def make_report(runtime: Any) -> EncoderReport:
    """The report of an encoder."""
    general = make_general(runtime)
    values = {field.name: getattr(general, field.name) for field in fields(general)}
    steps = Counter(row["op"] for row in runtime.plan.describe())
    applied = {report.rule: report.count for report in runtime.rules if report.count}
    return EncoderReport(**{**values, "path": "plan"}, rules=applied, ops=dict(steps.most_common()))
