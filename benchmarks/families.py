"""Current families beside llama.cpp, on the same files of random weights: rows as in `standing.py`."""

from __future__ import annotations

from deepseek_optimizer.bench.work import Work

from .gguf_shapes import SHAPES
from .standing import DECODE, ONCE, PREFILL, Bar, Rival, Row

FORM = "gguf"
LLAMA_CPP = Rival("llama.cpp", FORM, "llama.cpp, same file")


def _rows(name: str, title: str) -> tuple[Row, Row]:
    decode = Row(
        f"{name}-decode", f"{title}: decode at 512", name, Work(512, 33), DECODE, (Bar((LLAMA_CPP,), 1.0),), read_percent=80,
        form=FORM, **ONCE,
    )  # fmt: skip
    prefill = Row(
        f"{name}-prefill", f"{title}: prefill 512", name, Work(512, 1), PREFILL, (Bar((LLAMA_CPP,), 1.5),), form=FORM, **ONCE
    )
    return decode, prefill


FAMILIES = tuple(row for name, shape in SHAPES.items() for row in _rows(name, shape.title))
