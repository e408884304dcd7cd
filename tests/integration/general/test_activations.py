"""Activations on several threads: the same values, and the same module to everything else."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN

from deepseek_optimizer.integration.general.activations import ParallelActivation, parallelize_activations


@pytest.mark.parametrize("name", ["gelu", "gelu_new", "silu", "quick_gelu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values(name, dtype):
    model = nn.Sequential(ACT2FN[name])
    x = torch.randn(3, 7, 40_003, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = model(x)
    parallelize_activations(model, 3)
    assert isinstance(model[0], ParallelActivation)
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected)
        torch.testing.assert_close(model(x.transpose(0, 1)), expected.transpose(0, 1))
        torch.testing.assert_close(model(x[:1, :1]), expected[:1, :1])
    with torch.inference_mode():  # holds for the thread that entered it
        torch.testing.assert_close(model(x), expected)
        torch.testing.assert_close(model(x + 0), expected)


def test_several_threads_compute():
    class Recording(nn.Module):
        seen: set[int] = set()

        def forward(self, x):
            self.seen.add(threading.get_ident())
            return x + 1

    Recording.__name__ = "GELU"
    model = nn.Sequential(Recording())
    parallelize_activations(model, 2)
    with torch.no_grad():
        assert torch.equal(model(torch.zeros(1 << 20)), torch.ones(1 << 20))
    assert len(Recording.seen) == 2


def test_gradients_and_copies():
    model = nn.Sequential(nn.GELU())
    parallelize_activations(model, 2)
    x = torch.randn(1 << 19, requires_grad=True)
    copy.deepcopy(model)(x).sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0


def test_what_stays():
    model = nn.Sequential(nn.Softmax(-1), nn.PReLU(), nn.Sequential(nn.GELU()))
    parallelize_activations(model, 1)
    assert type(model[2][0]) is nn.GELU
    parallelize_activations(model, 2)
    parallelize_activations(model, 2)
    assert type(model[0]) is nn.Softmax and type(model[1]) is nn.PReLU and type(model[2][0].inner) is nn.GELU


def test_hooks_see_the_whole_activation_once():
    """They are inside of the module that replaces it; it would call them for each part, and its block would not see them."""
    model, seen = nn.Sequential(nn.GELU(), nn.GELU()), []
    model[0].register_forward_hook(lambda module, args, result: seen.append(result.shape))
    parallelize_activations(model, 2)
    with torch.no_grad():
        model(torch.zeros(1 << 20))
    assert seen == [(1 << 20,)] and type(model[0]) is nn.GELU and isinstance(model[1], ParallelActivation)
