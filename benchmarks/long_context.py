"""Long texts: rows as in `standing.py`. What a text of twice the length costs, and exact attention beside Transformers'.

A rival of ours is the same model and mode at another length: doubling the length doubles the time where cost is linear, which
keeps the speed, and four times the time is half the speed.
"""

from __future__ import annotations

from collections.abc import Mapping

from deepseek_optimizer.bench.work import Work

from .standing import DECODE, ONCE, OURS, PREFILL, Bar, Rival, Row

TRANSFORMERS = Rival("transformers", "bf16", "Transformers bf16")
SLIDING: Mapping[str, str] = {"attention_optimization": "sliding"}
SPARSE: Mapping[str, str] = {"attention_optimization": "sparse"}
READ_16K, READ_32K = Work(16384, 1), Work(32768, 1)
SHORTER = Rival(OURS, "int4", "ours int4 at 16,384", READ_16K)
SHORT = Rival(OURS, "int4", "ours int4 at 4,096", Work(4096, 33))


def _twice(most_times: float) -> tuple[Bar, ...]:
    """32K may take so many times as long as 16K."""
    return (Bar((SHORTER,), 2 / most_times),)


LONG = (
    Row("smol-16k", "SmolLM2 prefill 16,384, exact", "smol", READ_16K, PREFILL, (Bar((TRANSFORMERS,), 3.0),), **ONCE),
    Row("r1q15-16k", "r1q15 prefill 16,384, exact", "r1q15", READ_16K, PREFILL, (Bar((TRANSFORMERS,), 3.0),), **ONCE),
    Row(
        "smol-sliding", "SmolLM2 prefill 32,768, sliding", "smol", READ_32K, PREFILL, _twice(2.2), fields=SLIDING, **ONCE
    ),
    Row("smol-sparse", "SmolLM2 prefill 32,768, sparse", "smol", READ_32K, PREFILL, _twice(2.4), fields=SPARSE, **ONCE),
    Row(
        "r1q15-sliding", "r1q15 prefill 32,768, sliding", "r1q15", READ_32K, PREFILL, _twice(2.2), fields=SLIDING, **ONCE
    ),
    Row("r1q15-sparse", "r1q15 prefill 32,768, sparse", "r1q15", READ_32K, PREFILL, _twice(2.4), fields=SPARSE, **ONCE),
    Row(
        "smol-sparse-decode", "SmolLM2 decode at 32,768, sparse", "smol", Work(32768, 33), DECODE,
        (Bar((SHORT,), 1 / 1.3),), fields=SPARSE, **ONCE,
    ),
    Row(
        "r1q15-sparse-decode", "r1q15 decode at 32,768, sparse", "r1q15", Work(32768, 33), DECODE,
        (Bar((SHORT,), 1 / 1.3),), fields=SPARSE, **ONCE,
    ),
)  # fmt: skip
