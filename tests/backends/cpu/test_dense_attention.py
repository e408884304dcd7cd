"""Attention over ordinary tensors against float64 arithmetic, over random shapes, layouts and masks."""

from __future__ import annotations

import pytest
import torch

from deepseek_optimizer.backends.cpu import native, unavailable_reason
from deepseek_optimizer.backends.cpu.dense_attention import attend
from deepseek_optimizer.backends.cpu.native import shared_context

pytestmark = pytest.mark.skipif(unavailable_reason() is not None, reason="needs the native library")


def reference(q, k, v, scale, mask, causal=False):
    """softmax(scale q k^T + mask) v in float64; zeros where all keys are hidden."""
    group = q.shape[1] // k.shape[1]
    q, k, v = q.double(), k.double().repeat_interleave(group, 1), v.double().repeat_interleave(group, 1)
    scores = scale * q @ k.transpose(-1, -2)
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril(scores.shape[-1] - scores.shape[-2])
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.double()
    return torch.softmax(scores, -1).nan_to_num(0.0) @ v


def split(x, layout):
    """The values of x [B, H, T, D] in another memory layout."""
    if layout == "tokens":  # [B, T, H, D], as projections write them
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "reserved":  # room for more tokens, as in a static cache
        return torch.cat([x, torch.full_like(x, torch.nan)], 2)[:, :, : x.shape[2]]
    return x


def mask_of(kind, shape, dtype, generator):
    batch, heads, queries, keys = shape
    if kind in ("none", "causal"):
        return None
    hidden = torch.rand(batch, 1, queries, keys, generator=generator) < 0.3
    if kind == "bool":
        hidden[0, 0, 0] = True  # a query that sees nothing
        return ~hidden
    bias = torch.randn(1, heads, queries, keys, generator=generator).to(dtype)
    bias = bias.masked_fill(hidden & (torch.arange(keys) > 0), torch.finfo(dtype).min)
    bias[0, 0, 0] = torch.finfo(dtype).min  # a query that sees all keys equally
    bias[0, 0, -1] = bias[0, 0, -1] if queries == 1 else -torch.inf
    return bias


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mask", ["none", "bool", "numbers", "causal"])
@pytest.mark.parametrize("seed", range(8))
def test_equals_float64(isa, dtype, mask, seed):
    generator = torch.Generator().manual_seed(seed)

    def one_of(*values):
        return values[int(torch.randint(len(values), (), generator=generator))]

    batch, kv_heads, group, queries = one_of(1, 2, 3), one_of(1, 2, 5), one_of(1, 3, 4), one_of(1, 2, 7, 9, 33, 64, 65, 150)
    keys, width, v_width = (
        one_of(1, 3, 15, 16, 17, 33, 130, 1000),
        one_of(1, 8, 20, 64, 72, 128),
        one_of(1, 16, 20, 64, 80, 144),
    )

    keys += queries if mask == "causal" else 0

    def random(*shape):
        return split(torch.randn(*shape, generator=generator).to(dtype), one_of("heads", "tokens", "reserved"))

    q, k = random(batch, kv_heads * group, queries, width), random(batch, kv_heads, keys, width)
    v = random(batch, kv_heads, keys, v_width)
    given = mask_of(mask, (batch, kv_heads * group, queries, keys), dtype, generator)
    scale = one_of(1.0, width**-0.5, -0.3)
    causal = mask == "causal"
    out = attend(shared_context(isa, 2), q, k, v, scale, given, causal=causal)
    expected = reference(q, k, v, scale, given, causal)
    assert out.dtype == dtype and out.shape == expected.shape
    bound = 2e-5 if dtype == torch.float32 else 2**-8
    assert (out.double() - expected).abs().max() <= bound * max(1.0, float(expected.abs().max()))


def test_the_default_context_is_found_without_reading_limits_again(monkeypatch):
    """Operations of training ask for it at each call."""
    first = shared_context(None, None)
    monkeypatch.setattr(native, "library", lambda: pytest.fail("the library was called"))
    assert shared_context(None, None) is first


@pytest.mark.parametrize("queries", [8, 9, 150])
def test_rounded_products(isa, queries):
    """Products of fp32 tensors in bf16 have its errors, and only with many queries."""
    q, k, v = (torch.randn(2, 3, n, 40, generator=torch.Generator().manual_seed(n)) for n in (queries, 130, 131))
    context, v = shared_context(isa, 2), v[:, :, :130]
    exact, rounded = (attend(context, q, k, v, 0.2, rounded=kind) for kind in (False, True))
    error = float((rounded - exact).abs().max())
    assert error <= 2**-6 * float(exact.abs().max())
    assert (error > 1e-4) is (queries > 8 and context.isa in ("avx512-bf16", "amx", "amx-emulated", "neon-i8mm"))


@pytest.mark.parametrize("queries", [1, 100])
def test_is_the_same_for_any_number_of_threads(queries):
    q, k, v = torch.randn(3, 6, queries, 64), torch.randn(3, 2, 300, 64), torch.randn(3, 2, 300, 64)
    results = [attend(shared_context(None, threads), q, k, v, 0.125) for threads in (1, 2, 3)]
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"k": torch.zeros(1, 2, 5, 16, dtype=torch.bfloat16)}, "k must be"),
        ({"k": torch.zeros(1, 2, 4, 16)}, "k must be"),
        ({"v": torch.zeros(1, 3, 5, 16)}, "k must be"),
        ({"v": torch.zeros(2, 2, 5, 16)}, "v must be"),
        ({"q": torch.zeros(1, 4, 1, 32)[..., ::2]}, "q must be dense rows"),
        ({"mask": torch.zeros(1, 1, 1, 5, dtype=torch.float64)}, "mask must be"),
    ],
)
def test_refuses_what_it_cannot_read(changed, message):
    given = {
        "q": torch.zeros(1, 4, 1, 16),
        "k": torch.zeros(1, 2, 5, 16),
        "v": torch.zeros(1, 2, 5, 16),
        "mask": None,
    } | changed
    with pytest.raises(ValueError, match=message):
        attend(shared_context(None, 2), given["q"], given["k"], given["v"], 1.0, given["mask"])


def test_refuses_heads_that_do_not_divide():
    q, kv = torch.zeros(1, 3, 1, 16), torch.zeros(1, 2, 5, 16)
    with pytest.raises(ValueError, match="3 heads cannot share 2 kv heads"):
        attend(shared_context(None, 2), q, kv, kv, 1.0)


def test_refuses_fewer_keys_than_queries_with_a_causal_mask():
    q, kv = torch.zeros(1, 2, 6, 16), torch.zeros(1, 2, 5, 16)
    with pytest.raises(ValueError, match="at least as many keys as queries, got 5 and 6"):
        attend(shared_context(None, 2), q, kv, kv, 1.0, causal=True)
