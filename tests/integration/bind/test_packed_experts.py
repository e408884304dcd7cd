"""PackedExperts: Transformers' module with packed weights, differentiable, a regular module."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Experts
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Experts

from deepseek_optimizer import UnsupportedRequestError
from deepseek_optimizer.integration.bind.modules import Packed
from deepseek_optimizer.integration.bind.packed_experts import PackedExperts
from deepseek_optimizer.integration.bind.swap import float_shape, packed_twin
from deepseek_optimizer.quant import FORMATS, PackedMatrix, reference_packer
from support.models import CASES

FORMATS_USED = [("int4", "int8"), ("q4_1", "q4_1"), ("bf16", "int4"), ("fp32", "fp32")]


def pair(gate_up="int4", down="int8", dtype=torch.float32, case="deepseek_v3-groups"):
    """Packed experts, and Transformers' experts with the dequantized weights."""
    config = CASES[case]()
    config._experts_implementation = "eager"
    kind = DeepseekV2Experts if "v2" in case else DeepseekV3Experts
    own = kind(config)
    generator = torch.Generator().manual_seed(0)
    packed = packed_twin(own, {"gate_up_proj": gate_up, "down_proj": down}, dtype)
    for leaf, stack in packed.held().items():
        matrices = torch.randn(stack.shape, generator=generator) * stack.cols**-0.5
        tiles = torch.stack([reference_packer(matrix, stack.format) for matrix in matrices])
        setattr(packed, leaf, nn.Parameter(tiles, requires_grad=False))
    with torch.no_grad():
        for leaf, weight in zip(("gate_up_proj", "down_proj"), packed.dequantized(), strict=True):
            assert weight.shape == getattr(own, leaf).shape == float_shape(leaf, packed.held()[leaf])
            getattr(own, leaf).copy_(weight)
    return packed, own


def routed(experts, tokens=7, chosen=4, seed=1, dtype=torch.float32):
    """hidden, top_k_index, top_k_weights: distinct experts in arbitrary order, as from routers."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.stack([torch.randperm(experts.num_experts, generator=generator)[:chosen] for _ in range(tokens)])
    weights = torch.rand(tokens, chosen, generator=generator)
    return torch.randn(tokens, experts.hidden_dim, generator=generator).to(dtype), index, weights


@pytest.mark.parametrize("formats", FORMATS_USED)
@pytest.mark.parametrize("case", ["deepseek_v2-greedy", "deepseek_v3-groups"])
@pytest.mark.parametrize("tokens", [1, 7, 40])
def test_results_equal_transformers_experts(formats, case, tokens):
    packed, own = pair(*formats, case=case)
    x, index, weights = routed(packed, tokens)
    torch.testing.assert_close(packed(x, index, weights), own(x, index, weights), atol=1e-5, rtol=1e-4)


def test_gradients_of_input_and_routing_weights():
    packed, own = pair()
    x, index, weights = routed(packed)
    grads = []
    for module in (packed, own):
        inputs = x.clone().requires_grad_(), weights.clone().requires_grad_()
        module(inputs[0], index, inputs[1]).square().sum().backward()
        grads.append([t.grad for t in inputs])
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)
    assert all(p.grad is None and not p.requires_grad for p in packed.parameters())


def test_each_chosen_expert_is_multiplied_once():
    packed, _ = pair()
    seen: list[int] = []

    def product(x: torch.Tensor, matrix: PackedMatrix, bias: None) -> torch.Tensor:
        stack = packed.down if matrix.rows == packed.hidden_dim else packed.gate_up
        seen.append((matrix.data.data_ptr() - stack.data.data_ptr()) // stack.matrix(0).nbytes)
        return x @ torch.zeros(matrix.cols, matrix.rows)

    packed.product = product
    index = torch.tensor([[3, 1], [1, 5], [1, 3]])
    packed(torch.randn(3, packed.hidden_dim), index, torch.ones(3, 2))
    assert seen == [2, 3, 1, 6, 7, 3, 10, 11, 5]  # gate, up and down of experts 1, 3 and 5


def test_an_index_of_num_experts_chooses_no_expert():
    packed, _ = pair()
    x, index, weights = routed(packed)
    index[:] = packed.num_experts
    assert not packed(x, index, weights).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_result_has_the_dtype_of_the_input(dtype):
    packed, own = pair(dtype=dtype)
    x, index, weights = routed(packed, dtype=dtype)
    found = packed(x, index, weights)
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), own(x.float(), index, weights), atol=0.1, rtol=2**-5)


def test_a_listener_gets_the_inputs_of_down():
    packed, own = pair("fp32", "fp32")
    x, index, weights = routed(packed, tokens=5)
    seen: list[tuple[int, torch.Tensor, torch.Tensor]] = []
    packed.listener = lambda *inputs: seen.append(inputs)
    packed(x, index, weights)
    assert sum(len(h) for _, _, h in seen) == index.numel()
    for expert, own_rows, h in seen:
        assert torch.equal(own_rows, x[(index == expert).any(1)])
        gate, up = (own_rows @ own.gate_up_proj[expert].T).chunk(2, -1)
        torch.testing.assert_close(h, nn.functional.silu(gate) * up)


def test_it_is_a_regular_module():
    packed, _ = pair()
    other, _ = pair("int4", "int8")
    assert isinstance(packed, Packed) and not isinstance(packed, (nn.Linear, nn.Embedding))
    assert [n for n, _ in packed.named_parameters()] == ["gate_up_proj", "down_proj"]
    assert {p.dtype for p in packed.parameters()} == {torch.uint8} and "int4, int8" in repr(packed)
    with torch.no_grad():
        other.gate_up_proj.zero_()
    other.load_state_dict(packed.state_dict())
    twin = copy.deepcopy(packed)
    x, index, weights = routed(packed)
    for module in (other, twin):
        assert torch.equal(module(x, index, weights), packed(x, index, weights))
    assert twin.down_proj.data_ptr() != packed.down_proj.data_ptr()


@pytest.mark.parametrize("cast", [lambda m: m.half(), lambda m: m.to(torch.bfloat16), lambda m: m.double()])
def test_a_cast_is_rejected_before_anything_changes(cast):
    packed, _ = pair()
    with pytest.raises(UnsupportedRequestError, match="packed as int4, int8"):
        cast(packed)
    assert packed.to("cpu") is packed and packed.float() is packed


def test_every_format_is_supported():
    for name in FORMATS:
        made = PackedExperts(2, 256, 512, name, name, act_fn=nn.SiLU(), dtype=torch.float32)
        assert made.gate_up.shape == (4, 512, 256) and made.down.shape == (2, 256, 512)
