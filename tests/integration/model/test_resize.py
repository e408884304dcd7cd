"""`resize_token_embeddings` of an optimized model: as in Transformers, and packed again."""

from __future__ import annotations

import pytest
import torch

from deepseek_optimizer import DeepSeekConfig, DynamicGraphOptimizer, UnsupportedRequestError, load_model
from support.models import CASES, assert_close_rows, random_model


def resized(pair, tokens, **options):
    """Both models resized to this many tokens, with the same random values for new ones."""
    for model in (pair.plain, pair.fast):
        torch.manual_seed(0)
        model.resize_token_embeddings(tokens, **options)
    return pair


@pytest.mark.parametrize("tokens", [300, 100, 128])
@torch.no_grad()
def test_logits_equal_transformers_after_a_resize(fresh_pair, tokens):
    pair = resized(fresh_pair, tokens)
    ids = torch.tensor([[5, tokens - 1, 7]])
    fast, plain = pair.fast(ids).logits, pair.plain(ids).logits
    assert fast.shape == (1, 3, tokens)
    assert_close_rows(fast, plain)
    fast, plain = (model.generate(ids, max_new_tokens=4, do_sample=False).tolist() for model in (pair.fast, pair.plain))
    assert fast == plain


@pytest.mark.parametrize("tokens", [300, 100])
@torch.no_grad()
def test_embeddings_per_layer_follow(tokens):
    """Gemma 4's second table is resized too."""
    plain, fast = (random_model(CASES["gemma4_text-shared"]()) for _ in range(2))
    DynamicGraphOptimizer(fast, config=DeepSeekConfig(precision="fp32")).optimize()
    for model in (plain, fast):
        torch.manual_seed(0)
        model.resize_token_embeddings(tokens)
    ids = torch.tensor([[5, tokens - 1, 7]])
    assert fast.config.vocab_size_per_layer_input == plain.config.vocab_size_per_layer_input
    assert fast(ids).logits.shape == (1, 3, tokens)
    assert_close_rows(fast(ids).logits, plain(ids).logits)


@torch.no_grad()
def test_a_tied_head_follows():
    model = random_model(CASES["llama-tied"]())
    fast = DynamicGraphOptimizer(model, config=DeepSeekConfig(precision="fp32")).optimize()
    fast.resize_token_embeddings(200)
    assert fast.lm_head.weight is fast.model.embed_tokens.weight
    assert fast(torch.tensor([[199]])).logits.shape[-1] == 200


def test_a_padded_size_is_a_multiple(fresh_pair):
    assert fresh_pair.fast.resize_token_embeddings(130, pad_to_multiple_of=64).num_embeddings == 192
    assert fresh_pair.fast.config.vocab_size == 192


def test_without_a_size_the_embedding_is_returned(fresh_pair):
    assert fresh_pair.fast.resize_token_embeddings() is fresh_pair.fast.model.embed_tokens


@torch.no_grad()
def test_a_resized_model_is_saved_and_loaded(fresh_pair, tmp_path):
    pair = resized(fresh_pair, 150)
    pair.fast.save_pretrained(tmp_path)
    ids = torch.tensor([[149, 3]])
    assert torch.equal(load_model(tmp_path)(ids).logits, pair.fast(ids).logits)


@torch.no_grad()
def test_an_error_does_not_change_the_model(fresh_pair):
    ids = fresh_pair.ids(6)
    before = fresh_pair.fast(ids).logits
    with pytest.raises(ValueError, match="multiple"):
        fresh_pair.fast.resize_token_embeddings(130, pad_to_multiple_of=1.5)
    assert torch.equal(fresh_pair.fast(ids).logits, before)


def test_quantized_weights_are_rejected():
    model = random_model(CASES["llama-gqa"]())
    DynamicGraphOptimizer(model, config=DeepSeekConfig(precision="int8", backend="reference")).optimize()
    with pytest.raises(UnsupportedRequestError, match="int8.*float model"):
        model.resize_token_embeddings(300)
