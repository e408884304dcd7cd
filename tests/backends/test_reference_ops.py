"""The reference backend's ops against their formulas in float64 or complex numbers."""

from __future__ import annotations

import pytest
import torch
from transformers.masking_utils import chunked_overlay
from transformers.models.mistral4.modeling_mistral4 import get_llama_4_attn_scale

from deepseek_optimizer.backends.reference import ops, plan, ranks
from deepseek_optimizer.graph.ops import OPS


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_every_op_is_implemented() -> None:
    computed = set(plan._OPS) | set(ranks.FUNCTIONS)
    assert computed == {name for name, spec in OPS.items() if spec.origin != "lowering"}


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rot", [2, 6, 8])
def test_rope_is_a_complex_rotation(rot: int, interleaved: bool) -> None:
    heads, head_dim, positions = 3, 8, torch.tensor([0, 1, 7, 1000])
    inv_freq = 100.0 ** -(torch.arange(0, rot, 2).float() / rot)
    x = randn(4, heads * head_dim)
    y = ops.rope(x, ops.rope_table(positions, inv_freq, 1.5), heads, interleaved).view(4, heads, head_dim)
    turning = x.view(4, heads, head_dim)[..., :rot].double()
    pairs = turning.unflatten(-1, (-1, 2)) if interleaved else turning.unflatten(-1, (2, -1)).transpose(-1, -2)
    angle = positions[:, None, None].double() * inv_freq.double()
    turned = torch.view_as_complex(pairs.contiguous()) * torch.polar(torch.full_like(angle, 1.5), angle)
    expected = torch.view_as_real(turned)
    expected = expected.flatten(-2) if interleaved else expected.transpose(-1, -2).flatten(-2)
    torch.testing.assert_close(y[..., :rot].double(), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(y[..., rot:], x.view(4, heads, head_dim)[..., rot:])


def test_norms() -> None:
    x, weight = randn(5, 24), randn(8, seed=1)
    heads = x.double().view(5, 3, 8)
    expected = heads / (heads.square().mean(-1, keepdim=True) + 1e-3).sqrt() * weight.double()
    torch.testing.assert_close(ops.head_norm(x, weight, 1e-3, 3).double(), expected.flatten(1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ops.rms_norm(x[:, :8], weight, 1e-3).double(), expected[:, 0], rtol=1e-5, atol=1e-6)
    without = ops.head_norm(x, None, 1e-3, 3).double()
    torch.testing.assert_close(without, (expected / weight.double()).flatten(1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("window", [0, 1, 5, 40])
@pytest.mark.parametrize(("queries", "context"), [(1, 0), (1, 70), (33, 0), (20, 45)])
@pytest.mark.parametrize("attend", [ops.attention, ops.attention_online])
def test_attention(attend: object, queries: int, context: int, window: int) -> None:
    keys, kv_heads, group, head_dim = queries + context, 2, 3, 8
    q, k, v = (
        randn(queries, kv_heads, group, head_dim),
        randn(keys, kv_heads, head_dim, seed=1),
        randn(keys, kv_heads, head_dim),
    )
    mask = ops.visible(queries, context, torch.arange(keys), window)
    actual = attend(q, k, v, mask, 2.0)  # type: ignore[operator]
    for i in range(queries):
        last = context + i
        first = max(0, last + 1 - window) if window else 0
        seen = slice(first, last + 1)
        for h in range(kv_heads):
            weight = torch.softmax(2.0 * q[i, h].double() @ k[seen, h].double().T, -1)
            torch.testing.assert_close(actual[i, h].double(), weight @ v[seen, h].double(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("window", [1, 5, 40])
def test_chunks_are_those_of_transformers(window: int) -> None:
    seen = chunked_overlay(window, torch.zeros(1, dtype=torch.int64))
    queries, keys = torch.arange(45, 65)[:, None], torch.arange(65)
    expected = seen(0, 0, queries, keys) & (keys <= queries)
    assert torch.equal(ops.visible(20, 45, keys, window, chunked=True), expected)


def test_large_scores_do_not_overflow() -> None:
    q, k, v = 100 * randn(4, 1, 1, 8), 100 * randn(64, 1, 8), randn(64, 1, 8)
    mask = ops.visible(4, 60, torch.arange(64))
    online = ops.attention_online(q, k, v, mask, 1.0)
    assert online.isfinite().all()
    torch.testing.assert_close(online, ops.attention(q, k, v, mask, 1.0))


def test_position_scale_is_transformers() -> None:
    """At positions around those where the factor changes."""
    positions = torch.tensor([0, 1, 6, 7, 8, 13, 14, 700, 2**20 * 7 - 1, 2**20 * 7])
    x = randn(len(positions), 5)
    expected = x * get_llama_4_attn_scale(positions[None], 0.4, 7)[0, 0]
    torch.testing.assert_close(ops.position_scale(x, positions, 0.4, 7), expected, rtol=1e-6, atol=0)
    llama4 = torch.log1p(torch.floor((positions.float() + 1.0) / 7)) * 0.4 + 1.0  # Llama4TextAttention.forward
    torch.testing.assert_close(ops.position_scale(x, positions, 0.4, 7, offset=1), x * llama4[:, None], rtol=1e-6, atol=0)


def test_relu() -> None:
    x = torch.cat((3 * randn(70), torch.tensor([0.0, -0.0, 30.0, -30.0, torch.nan])))
    assert torch.equal(ops.relu(x).nan_to_num(7.0), torch.where(x < 0, 0.0, x).nan_to_num(7.0))


def test_swiglu() -> None:
    gate, up = randn(3, 7), randn(3, 7, seed=1)
    wide = gate.double()
    torch.testing.assert_close(ops.swiglu(gate, up).double(), wide / (1 + (-wide).exp()) * up.double(), rtol=1e-5, atol=1e-6)
