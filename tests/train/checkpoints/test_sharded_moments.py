"""8-bit moments of shards: joined as they are where blocks allow it, and the same codes again where they do not."""

from __future__ import annotations

import pytest
import torch

from deepseek_optimizer.train.checkpoints import sharded_moments
from deepseek_optimizer.train.ops.moments import Moments


def coded(rows: int, width: int, seed: int = 0) -> Moments:
    """Moments of many magnitudes, with a block of zeros."""
    random = torch.Generator().manual_seed(seed)
    m, v = (torch.randn(rows * width, generator=random) * 10.0 ** torch.randint(-6, 3, (rows * width,)) for _ in range(2))
    m[256:512], v[256:512] = 0, 0
    moments = Moments.zeros(torch.Size((rows, width)), "int8")
    moments.write(m, v.square(), (0, 0, 0, 0))
    return moments


def as_state(moments: Moments) -> dict[str, torch.Tensor]:
    return dict(zip(sharded_moments.NAMES, (moments.m, moments.v, moments.m_scale, moments.v_scale), strict=True))


class Shard:
    """A process's part of a parameter that is divided among several, without processes."""

    def __init__(self, rows: int, width: int, rank: int, count: int) -> None:
        chunk = -(-rows // count)
        self.shape, self.local = torch.Size((rows, width)), torch.zeros(rows, width)[rank * chunk : (rank + 1) * chunk]
        self.placements, self.rank, self.count = [torch.distributed.tensor.Shard(0)], rank, count
        self.device_mesh = self

    def size(self, _: int) -> int:
        return self.count

    def get_local_rank(self, _: int) -> int:
        return self.rank

    def get_group(self, _: int) -> None:
        return None

    def to_local(self) -> torch.Tensor:
        return self.local


def test_what_codes_stand_for_gives_the_same_codes():
    moments = coded(33, 100)
    again = Moments.zeros(moments.m.shape, "int8")
    again.write_roots(*moments.read_roots())
    assert all(torch.equal(one, two) for one, two in zip(vars(moments).values(), vars(again).values(), strict=True))


@pytest.mark.parametrize(("rows", "width", "count"), [(8, 256, 2), (5, 512, 3), (3, 128, 4), (2, 256, 4)])
def test_aligned_shards_are_joined_and_divided_without_rounding(monkeypatch, rows, width, count):
    """Also with shards of different lengths, and empty ones."""
    shards = [Shard(rows, width, rank, count) for rank in range(count)]
    if rows == 3:  # shards of one row of half a block
        assert not sharded_moments.Shards(shards[0]).aligned
        return
    full = as_state(coded(rows, width))
    parts = [sharded_moments.scattered_moments(full, shard) for shard in shards]
    for part, shard in zip(parts, shards, strict=True):
        assert part["exp_avg"].shape == shard.local.shape and len(part["exp_avg_scale"]) == -(-shard.local.numel() // 256)
    for name, whole in full.items():
        assert torch.equal(torch.cat([part[name] for part in parts]), whole), name


def test_other_blocks_are_rounded_once():
    full, shards = coded(6, 100), [Shard(6, 100, rank, 2) for rank in range(2)]
    values, roots = full.read_roots()
    for shard, begin in zip(shards, (0, 300), strict=True):
        state = sharded_moments.scattered_moments(as_state(full), shard)
        made = Moments(*(state[name] for name in sharded_moments.NAMES))
        m, root = made.read_roots()
        largest = made.m_scale.repeat_interleave(256)[:300], made.v_scale.repeat_interleave(256)[:300]
        assert ((m - values[begin : begin + 300]).abs() <= largest[0] * 1.01 / 127).all()
        assert ((root - roots[begin : begin + 300]).abs() <= largest[1] * 1.01 / 255).all()
        stored = {"exp_avg": values.view(6, 100), "exp_avg_root": roots.view(6, 100)}
        again = sharded_moments.scattered_moments(stored, shard)
        assert all(torch.equal(again[name], state[name]) for name in state)


def test_a_divided_second_dimension_is_refused():
    shard = Shard(4, 4, 0, 2)
    shard.placements = [torch.distributed.tensor.Shard(1)]
    with pytest.raises(sharded_moments.ConfigError, match="first dimension"):
        sharded_moments.Shards(shard)
