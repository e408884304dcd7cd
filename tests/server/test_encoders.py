"""The server over encoders: embeddings, cross-encoders and classifiers equal Transformers' own; nothing generates."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from deepseek_optimizer import load_model
from deepseek_optimizer.checkpoint.sentence_transformers import EmbeddingSettings
from deepseek_optimizer.server.settings import ServerSettings
from deepseek_optimizer.serving import make_async_engine
from support.encoders import random_encoder
from support.live_server import LiveServer, assert_error

TEXTS = ["short", "a longer text than that one", "c"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory, byte_tokenizer):
    """saved(case, head, **fields) -> folder."""

    def save(case, head="Model", **fields):
        folder = tmp_path_factory.mktemp(case)
        random_encoder(case, head, vocab_size=len(byte_tokenizer), **fields).save_pretrained(folder)
        byte_tokenizer.save_pretrained(folder)
        return folder

    return save


def start(folder, settings=None, **options) -> LiveServer:
    model = load_model(folder, precision="fp32")
    engine = make_async_engine(model, AutoTokenizer.from_pretrained(folder), model_name="encoder", **options)
    return LiveServer(engine, settings)


@pytest.fixture(scope="module")
def bert(saved):
    folder = saved("bert")
    with start(folder, ServerSettings(embedding=EmbeddingSettings(pooling=("cls",)))) as live:
        yield folder, live


@pytest.fixture(scope="module")
def cross(saved):
    folder = saved("bert", "ForSequenceClassification", num_labels=1)
    with start(folder) as live:
        yield folder, live


def ok(live, path, **body):
    result = live.client.post(path, json=body)
    assert result.status_code == 200, result.text
    return result.json()


def expected_states(folder, text):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        return AutoModel.from_pretrained(folder).eval()(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]


def test_embeddings(bert):
    folder, live = bert
    body = ok(live, "/v1/embeddings", input=TEXTS)
    for text, entry in zip(TEXTS, body["data"], strict=True):
        cls = expected_states(folder, text)[0]
        np.testing.assert_allclose(entry["embedding"], (cls / cls.norm()).numpy(), atol=1e-5)
    assert body["usage"]["prompt_tokens"] == sum(map(len, TEXTS))


def test_batches_do_not_change_embeddings(bert):
    _, live = bert
    texts = [f"text number {i} " * (i % 5 + 1) for i in range(60)]
    alone = [ok(live, "/v1/embeddings", input=text)["data"][0]["embedding"] for text in texts[:6]]
    with ThreadPoolExecutor(8) as pool:
        bodies = list(pool.map(lambda i: ok(live, "/v1/embeddings", input=texts[i:] + texts[:i]), range(8)))
    for i, body in enumerate(bodies):
        for j in range(6):
            assert body["data"][(j - i) % len(texts)]["embedding"] == alone[j]


@pytest.mark.parametrize("path,body", [
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]}), ("/v1/completions", {"prompt": "hi"}),
    ("/v1/responses", {"input": "hi"}),
])  # fmt: skip
def test_nothing_generates(bert, path, body):
    _, live = bert
    result = live.client.post(path, json=body)
    assert_error(result, 404, "model")
    assert "is an encoder" in result.text and "/v1/embeddings" in result.text
    assert path not in live.client.get("/openapi.json").json()["paths"]


def test_the_rest_of_the_server(bert):
    _, live = bert
    assert live.client.get("/ready").json() == {"status": "ok"}
    assert ok(live, "/tokenize", prompt="abc")["count"] == 3
    assert live.client.get("/v1/models").json()["data"][0]["max_model_len"] == 700
    metrics = live.client.get("/metrics").text
    assert 'vllm:prompt_tokens_total{model_name="encoder"}' in metrics and "kv_cache" not in metrics
    assert_error(live.client.post("/v1/embeddings", json={"input": "x" * 701}), 400, "input")
    assert_error(live.client.post("/v1/embeddings", json={"input": [10**6]}), 400, "prompt")
    assert ok(live, "/v1/embeddings", input="x" * 701, truncate_prompt_tokens=-1)["usage"]["prompt_tokens"] == 700
    assert_error(live.client.post("/classify", json={"input": "x"}), 400, "model")


def test_cosines_of_an_encoder(bert):
    folder, live = bert
    cls = [expected_states(folder, text)[0] for text in TEXTS]
    scores = [entry["score"] for entry in ok(live, "/score", text_1=TEXTS[0], text_2=TEXTS)["data"]]
    expected = [torch.cosine_similarity(cls[0], other, 0).item() for other in cls]
    assert scores == pytest.approx(expected, abs=1e-5)


def pair_logits(folder, pairs):
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        return torch.cat([model(**tokenizer(*pair, return_tensors="pt")).logits for pair in pairs])


def test_cross_encoder(cross):
    folder, live = cross
    logits = pair_logits(folder, [(TEXTS[1], text) for text in TEXTS])[:, 0]
    raw = ok(live, "/score", text_1=TEXTS[1], text_2=TEXTS, use_activation=False)
    assert [entry["score"] for entry in raw["data"]] == pytest.approx(logits.tolist(), abs=1e-4)
    results = ok(live, "/rerank", query=TEXTS[1], documents=TEXTS)["results"]
    probabilities = torch.sigmoid(logits).tolist()
    assert [result["index"] for result in results] == sorted(range(3), key=lambda i: -probabilities[i])
    assert {r["index"]: r["relevance_score"] for r in results} == pytest.approx(dict(enumerate(probabilities)), abs=1e-4)
    assert ok(live, "/rerank", query=TEXTS[1], texts=TEXTS, raw_scores=True)[0]["score"] == pytest.approx(
        max(logits).item(), abs=1e-4
    )


def test_one_class_is_a_probability(cross):
    folder, live = cross
    (entry,) = ok(live, "/classify", input=TEXTS[1])["data"]
    logit = pair_logits(folder, [(TEXTS[1],)])[0, 0]
    assert entry["probs"] == pytest.approx([torch.sigmoid(logit).item()], abs=1e-4) and entry["num_classes"] == 1


@pytest.mark.parametrize("case", ["roberta", "modernbert", "distilbert"])
def test_classes(saved, case):
    labels = {0: "bad", 1: "so-so", 2: "good"}
    folder = saved(case, "ForSequenceClassification", num_labels=3, id2label=labels, label2id={v: k for k, v in labels.items()})
    with start(folder) as live:
        body = ok(live, "/classify", input=TEXTS)
        logits = pair_logits(folder, [(text,) for text in TEXTS])
        for entry, expected in zip(body["data"], torch.softmax(logits, -1), strict=True):
            assert entry["probs"] == pytest.approx(expected.tolist(), abs=1e-4)
            assert entry["label"] == labels[int(expected.argmax())] and entry["num_classes"] == 3
        raw = ok(live, "/pooling", input=TEXTS, use_activation=False)["data"]
        assert [entry["data"] for entry in raw] == [pytest.approx(row, abs=1e-4) for row in logits.tolist()]
        assert_error(live.client.post("/rerank", json={"query": "a", "documents": ["b"]}), 400, "model")
        limit = 698 if case == "roberta" else 700  # RoBERTa's positions begin after that of padding
        assert live.engine.context == limit
        assert ok(live, "/classify", input="x" * 1000, truncate_prompt_tokens=-1)["usage"]["prompt_tokens"] == limit


def test_an_encoder_without_a_plan(saved, byte_tokenizer, tmp_path):
    from transformers import ElectraConfig, ElectraModel

    torch.manual_seed(0)
    config = ElectraConfig(
        vocab_size=len(byte_tokenizer), embedding_size=32, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=100,
    )  # fmt: skip
    ElectraModel(config).save_pretrained(tmp_path)
    byte_tokenizer.save_pretrained(tmp_path)
    with start(tmp_path, max_tokens=50) as live:
        body = ok(live, "/v1/embeddings", input=TEXTS)
        for text, entry in zip(TEXTS, body["data"], strict=True):
            mean = expected_states(tmp_path, text).mean(0)
            np.testing.assert_allclose(entry["embedding"], (mean / mean.norm()).numpy(), atol=1e-4)
        assert live.engine.context == 50
