"""Masks of windows with sinks, against their definition; and every shape of a tokenizer's output."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from transformers import BatchEncoding

from deepseek_optimizer import ConfigError, NotEnoughMemoryError, sliding_window_mask
from deepseek_optimizer.integration.attention import window_mask
from support.memory import memory_of


def reference(real, window, sinks):
    """Computed for each pair. `real`: a list of bools."""
    first = real.index(True) if any(real) else 0
    seen = lambda i, j: real[i] and real[j] and j <= i and (i - j < window or j - first < sinks)  # noqa: E731
    return torch.tensor([[seen(i, j) for j in range(len(real))] for i in range(len(real))], dtype=torch.bool).view(
        len(real), len(real)
    )


@pytest.mark.parametrize("seed", range(20))
def test_random_shapes(seed):
    draw = random.Random(seed)
    lengths = [draw.choice((0, 1, 2, 7, 31, 64)) for _ in range(4)]
    window, sinks = draw.choice((1, 2, 5, 40, 1000)), draw.choice((0, 1, 4, 70))
    real = [[draw.random() < 0.7 for _ in range(n)] for n in lengths]
    plain = sliding_window_mask([list(range(n)) for n in lengths], window, sinks)
    padded = sliding_window_mask({"input_ids": [[1] * n for n in lengths], "attention_mask": real}, window, sinks)
    assert len(plain) == len(padded) == 4
    for n, kept, one, other in zip(lengths, real, plain, padded, strict=True):
        assert one.dtype == torch.bool and one.shape == (n, n)
        assert torch.equal(one, reference([True] * n, window, sinks))
        assert torch.equal(other, reference(kept, window, sinks))


@pytest.mark.parametrize("chunks", [
    [[5, 6, 7], [8, 9]], [range(3), range(2)], [torch.tensor([5, 6, 7]), torch.tensor([8, 9])], ([5, 6, 7], (8, 9)),
    {"input_ids": [[5, 6, 7], [8, 9]]}, BatchEncoding({"input_ids": [[5, 6, 7], [8, 9]]}), {"length": [3, 2]},
    {"length": torch.tensor([3, 2])}, {"input_ids": [[5, 6, 7], [8, 9]], "attention_mask": [[1, 1, 1], [1, 1]]},
    [np.array([5, 6, 7]), np.array([8, 9])],
])  # fmt: skip
def test_rows_of_unequal_lengths(chunks):
    assert [m.shape for m in sliding_window_mask(chunks, 2)] == [(3, 3), (2, 2)]


@pytest.mark.parametrize("chunks", [
    [5, 6, 7], 3, torch.tensor([5, 6, 7]), torch.tensor([[5, 6, 7]]), range(3), {"input_ids": [5, 6, 7]}, {"length": 3},
    BatchEncoding({"input_ids": [5, 6, 7], "attention_mask": [1, 1, 1]}), np.zeros((1, 3), np.int64),
])  # fmt: skip
def test_one_row(chunks):
    masks = sliding_window_mask(chunks, window=2, sinks=0)
    assert len(masks) == 1 and torch.equal(masks[0], reference([True] * 3, 2, 0))


def test_padding_on_either_side():
    kept = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0]])
    masks = sliding_window_mask(BatchEncoding({"input_ids": torch.ones_like(kept), "attention_mask": kept}), 2, 1)
    inner = sliding_window_mask(5, 2, 1)[0]
    assert torch.equal(masks[0][2:, 2:], inner) and torch.equal(masks[1][:5, :5], inner)
    assert masks[0].sum() == masks[1].sum() == inner.sum()


def test_equal_rows_share_a_tensor_and_slices_are_rows():
    masks = sliding_window_mask([range(9), range(9), range(8)], 3)
    same = [m.data_ptr() for m in list(masks)]
    assert same[0] == same[1] != same[2]
    assert [m.shape[0] for m in masks[1:]] == [9, 8] and masks[-1].shape == (8, 8)
    assert len(sliding_window_mask([], 3)) == 0
    with pytest.raises(IndexError):
        masks[3]


@pytest.mark.parametrize(("chunks", "window", "sinks", "words"), [
    (3, 0, 4, "window must be an integer"), (3, True, 4, "window"), (3, 2.0, 4, "window"), (3, 2, -1, "sinks must be"),
    (3, 2, None, "sinks"), ("a text", 2, 4, "got str"), ([["a"]], 2, 4, "not a row of integers"), ([[[1]]], 2, 4, "not a row"),
    (torch.zeros(1, 2, 3), 2, 4, "one or two dimensions"), ({"tokens": [1]}, 2, 4, "must have input_ids or length"),
    ({"input_ids": [[1, 2]], "attention_mask": [[1]]}, 2, 4, "attention_mask"), (-1, 2, 4, "chunks must be an integer"),
    ({"input_ids": [[1, 2]], "attention_mask": [[1, 1], [1, 1]]}, 2, 4, "have the shape of input_ids"), (True, 2, 4, "chunks"),
])  # fmt: skip
def test_invalid_arguments(chunks, window, sinks, words):
    with pytest.raises(ConfigError, match=words):
        sliding_window_mask(chunks, window, sinks)


def test_a_mask_that_does_not_fit_in_memory_is_rejected(monkeypatch):
    with pytest.raises(NotEnoughMemoryError, match='attention_optimization="sliding"') as caught:
        sliding_window_mask([range(8), range(10_000_000)], 1024)
    assert caught.value.needed == 10**14 and "100000.00 GB" in str(caught.value)
    monkeypatch.setattr(window_mask, "free_memory", lambda: memory_of(200))
    masks = sliding_window_mask([range(13), range(13)], 4)
    monkeypatch.setattr(window_mask, "free_memory", lambda: memory_of(180))
    with pytest.raises(NotEnoughMemoryError):  # needs 169 bytes, and a tenth of the free memory stays free
        masks[0]
    with pytest.raises(NotEnoughMemoryError):
        sliding_window_mask({"input_ids": [[1] * 11], "attention_mask": [[0] + [1] * 10]}, 4)
