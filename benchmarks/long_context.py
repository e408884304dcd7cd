"""Long texts: rows as in `standing.py`. What a text of twice the length costs, and exact attention beside Transformers'.

A rival of ours is the same model and mode at another length: doubling the length doubles the time where cost is linear, which
keeps the speed, and four times the time is half the speed.
"""

from __future__ import annotations

from collections.abc import Mapping

from deepseek_optimizer.bench.work import Work

from .standing import DECODE, ONCE, OURS, PREFILL, Bar, Rival, Row

TRANSFORMERS = Rival("transformers", "bf16-long", "Transformers bf16")
TRANSFORMERS_R1 = Rival("transformers", "bf16", "Transformers bf16")
SLIDING: Mapping[str, str] = {"attention_optimization": "sliding"}
SPARSE: Mapping[str, str] = {"attention_optimization": "sparse"}
READ_16K, READ_32K = Work(16384, 1), Work(32768, 1)
SHORTER, SHORTER_R1 = (Rival(OURS, form, f"ours {form} at 16,384", READ_16K) for form in ("int4-long", "int4"))
SHORT, SHORT_R1 = (Rival(OURS, form, f"ours {form} at 4,096", Work(4096, 33)) for form in ("int4-long", "int4"))
DECODE_32K = Work(32768, 33)


def _twice(shorter: Rival, most_times: float) -> tuple[Bar, ...]:
    """32K may take so many times as long as 16K."""
    return (Bar((shorter,), 2 / most_times),)


SMOL = {"form": "int4-long", **ONCE}  # as if it had been trained at such lengths
LONG = (
    Row("smol-16k", "SmolLM2 prefill 16,384, exact", "smol", READ_16K, PREFILL, (Bar((TRANSFORMERS,), 3.0),), **SMOL),
    Row("r1q15-16k", "r1q15 prefill 16,384, exact", "r1q15", READ_16K, PREFILL, (Bar((TRANSFORMERS_R1,), 3.0),), **ONCE),
    Row(
        "smol-sliding", "SmolLM2 prefill 32,768, sliding", "smol", READ_32K, PREFILL, _twice(SHORTER, 2.2), fields=SLIDING,
        **SMOL,
    ),
    Row(
        "smol-sparse", "SmolLM2 prefill 32,768, sparse", "smol", READ_32K, PREFILL, _twice(SHORTER, 2.4), fields=SPARSE,
        **SMOL,
    ),
    Row(
        "r1q15-sliding", "r1q15 prefill 32,768, sliding", "r1q15", READ_32K, PREFILL, _twice(SHORTER_R1, 2.2), fields=SLIDING,
        **ONCE,
    ),
    Row(
        "r1q15-sparse", "r1q15 prefill 32,768, sparse", "r1q15", READ_32K, PREFILL, _twice(SHORTER_R1, 2.4), fields=SPARSE,
        **ONCE,
    ),
    Row(
        "smol-sparse-decode", "SmolLM2 decode at 32,768, sparse", "smol", DECODE_32K, DECODE, (Bar((SHORT,), 1 / 1.3),),
        fields=SPARSE, **SMOL,
    ),
    Row(
        "r1q15-sparse-decode", "r1q15 decode at 32,768, sparse", "r1q15", DECODE_32K, DECODE, (Bar((SHORT_R1,), 1 / 1.3),),
        fields=SPARSE, **ONCE,
    ),
)  # fmt: skip
