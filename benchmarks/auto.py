"""Formats chosen by a KL budget, on SmolLM2-135M-Instruct: does what was measured on the calibration text hold elsewhere?

Every row is a load with `kl_budget`, or in one format, held against the bf16 model by our own engine: on the calibration tokens
(which the choice was made on), on other pages of the same text, and on a text of another kind (Python code). SmolLM2's weights
were 4-bit (Q4_1) before, all but the embedding's: q4_1 hardly changes them, so the curve is steeper there than elsewhere.

    python -m benchmarks.auto [BUDGET ...] [--out NAME]
"""

from __future__ import annotations

import argparse
import inspect
import time
from typing import Any

import torch

from deepseek_optimizer import load_model, load_tokenizer
from deepseek_optimizer.bench.hardware import cpu_name
from deepseek_optimizer.bench.quality import compare
from deepseek_optimizer.calibration.text import sample_text, stretches
from deepseek_optimizer.integration.load.kl_budget import LENGTH, calibration_tokens

from . import models, results

BUDGETS = (0.1, 0.03, 0.01)
FIXED = ("int4", "q4_1", "int8")
ELSEWHERE = 16  # stretches of each other text


def texts_of(tokenizer: Any, calibration: list[torch.Tensor]) -> dict[str, list[torch.Tensor]]:
    """Name -> stretches of LENGTH tokens; no two lists share one."""
    pages = stretches(tokenizer, sample_text(), LENGTH, 1 << 30)
    others = [page for page in pages if not any(torch.equal(page, used) for used in calibration)]
    step = len(others) // ELSEWHERE
    code = stretches(tokenizer, inspect.getsource(argparse), LENGTH, ELSEWHERE)
    return {"calibration": calibration, "other pages": others[step // 2 :: step][:ELSEWHERE], "code": code}


def measured(path: Any, reference: Any, texts: dict[str, list[torch.Tensor]], **fields: Any) -> dict[str, Any]:
    """One row: size, and quality on each text."""
    model = load_model(path, **fields)
    report = model.report()
    weights, size = sum(row.weights for row in report.formats), sum(row.bytes for row in report.formats)
    quality = {name: compare(model, reference, ids) for name, ids in texts.items()}
    return {
        **fields, "bits": 8 * size / weights, "bytes": size,
        "formats": {row.format: row.matrices for row in report.formats},
        "kl": {name: found["kl_mean"] for name, found in quality.items()},
        "same_top_percent": {name: found["same_top_percent"] for name, found in quality.items()},
        "curve": list(report.curve),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("budgets", nargs="*", type=float, default=BUDGETS)
    parser.add_argument("--out", default="auto", help="name of the file in benchmarks/results")
    a = parser.parse_args()
    path = models.model("smol", "bf16")
    reference = load_model(path)
    tokenizer = load_tokenizer(path)
    texts = texts_of(tokenizer, calibration_tokens(reference.dso.config, tokenizer))
    wanted: list[dict[str, Any]] = [{"precision": name, "calibration": None} for name in FIXED]
    wanted += [{"kl_budget": budget} for budget in a.budgets]
    for fields in wanted:
        row = measured(path, reference, texts, **fields)
        name = ", ".join(f"{field} {value}" for field, value in fields.items())
        print(f"{name:18}{row['bits']:6.2f} bits  KL " + "  ".join(f"{t} {kl:.4f}" for t, kl in row["kl"].items()), flush=True)
        results.merge(a.out, {name: {"cpu": cpu_name(), "date": time.strftime("%Y-%m-%d"), **row}})


if __name__ == "__main__":
    main()
