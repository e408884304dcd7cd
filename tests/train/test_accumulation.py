"""Sums of gradients in fp32, of whole and of sharded weights."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from deepseek_optimizer.train.accumulation import Accumulators


def test_small_gradients_of_sharded_weights_are_not_lost():
    """1 + 2^-9 is 1 in bf16."""
    if dist.is_initialized():
        pytest.skip("this process already belongs to a group")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = torch.nn.Linear(1, 1, bias=False, dtype=torch.bfloat16, device="cpu")
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        sums = Accumulators(model.parameters())
        for size in (1.0, 2.0**-9):
            with sums.around_pass(model):
                model(torch.full((1, 1), size, dtype=torch.bfloat16, device="cpu")).sum().backward()
        sums.reduce()
        (weight,) = model.parameters()
        assert weight.grad is None and weight.main_grad.to_local().tolist() == [[1 + 2.0**-9]]
        sums.remove()
        assert not hasattr(weight, "main_grad")
    finally:
        dist.destroy_process_group()


def test_sums_of_processes_are_averaged_together_and_alone(monkeypatch):
    """Small ones in one exchange, large ones each in its own."""
    from deepseek_optimizer.train import accumulation, group

    exchanged = []
    monkeypatch.setattr(group, "size", lambda: 2)
    monkeypatch.setattr(accumulation, "_BUCKET", 10)
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: (exchanged.append(tensor.numel()), tensor.mul_(4)))
    weights = [torch.nn.Parameter(torch.zeros(n, dtype=torch.bfloat16)) for n in (3, 12, 4, 5)]
    sums = Accumulators(weights)
    for value, weight in enumerate(weights, 1):
        weight.main_grad.fill_(value)
    sums.reduce()
    assert sorted(exchanged) == [12, 12]
    assert [weight.main_grad.unique().tolist() for weight in weights] == [[2.0], [4.0], [6.0], [8.0]]
