"""A small random model with room for a few pages, and its tokenizer of bytes."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def paged_model(tmp_path_factory, byte_tokenizer):
    """A saved Llama of two small layers and 2,048 positions; it never ends a text by itself. Treat it as read-only."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(byte_tokenizer),
        max_position_embeddings=2048,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=byte_tokenizer.pad_token_id,
        tie_word_embeddings=True,
    )
    folder = tmp_path_factory.mktemp("paged") / "model"
    LlamaForCausalLM(config).save_pretrained(folder)
    byte_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def loaded(paged_model, byte_tokenizer):
    """The optimised model and its tokenizer, shared: leave them as they are."""
    from deepseek_optimizer import load_model

    return load_model(paged_model), byte_tokenizer
