"""What a prompt's pictures are to the language model."""

from __future__ import annotations

import numpy as np
import torch

from deepseek_optimizer.engine.pictures import PictureRows


def test_rows_followed_by_generated_tokens():
    """A prompt of two tokens, a picture of 2 x 2 tokens, and one more token."""
    positions = np.array([0, 1, 2, 2, 2, 2, 4], dtype=np.int32)
    axes = np.array([[0] * 3, [1] * 3, [2, 2, 2], [2, 2, 3], [2, 3, 2], [2, 3, 3], [4] * 3], dtype=np.int32)
    of = np.array([-1, -1, 0, 0, 0, 0, -1], dtype=np.int32)
    rows = PictureRows(positions, np.array([2, 3, 4, 5]), torch.ones(4, 3), axes, of)
    longer = rows.followed_by(2)
    assert longer.tokens == 9 and longer.positions[7:].tolist() == [5, 6]
    assert longer.axes.tolist() == [*axes.tolist(), [5] * 3, [6] * 3] and longer.of.tolist() == [*of.tolist(), -1, -1]
    assert longer.positions_of(6, 4).tolist() == rows.positions_of(6, 4).tolist() == [4, 5, 6, 7]
    assert longer.digest(0, 7) == rows.digest(0, 7) and longer.digest(3, 9) == rows.digest(3, 9)
    ends = [rows.digest(0, end) for end in range(2, 8)]
    assert ends[0] == b"" and len(set(ends)) == len(ends)  # a text, then one more row each
    other = PictureRows(positions, np.array([2, 3, 4, 5]), torch.tensor([[1.0], [1], [1], [2]]).expand(4, 3), axes, of)
    assert [other.digest(0, end) == known for end, known in zip(range(2, 8), ends, strict=True)] == [True] * 4 + [False] * 2
    assert rows.followed_by(1).followed_by(1).positions.tolist() == longer.positions.tolist()


def test_the_same_rows_at_other_places_have_other_digests():
    """A token with a picture's id need not be a picture: a model may generate it."""
    positions, embeds = np.arange(8, dtype=np.int32), torch.ones(2, 4)
    first, second = (PictureRows(positions, np.array(places), embeds) for places in ([1, 2], [2, 3]))
    assert first.digest(0, 8) != second.digest(0, 8)
