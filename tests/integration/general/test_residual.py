"""Feed-forward blocks together with their norm and residual: which modules are recognized, and when their own forward runs."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from deepseek_optimizer import BackendError, load_model
from deepseek_optimizer.backends.cpu import CpuBackend, unavailable_reason
from deepseek_optimizer.integration.bind.packed_model import NoCopyCallable
from deepseek_optimizer.integration.general.feed_forward import fuse_feed_forward
from deepseek_optimizer.integration.general.modules import GeneralLinear
from deepseek_optimizer.integration.general.norms import fuse_norms
from deepseek_optimizer.integration.general.residual import FusedResidual, fuse_residuals
from support.general_models import inputs_of, random_general

pytestmark = pytest.mark.skipif(unavailable_reason() is not None, reason="needs the native library")


class Block(nn.Module):
    def __init__(self, cpu):
        super().__init__()
        self.up, self.down, self.act = packed(cpu, 32, 48), packed(cpu, 48, 32), nn.ReLU()

    def forward(self, x):
        return self.down(self.act(self.up(x)))


class Layer(nn.Module):
    """A module with the parts of a residual block, which it connects as `function` says."""

    def __init__(self, function, cpu):
        super().__init__()
        self.norm, self.block, self.drop = nn.LayerNorm(32).requires_grad_(False), Block(cpu), nn.Dropout(0.1)
        self.function, self.calls = function, 0

    def forward(self, x):
        self.calls += 1
        return self.function(self, x)


def packed(cpu, cols, rows):
    layer = GeneralLinear(cols, rows, "fp32", bias=True, dtype=torch.float32)
    generator = torch.Generator().manual_seed(cols)
    layer._parameters["weight"] = nn.Parameter(
        cpu.pack(torch.randn(rows, cols, generator=generator), "fp32"), requires_grad=False
    )
    layer.bias.data = torch.randn(rows, generator=generator)
    layer.product = NoCopyCallable(cpu.linear)
    return layer


def residual(layer, x):
    return x + layer.drop(layer.block(layer.norm(x)))


def made(function=residual):
    cpu = CpuBackend(threads=1)
    model = nn.Sequential(Layer(function, cpu)).eval()
    fuse_feed_forward(model, cpu.feed_forward)
    fuse_norms(model, cpu.norm)
    fuse_residuals(model)
    return model[0]


@pytest.mark.parametrize(
    ("function", "fits"),
    [
        (residual, True), (lambda layer, x: layer.block(layer.norm(x)), False), (lambda layer, x: x + layer.block(x), False),
        (lambda layer, x: layer.norm(x + layer.block(x)), False), (lambda layer, x: (residual(layer, x),), False),
        (lambda layer, x: x + 1.1 * layer.block(layer.norm(x)), False), (lambda layer, x: residual(layer, x)[:, :2], False),
        (lambda layer, x: layer.norm(x) + layer.block(layer.norm(x)), False),
    ],
    ids=["residual", "block", "no norm", "norm after", "tuple", "scaled", "shape", "of the norm"],
)  # fmt: skip
def test_modules_that_compute_something_else_stay(function, fits):
    layer = made(function)
    assert isinstance(layer, FusedResidual) is fits and isinstance(layer, Layer)


def test_small_additions_are_not_mistaken():
    """What is compared is what the block adds to its input."""
    cpu = CpuBackend(threads=1)
    layer = Layer(lambda own, x: x + 1e-3 * own.block(own.norm(x)), cpu).eval()
    layer.block.down._parameters["weight"].data = cpu.pack(torch.zeros(32, 48).fill_diagonal_(1e-3), "fp32")
    model = nn.Sequential(layer)
    fuse_feed_forward(model, cpu.feed_forward)
    fuse_norms(model, cpu.norm)
    fuse_residuals(model)
    assert not isinstance(layer, FusedResidual)


def test_modules_with_other_settings_are_not_alike():
    cpu = CpuBackend(threads=1)
    model = nn.Sequential(*(Layer(lambda own, x: residual(own, x) * own.factor, cpu) for _ in range(2))).eval()
    model[0].factor, model[1].factor, model[1].function = 1.0, 0.5, model[0].function
    fuse_feed_forward(model, cpu.feed_forward)
    fuse_norms(model, cpu.norm)
    fuse_residuals(model)
    assert [isinstance(layer, FusedResidual) for layer in model] == [True, False]


@pytest.mark.parametrize(
    ("name", "fields", "count"),
    [("t5", {}, 4), ("t5", {"feed_forward_proj": "gated-gelu"}, 4), ("gpt2", {}, 0), ("bart", {}, 0)],
)
def test_what_is_recognized(tmp_path, name, fields, count):
    plain = random_general(name, **fields)
    plain.save_pretrained(tmp_path)
    fast = load_model(tmp_path, precision="fp32")
    assert sum(isinstance(module, FusedResidual) for module in fast.modules()) == count
    with torch.no_grad():
        call = inputs_of(plain)
        ours, theirs = fast(**call)[0], plain(**call)[0]
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
        again = copy.deepcopy(fast)(**call)[0]
    assert torch.equal(again, ours)


def hooked(layer, place):
    layer.get_submodule(place).register_forward_hook(lambda *arguments: None)


def wrapped(layer, place):
    layer.set_submodule(place, nn.Sequential(layer.get_submodule(place)))


def replaced(layer, place):
    layer.set_submodule(place, copy.deepcopy(Layer(residual, CpuBackend(threads=1)).get_submodule(place)).eval())
    torch.manual_seed(3)
    if place == "norm":
        layer.norm.weight.data.normal_()


def in_training(layer, place):
    layer.get_submodule(place).train()


def without_function(layer, place):
    layer.get_submodule(place).fused = None


CHANGES = [
    *((change, place) for change in (hooked, in_training) for place in ("norm", "block", "drop", "block.up", "block.act")),
    *((change, place) for change in (wrapped, replaced) for place in ("norm", "block", "block.down")),
    (without_function, "norm"), (without_function, "block"), (lambda layer, place: layer.norm.requires_grad_(), "norm"),
    (lambda layer, place: layer.norm.double(), "norm"), (None, "gradient"), (None, ""),
]  # fmt: skip


@pytest.mark.parametrize(("change", "place"), CHANGES)
def test_when_the_original_forward_runs(change, place):
    layer = made()
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1))
    if change is not None:
        change(layer, place)
    x = x.to(layer.norm.weight.dtype if isinstance(layer.norm, nn.LayerNorm) else x.dtype).requires_grad_(place == "gradient")
    layer.drop.p = 0.0
    before, result = layer.calls, layer(x)
    swaps = change is replaced and place == "block.down"  # a layer of the same kind: it is computed
    assert layer.calls - before == (not swaps and (change is not None or place != ""))
    torch.testing.assert_close(result, Layer.forward(layer, x), rtol=1e-5, atol=1e-5)
    if place == "gradient":
        result.sum().backward()
        assert x.grad.abs().sum() > 0


def test_autocast_and_subclasses_run_the_original():
    layer, x = made(), torch.randn(2, 5, 32)
    before = layer.calls
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        layer(x)
    layer(x.as_subclass(type("Own", (torch.Tensor,), {})))
    assert layer.calls == before + 2


def test_pickles_are_refused_with_a_remedy():
    with pytest.raises(BackendError, match="save_pretrained"):
        pickle.dumps(made())
