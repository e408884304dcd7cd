"""Embedding models of sentence-transformers that are decoders, saved without a language model head (Qwen3-Embedding)."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from transformers import AutoModel

from deepseek_optimizer import CheckpointError, load_model, load_tokenizer
from deepseek_optimizer.checkpoint.sentence_transformers import read_embedding_settings
from deepseek_optimizer.engine.pooling import Pooling
from deepseek_optimizer.engine.request import Request
from deepseek_optimizer.integration.load.pack_checkpoint import pack_checkpoint
from deepseek_optimizer.serving import make_engine
from support.saved_llama import saved_llama

IDS = [5, 60, 7, 99, 12]


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def folder(tmp_path_factory, byte_tokenizer, request):
    path = tmp_path_factory.mktemp("headless")
    AutoModel.from_pretrained(saved_llama(path / "whole", byte_tokenizer, tie_word_embeddings=request.param)).save_pretrained(
        path
    )
    byte_tokenizer.save_pretrained(path)
    return path


def add_modules(path):
    (path / "modules.json").write_text(
        json.dumps([{"type": "x.Transformer", "path": ""}, {"type": "x.Pooling", "path": "1_Pooling"}])
    )
    (path / "1_Pooling").mkdir(exist_ok=True)
    (path / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_lasttoken": True}))


def test_hidden_states(folder, tmp_path):
    with pytest.raises(CheckpointError):
        load_model(folder)
    add_modules(folder)
    expected = AutoModel.from_pretrained(folder)(torch.tensor([IDS])).last_hidden_state[0, -1].detach().numpy()
    pack_checkpoint(folder, tmp_path / "packed", {"precision": "fp32"}, tokenizer=load_tokenizer(folder))
    for path in (folder, tmp_path / "packed"):
        modes = read_embedding_settings(path).pooling
        assert modes == ("lasttoken",)
        engine = make_engine(load_model(path, precision="fp32", kv_cache_memory=1 << 22))
        (answer,) = engine.generate([Request(IDS, embed=True, pooling=Pooling(modes))])
        np.testing.assert_allclose(answer.embedding, expected, atol=1e-4)
