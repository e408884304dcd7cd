"""Rerank, score, classify and pooling over an engine without a model, whose embeddings depend on the sum of a text's tokens."""

from __future__ import annotations

import math

import pytest

from deepseek_optimizer.checkpoint.sentence_transformers import EmbeddingSettings
from deepseek_optimizer.server.settings import ServerSettings
from support.live_server import assert_error

DOCUMENTS = ["far far away", "b", "query"]


def ok(client, path, **body):
    result = client.post(path, json=body)
    assert result.status_code == 200, result.text
    return result.json()


@pytest.mark.parametrize("path", ["/rerank", "/v1/rerank", "/v2/rerank"])
def test_rerank(client, path):
    body = ok(client, path, query="query", documents=DOCUMENTS)
    scores = [result["relevance_score"] for result in body["results"]]
    assert scores == sorted(scores, reverse=True) and scores[0] == pytest.approx(1)
    assert body["results"][0]["index"] == 2 and body["results"][0]["document"] == {"text": "query"}
    assert body["usage"]["prompt_tokens"] == body["usage"]["total_tokens"] == sum(map(len, ["query", *DOCUMENTS]))
    assert body["model"] == "fake-model" and body["id"].startswith("rerank-")


def test_documents_as_objects_and_the_number_of_results(client):
    documents = [{"text": text} for text in DOCUMENTS]
    body = ok(client, "/rerank", query="query", documents=documents, top_n=1, return_documents=False)
    assert [set(result) for result in body["results"]] == [{"index", "relevance_score"}]
    for top_n, count in ((0, 3), (2, 2), (99, 3), (None, 3)):
        assert len(ok(client, "/rerank", query="q", documents=documents, top_n=top_n)["results"]) == count


def test_tei_format(client):
    ranked = ok(client, "/rerank", query="query", texts=DOCUMENTS, return_text=True)
    assert ranked[0] == {"index": 2, "score": pytest.approx(1), "text": "query"} and len(ranked) == 3
    assert set(ok(client, "/rerank", query="query", texts=DOCUMENTS)[0]) == {"index", "score"}


@pytest.mark.parametrize(
    "body",
    [
        {}, {"query": "q"}, {"query": "q", "documents": []}, {"query": "q", "documents": [1]}, {"query": "q", "documents": 1},
        {"query": "", "documents": ["a"]}, {"query": "q", "documents": ["a"], "texts": ["a"]},
        {"query": "q", "documents": ["a"], "top_n": -1}, {"query": "q", "documents": ["a"] * 2049},
        {"query": "q", "documents": [{"image": "x"}]},
    ],
)  # fmt: skip
def test_wrong_rerank_requests(refused, body):
    refused("/rerank", body)


@pytest.mark.parametrize("names", [("text_1", "text_2"), ("queries", "documents"), ("queries", "items"), ("data_1", "data_2")])
def test_scores_of_pairs(client, names):
    one = ok(client, "/score", **{names[0]: "a", names[1]: "a"})
    assert one["object"] == "list" and one["data"] == [{"index": 0, "object": "score", "score": pytest.approx(1)}]
    several = ok(client, "/v1/score", **{names[0]: "a", names[1]: ["a", "zzzz"]})["data"]
    assert [entry["index"] for entry in several] == [0, 1] and several[1]["score"] < several[0]["score"]
    paired = ok(client, "/score", **{names[0]: ["a", "zzzz"], names[1]: ["a", "zzzz"]})["data"]
    assert [entry["score"] for entry in paired] == pytest.approx([1, 1])


@pytest.mark.parametrize(
    "body",
    [{"text_1": "a"}, {"text_1": ["a", "b"], "text_2": ["a", "b", "c"]}, {"text_1": "a", "queries": "a", "text_2": "b"}, {}],
)
def test_wrong_score_requests(refused, body):
    refused("/score", body)


def test_models_without_a_classification_head(refused, client):
    refused("/classify", {"input": "a"}, 400, "model")
    for task in ("classify", "token_embed"):
        refused("/pooling", {"input": "a", "task": task}, 400, "task")
    body = ok(client, "/pooling", input=["a", "b"])
    assert [(entry["object"], len(entry["data"])) for entry in body["data"]] == [("pooling", 8)] * 2
    assert isinstance(ok(client, "/pooling", input="a", encoding_format="base64")["data"][0]["data"], str)


def test_long_documents(client, refused):
    refused("/rerank", {"query": "q", "documents": ["x" * 5000]}, 400)
    for fields in ({"truncate_prompt_tokens": -1}, {"max_tokens_per_doc": 10}):
        assert ok(client, "/rerank", query="q", documents=["x" * 5000], **fields)["results"]


def test_a_language_model_judges_documents(make_server, byte_tokenizer):
    refused = make_server(ServerSettings(reranker="yes-no")).client.post("/rerank", json={"query": "q", "documents": ["d"]})
    assert_error(refused, 400, "model")
    assert "--reranker cosine" in refused.text  # there is no token "yes" among the bytes
    embedding = EmbeddingSettings(score_tokens=tuple(byte_tokenizer.convert_tokens_to_ids(["y", "n"])))
    live = make_server(ServerSettings(embedding=embedding))
    results = ok(live.client, "/rerank", query="q", documents=["n", "yy <|end|>"])["results"]
    probability = {result["index"]: result["relevance_score"] for result in results}
    extra = live.engine.seen[0].prompt.count(live.engine.tokenizer.convert_tokens_to_ids("y"))
    assert probability[1] == pytest.approx(1 / (1 + math.exp(-extra - 2)), rel=1e-5) and results[0]["index"] == 1
    prompt = live.engine.tokenizer.decode(live.engine.seen[-1].prompt)
    assert prompt.startswith("<|im_start|>system\nJudge whether") and prompt.endswith("<think>\n\n</think>\n\n")
    assert "<Query>: q\n<Document>: yy <|end|><|im_end|>" in prompt
    assert live.engine.tokenizer.eos_token_id not in live.engine.seen[-1].prompt  # of the document: it is only text
    logits = ok(live.client, "/score", text_1="q", text_2="yy", use_activation=False)["data"][0]["score"]
    assert logits == pytest.approx(extra + 2)
    ok(live.client, "/rerank", query="q", documents=["d"], instruction="Find the cat")
    assert "<Instruct>: Find the cat\n" in live.engine.tokenizer.decode(live.engine.seen[-1].prompt)
    too_long = live.client.post("/rerank", json={"query": "q", "documents": ["d" * 5000]})
    assert_error(too_long, 400, "documents")
    cut = {"query": "q", "documents": ["d" * 5000], "truncate_prompt_tokens": 1000}
    ok(live.client, "/rerank", **cut)
    assert len(live.engine.seen[-1].prompt) == 1000
    assert live.engine.tokenizer.decode(live.engine.seen[-1].prompt).endswith("</think>\n\n")


@pytest.mark.parametrize(
    "name,tokens,how",
    [("Qwen3-Reranker-0.6B", None, "yes-no"), ("other", (1, 2), "yes-no"), ("other", None, "cosine")],
)
def test_which_models_judge(make_server, name, tokens, how):
    live = make_server(ServerSettings(embedding=EmbeddingSettings(score_tokens=tokens)), model_name=name)
    assert live.app.state.server.reranker == how
