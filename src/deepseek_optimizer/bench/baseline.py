"""A report against an earlier one of the same model on the same machine: what got worse by more than noise."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .metrics import METRICS
from .statistics import median_error, percentile

WATCHED = ("ttft_ms", "tpot_ms", "prefill_tok_s", "decode_tok_s", "output_tok_s")
SAME = ("schema", "model", "cpu", "threads", "config")  # keys that must be equal
ERRORS = 3  # standard errors of the difference that count as noise


def read(path: Path) -> dict[str, Any]:
    """Reads a report written by `--json`; of a log, the last line.

    Raises:
        ConfigError: the file is not a report.
    """
    try:
        text = path.read_text(encoding="utf-8")
        try:
            report = json.loads(text)
        except json.JSONDecodeError:
            report = json.loads(text.splitlines()[-1])
        if report["works"] is not None and report["schema"]:
            return dict(report)
    except (json.JSONDecodeError, IndexError, KeyError, TypeError, UnicodeDecodeError):
        pass
    raise ConfigError(f"{path} is not a report of `dso bench --json`; write one with that command")


def check(report: dict[str, Any], baseline: dict[str, Any], works: list[dict[str, Any]]) -> None:
    """Checks whether two reports can be compared, before anything is measured.

    Raises:
        ConfigError: the model, the machine or the configuration differ, or no lengths and batch size are the same.
    """
    for name in SAME:
        if report.get(name) != baseline.get(name):
            raise ConfigError(f"the baseline has another {name}: {baseline.get(name)!r}, this run has {report.get(name)!r}")
    if not any(entry["work"] in works for entry in baseline["works"]):
        raise ConfigError("the baseline has no run with the same --prompt, --new, --depth and --batch")


def compare(report: dict[str, Any], baseline: dict[str, Any], tolerance: float = 0.05) -> list[dict[str, Any]]:
    """Rows {"work", "figure", "unit", "before", "now", "change_percent" (above 0: worse), "noise_percent", "regressed"}.

    A figure has regressed if it is worse by more than `tolerance` and by more than three standard errors of the two medians.

    Raises:
        ConfigError: see `check`.
    """
    check(report, baseline, [entry["work"] for entry in report["works"]])
    before = {json.dumps(entry["work"]): entry["figures"] for entry in baseline["works"]}
    rows = []
    for entry in report["works"]:
        old = before.get(json.dumps(entry["work"]), {})
        for name in WATCHED:
            if name in old and name in entry["figures"]:
                rows.append({"work": entry["work"], **_row(name, old[name]["samples"], entry["figures"][name], tolerance)})
    for name, unit in (("memory_bytes", "bytes"), ("kl_mean", "nats")):
        old_value, value = _single(baseline, name), _single(report, name)
        if old_value and value:
            worse = value / old_value - 1
            rows.append(
                {"work": None, "figure": name, "unit": unit, "before": old_value, "now": value, "change_percent": 100 * worse,
                 "noise_percent": 100 * tolerance, "regressed": worse > tolerance}
            )  # fmt: skip
    return rows


def _row(name: str, old: list[float], now: dict[str, Any], tolerance: float) -> dict[str, Any]:
    kind, before = METRICS[name], percentile(old, 50)
    worse = (before - now["p50"] if kind.more_is_better else now["p50"] - before) / before
    errors = median_error(old), median_error(now["samples"])
    noise = ERRORS * math.hypot(*(e or 0.0 for e in errors)) / before
    allowed = max(tolerance, noise)
    return {
        "figure": name,
        "unit": kind.unit,
        "before": before,
        "now": now["p50"],
        "change_percent": 100 * worse,
        "noise_percent": 100 * allowed,
        "regressed": worse > allowed,
    }


def _single(report: dict[str, Any], name: str) -> float | None:
    value = report.get(name) if name in report else (report.get("quality") or {}).get(name)
    return value
