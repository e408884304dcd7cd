"""PackedLinear and PackedEmbedding: correct, differentiable in the input, and regular modules."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from deepseek_optimizer import UnsupportedRequestError
from deepseek_optimizer.integration.bind.modules import PackedEmbedding, PackedLinear
from deepseek_optimizer.quant import FORMATS, SUPERBLOCKS, reference_packer

SHAPES = [(5, 3), (64, 32), (72, 211), (33, 2049)]
ANY_SHAPE = [name for name in FORMATS if name not in SUPERBLOCKS]


def linear(cols, rows, format, bias=True, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    module = PackedLinear(cols, rows, format, bias=bias, dtype=dtype)
    module.weight = nn.Parameter(reference_packer(torch.randn(rows, cols), format), requires_grad=False)
    if bias:
        module.bias.data.normal_()
    return module


@pytest.mark.parametrize("format", ANY_SHAPE)
@pytest.mark.parametrize(("cols", "rows"), SHAPES)
def test_forward_and_gradient_equal_the_dequantized_matrix(format, cols, rows):
    module = linear(cols, rows, format)
    weight = module.dequantized().double()
    x = torch.randn(2, 3, cols, requires_grad=True)
    exact = x.detach().double().requires_grad_()
    y, z = module(x), exact @ weight.T + module.bias.double()
    bound = 2**-22 * cols * (x.detach().abs().double() @ weight.abs().T) + 1e-6
    assert ((y - z).abs() <= bound).all()
    up = torch.randn_like(y)
    y.backward(up)
    z.backward(up.double())
    torch.testing.assert_close(x.grad.double(), exact.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_result_has_the_dtype_of_the_input(dtype):
    module = linear(32, 48, "int8", dtype=dtype)
    x = torch.randn(2, 32).to(dtype)
    assert module(x).dtype == dtype
    torch.testing.assert_close(
        module(x).float(), x.float() @ module.dequantized().T + module.bias.float(), rtol=2**-6, atol=0.05
    )


def test_no_gradient_reaches_the_weight():
    module = linear(32, 48, "int4")
    module(torch.randn(2, 32, requires_grad=True)).sum().backward()
    assert module.weight.grad is None
    assert not any(p.requires_grad for p in module.parameters())


@pytest.mark.parametrize("format", ANY_SHAPE)
def test_embedding_looks_up_rows(format):
    module = PackedEmbedding(211, 72, format, padding_idx=3, dtype=torch.float32)
    module.weight = nn.Parameter(reference_packer(torch.randn(211, 72), format), requires_grad=False)
    ids = torch.tensor([[0, 210, 15], [16, 16, 3]])
    assert torch.equal(module(ids), module.dequantized()[ids])
    for bad in (211, -1):
        with pytest.raises(IndexError):
            module(torch.tensor([bad]))


def test_modules_have_the_expected_classes_and_attributes():
    module = linear(32, 48, "int4", bias=False)
    assert isinstance(module, nn.Linear)
    assert isinstance(PackedEmbedding(16, 32, "int8", dtype=torch.float32), nn.Embedding)
    assert (module.in_features, module.out_features, module.bias) == (32, 48, None)
    assert "int4" in repr(module)
    assert [n for n, _ in module.named_parameters()] == ["weight"]


def test_state_dict_and_deepcopy():
    a, b = linear(32, 48, "int4", seed=0), linear(32, 48, "int4", seed=1)
    x = torch.randn(3, 32)
    twin = copy.deepcopy(a)
    assert torch.equal(twin(x), a(x))
    assert twin.weight.data_ptr() != a.weight.data_ptr()
    b.load_state_dict(a.state_dict())
    assert torch.equal(a(x), b(x))
    with pytest.raises(RuntimeError, match="size mismatch"):
        b.load_state_dict(nn.Linear(32, 48).state_dict())
    with pytest.raises(RuntimeError, match="Missing key"):
        b.load_state_dict({})


@pytest.mark.parametrize("cast", [lambda m: m.half(), lambda m: m.to(torch.bfloat16), lambda m: m.double()])
def test_a_cast_is_rejected_before_anything_changes(cast):
    for module in (linear(32, 48, "int8"), PackedEmbedding(16, 32, "int8", dtype=torch.float32)):
        with pytest.raises(UnsupportedRequestError, match="packed as int8"):
            cast(module)
        assert {p.dtype for p in module.parameters()} <= {torch.uint8, torch.float32}
        assert module.to("cpu") is module
        assert module.float() is module


def test_hooks_run():
    module, seen = linear(32, 48, "int4"), []
    module.register_forward_hook(lambda m, args, out: seen.append(tuple(out.shape)))
    module(torch.randn(2, 32))
    assert seen == [(2, 48)]


def test_empty_batch():
    assert linear(32, 48, "int4")(torch.empty(0, 32)).shape == (0, 48)
