"""PagedCache over latents: the same content as Transformers' cache of latent attention, and its size."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import DeepseekV2Config, DynamicCache

from deepseek_optimizer import PagedCache
from deepseek_optimizer.backends.cpu import unavailable_reason
from deepseek_optimizer.backends.reference import ReferenceBackend
from deepseek_optimizer.integration.compat import cache_name
from deepseek_optimizer.models import build_graph
from support.models import NATIVE_FAMILIES

from .conftest import make_pair

CASES_OF_LATENTS = ["deepseek_v2-groups", "deepseek_v3-groups", "deepseek_v32-indexer", "youtu-tied"]


@pytest.fixture(scope="module", params=CASES_OF_LATENTS)
def pair(request):
    """Shared; do not modify it."""
    return make_pair(request.param)


def filled(pair, *lengths):
    """A cache of rows of these lengths, padded on the left, and a Transformers cache."""
    ids, mask = pair.ids(*lengths), pair.mask(*lengths)
    paged, dynamic = PagedCache(pair.fast), DynamicCache(config=pair.plain.config)
    with torch.no_grad():
        pair.fast(ids, attention_mask=mask, cache=paged)
        pair.plain(ids, attention_mask=mask, **{cache_name(): dynamic})
    return paged, dynamic, mask.bool()


@pytest.mark.parametrize("lengths", [(40, 40), (40, 3, 33)])
def test_layers_equal_transformers_cache(pair, lengths):
    paged, dynamic, mask = filled(pair, *lengths)
    assert len(paged.layers) == len(dynamic.layers) == 3
    for ours, theirs in zip(paged.layers, dynamic.layers, strict=True):
        for actual, expected in ((ours.keys, theirs.keys), (ours.values, theirs.values)):
            assert actual.shape == expected.shape
            torch.testing.assert_close(actual[:, 0][mask], expected[:, 0][mask], atol=1e-4, rtol=1e-3)
            assert not actual[:, 0][~mask].any()
    assert paged.layers[0].keys.shape[-1] == pair.plain.config.kv_lora_rank
    assert paged.layers[0].values.shape[-1] == pair.plain.config.qk_rope_head_dim


@pytest.mark.parametrize("change", [lambda c: c.crop(-7), lambda c: c.reorder_cache(torch.tensor([1, 1])), copy.deepcopy])
def test_continuing_after_a_change_equals_transformers(pair, change):
    paged, dynamic, _ = filled(pair, 40, 40)
    paged, dynamic = change(paged) or paged, change(dynamic) or dynamic
    ids = pair.ids(3, 3, seed=5)
    with torch.no_grad():
        actual, expected = pair.fast(ids, cache=paged).logits, pair.plain(ids, **{cache_name(): dynamic}).logits
    torch.testing.assert_close(actual, expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 3}])
def test_generate_caches_the_same_as_transformers(pair, options):
    ids = pair.ids(20)
    settings = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0, **options}
    assert torch.equal(pair.fast.generate(ids, **settings), pair.plain.generate(ids, **settings))


def lite() -> DeepseekV2Config:
    """DeepSeek-V2-Lite without weights."""
    return DeepseekV2Config(
        num_hidden_layers=27, hidden_size=2048, intermediate_size=10944, moe_intermediate_size=1408, n_routed_experts=64,
        n_shared_experts=2, num_experts_per_tok=6, first_k_dense_replace=1, num_attention_heads=16, num_key_value_heads=16,
        q_lora_rank=None, kv_lora_rank=512, qk_rope_head_dim=64, qk_nope_head_dim=128, v_head_dim=128, vocab_size=102400,
    )  # fmt: skip


@pytest.mark.parametrize(("kind", "bytes_a_token"), [("bf16", 31_104), ("fp32", 62_208)])
def test_the_size_of_a_v2_lite_token_follows_the_formula(kind, bytes_a_token):
    """27 layers of 512 + 64 elements."""
    graph = build_graph(lite())
    assert ReferenceBackend().block_bytes(graph, kind) == 32 * bytes_a_token
    if unavailable_reason() is None and "deepseek_v2" in NATIVE_FAMILIES:
        from deepseek_optimizer.backends.cpu import CpuBackend

        assert CpuBackend().block_bytes(graph, kind) == 32 * bytes_a_token
