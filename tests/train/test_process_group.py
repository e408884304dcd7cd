"""When a process group is created."""

from __future__ import annotations

import torch.distributed as dist

from deepseek_optimizer.train.process_group import create


def test_nothing_is_created_without_torchrun(monkeypatch):
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("TORCHELASTIC_USE_AGENT_STORE", "False")):
        monkeypatch.setenv(name, value)
    create(None, 1.0, on_cpu=True)
    assert not dist.is_initialized()
