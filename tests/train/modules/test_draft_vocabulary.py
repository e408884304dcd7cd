"""Draft vocabularies: the most frequent tokens of the data, rows of the model's head, and a round trip through a checkpoint."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from safetensors.torch import load_file

from deepseek_optimizer import load_model
from deepseek_optimizer.errors import ConfigError
from deepseek_optimizer.train.modules.draft_layer import add_draft_layer, sketch_draft_layer
from deepseek_optimizer.train.modules.draft_vocabulary import DEFAULT, frequent_tokens, vocabulary_to_add
from deepseek_optimizer.train.modules.mtp import add_trained_layers
from support.family_configs import deepseek_v3, llama
from support.models import random_ids, random_model

V = 211


def data(seed, labels=True):
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(7):
        ids = (torch.rand(31, generator=generator) ** 3 * 90).long()
        wanted = ids.masked_fill(torch.rand(31, generator=generator) < 0.4, -100)
        rows.append({"input_ids": ids, "labels": wanted} if labels else {"input_ids": ids})
    return rows


@pytest.mark.parametrize("size", [1, 20, 75, V - 1])
@pytest.mark.parametrize("labels", [True, False])
def test_frequent_tokens(size, labels):
    for seed in range(5):
        rows = data(seed, labels)
        texts = Counter(t for row in rows for t in row["input_ids"].tolist())
        wanted = Counter(t for row in rows for t in row["labels"].tolist() if t != -100) if labels else texts
        order = sorted(range(V), key=lambda t: (-wanted[t], -texts[t], t))
        assert frequent_tokens(rows, size, V).tolist() == sorted(order[:size])


@pytest.mark.parametrize("family", [lambda: llama(tie_word_embeddings=True), lambda: deepseek_v3(num_nextn_predict_layers=2)])
def test_heads_have_the_rows_of_the_models(family):
    model, rows = random_model(family()), data(0)
    add_draft_layer(model, 30, rows)
    tokens = frequent_tokens(rows, 30, V)
    assert model.config.draft_vocab_size == 30
    layers = model.model.layers[model.config.num_hidden_layers :]
    for layer in layers:
        assert torch.equal(layer.shared_head.tokens, tokens)
        assert torch.equal(layer.shared_head.head.weight, model.lm_head.weight[tokens])
        assert not layer.shared_head.head.weight.requires_grad and layer.eh_proj.weight.requires_grad
    with torch.device("meta"):
        planned = type(model)(family())
    sketch_draft_layer(planned, 30)
    shapes = {name: p.shape for name, p in planned.named_parameters() if p.requires_grad}
    assert shapes == {name: p.shape for name, p in model.named_parameters() if p.requires_grad}


def test_a_model_with_a_draft_vocabulary_is_saved_and_trained_further(tmp_path):
    model, rows = random_model(llama(tie_word_embeddings=True)), data(0)
    add_draft_layer(model, 30, rows)
    model.save_pretrained(tmp_path / "drafts")
    stored = load_file(tmp_path / "drafts" / "model.safetensors")
    assert stored["model.layers.3.shared_head.head.weight"].shape == (30, 72)
    loaded = load_model(tmp_path / "drafts", backend="reference")
    assert loaded.dso.draft_vocabularies[0].tokens.tolist() == frequent_tokens(rows, 30, V).tolist()
    ids = torch.tensor([random_ids(model.config, 9)])
    options = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": None}
    assert torch.equal(loaded.generate(ids, use_mtp=True, **options), loaded.generate(ids, **options))

    again = type(model).from_pretrained(tmp_path / "drafts")
    with pytest.raises(ConfigError, match="draft_vocabulary=40: the checkpoint's layer drafts from 30 tokens"):
        add_draft_layer(again, 40, rows)
    again = type(model).from_pretrained(tmp_path / "drafts")
    notes, new = add_draft_layer(again, None, rows)
    assert not new and "read from" in notes[0]
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_new_layers_of_a_model_that_has_lost_its_own_have_whole_heads(tmp_path):
    model = random_model(llama(num_nextn_predict_layers=1, draft_vocab_size=30))
    model.save_pretrained(tmp_path / "lost")  # Transformers knows nothing of the layer
    again = type(model).from_pretrained(tmp_path / "lost")
    add_trained_layers(again)
    assert again.config.draft_vocab_size is None and not hasattr(again.model.layers[3].shared_head, "head")


def test_which_vocabulary_is_added():
    model = random_model(llama(num_nextn_predict_layers=1))
    assert [vocabulary_to_add(model, size, new=True) for size in (None, 0, 5, V, V + 1)] == [None, None, 5, None, None]
    model.config.vocab_size = 4 * DEFAULT
    assert vocabulary_to_add(model, None, new=True) == DEFAULT
    assert vocabulary_to_add(model, None, new=False) is vocabulary_to_add(model, 0, new=True) is None


def test_data_without_a_length():
    with pytest.raises(ConfigError, match="draft_vocabulary=9 counts the tokens of the training data, which has no length"):
        add_draft_layer(random_model(llama()), 9, iter(data(0)))
