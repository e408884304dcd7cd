"""A small random model with a context of a few pages, and a byte tokenizer."""

from __future__ import annotations

import pytest

from support.saved_llama import saved_llama


@pytest.fixture(scope="session")
def paged_model(tmp_path_factory, byte_tokenizer):
    """A saved Llama of two small layers and 2,048 positions that never ends a text. Treat it as read-only."""
    folder = tmp_path_factory.mktemp("paged") / "model"
    return saved_llama(folder, byte_tokenizer, max_position_embeddings=2048, eos_token_id=None)


@pytest.fixture(scope="session")
def loaded(paged_model, byte_tokenizer):
    """The optimized model and its tokenizer, shared by tests; do not modify them."""
    from deepseek_optimizer import load_model

    return load_model(paged_model), byte_tokenizer
