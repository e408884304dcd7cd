"""Memory for the ops' tensors while they are traced."""

from __future__ import annotations

import torch

from deepseek_optimizer.train.ops import native


def test_tracing_allocates_no_memory():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        like = torch.empty(4)
        assert type(native.new((1 << 40,), like)) is type(like)
    assert native.new((3,), torch.empty(4), torch.float64).dtype == torch.float64
