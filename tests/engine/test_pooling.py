"""Pooling equals sentence-transformers' definition, however a text is split into chunks."""

from __future__ import annotations

import numpy as np
import pytest

from deepseek_optimizer.checkpoint.sentence_transformers import POOLING_MODES
from deepseek_optimizer.engine.pooling import Pooler, Pooling, pooled

ROWS = np.random.default_rng(0).standard_normal((37, 5)).astype(np.float32)


def defined(rows: np.ndarray, mode: str, skip: int) -> np.ndarray:
    """sentence_transformers/sentence_transformer/modules/pooling.py, for one text without padding."""
    kept, weights = rows[skip:].astype(np.float64), np.arange(1, len(rows) + 1)[skip:, None]
    return {
        "cls": kept[0], "lasttoken": kept[-1], "max": kept.max(0), "mean": kept.mean(0),
        "mean_sqrt_len_tokens": kept.sum(0) / len(kept) ** 0.5, "weightedmean": (kept * weights).sum(0) / weights.sum(),
    }[mode]  # fmt: skip


@pytest.mark.parametrize("skip", [0, 3, 36])
@pytest.mark.parametrize("mode", POOLING_MODES)
def test_modes(mode, skip):
    whole = pooled(ROWS, Pooling((mode,), skip))
    assert whole.dtype == np.float32
    np.testing.assert_allclose(whole, defined(ROWS, mode, skip), rtol=1e-6)
    for size in (1, 4, 36):
        pooler = Pooler(Pooling((mode,), skip))
        for begin in range(0, len(ROWS), size):
            pooler.add(ROWS[begin : begin + size])
        assert np.array_equal(pooler.vector(), whole)


def test_several_modes_are_concatenated():
    vector = pooled(ROWS, Pooling(("mean", "cls")))
    assert np.array_equal(vector, np.concatenate([pooled(ROWS, Pooling((mode,))) for mode in ("mean", "cls")]))
