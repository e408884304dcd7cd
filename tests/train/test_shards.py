"""Parameters sharded over processes: shards are updated locally, norms are of the whole."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from deepseek_optimizer.train import shards
from deepseek_optimizer.train.optimizer import DeepSeekAdamW


@pytest.fixture
def mesh():
    if dist.is_initialized():
        pytest.skip("this process already belongs to a group")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


def test_a_sharded_parameter_is_trained_like_a_plain_one(mesh):
    torch.manual_seed(0)
    weights, gradient = torch.randn(300, 7).bfloat16(), torch.randn(300, 7).bfloat16()
    plain = torch.nn.Parameter(weights.clone())
    shared = torch.nn.Parameter(distribute_tensor(weights.clone(), mesh, [Shard(0)]))
    optimizers = [DeepSeekAdamW([p], max_norm=0.5) for p in (plain, shared)]
    for _ in range(3):
        plain.grad, shared.grad = gradient.clone(), distribute_tensor(gradient.clone(), mesh, [Shard(0)])
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(shared.to_local(), plain) and optimizers[0].grad_norm == optimizers[1].grad_norm
    assert torch.equal(optimizers[1].master(shared), optimizers[0].master(plain))
    again = DeepSeekAdamW([shared])
    again.load_state_dict(copy.deepcopy(optimizers[1].state_dict()))
    assert torch.equal(again.state[shared]["exp_avg"], optimizers[0].state[plain]["exp_avg"])


def test_sums_are_over_the_processes_with_different_shards(mesh, monkeypatch):
    monkeypatch.setattr(dist, "all_reduce", lambda pair, group: pair.mul_(2))  # as if another process had the same values
    tensors = [
        torch.ones(2),
        distribute_tensor(torch.ones(2), mesh, [Shard(0)]),
        distribute_tensor(torch.ones(2), mesh, [Replicate()]),
    ]
    assert shards.total_squares(tensors, [2.0, 2.0, 2.0], [0, 1, 0]) == ([2.0, 4.0, 2.0], [0, 2, 0])
