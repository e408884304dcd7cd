"""/v1/embeddings over an engine without a model: fields, prompts, truncation, many texts."""

from __future__ import annotations

import base64
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from deepseek_optimizer.checkpoint.sentence_transformers import EmbeddingSettings
from deepseek_optimizer.server.settings import ServerSettings
from support.fake_engine import HIDDEN
from support.live_server import assert_error, wait_for

PATH = "/v1/embeddings"


def vectors(client, **body) -> np.ndarray:
    result = client.post(PATH, json=body)
    assert result.status_code == 200, result.text
    return np.array([entry["embedding"] for entry in result.json()["data"]])


def test_the_response(client):
    body = client.post("/embeddings", json={"input": ["a", "bb"]}).json()
    assert body["object"] == "list" and body["model"] == "fake-model" and body["id"].startswith("embd-")
    assert [entry["index"] for entry in body["data"]] == [0, 1]
    assert body["usage"] == {"prompt_tokens": 3, "completion_tokens": 0, "total_tokens": 3}


def test_norms(client):
    raw = vectors(client, input="hello", normalize=False)
    np.testing.assert_allclose(vectors(client, input="hello"), raw / np.linalg.norm(raw), atol=1e-6)
    assert np.array_equal(raw, vectors(client, input="hello", use_activation=False))
    assert np.array_equal(raw, vectors(client, input="hello", embd_normalize=-1))
    assert np.abs(vectors(client, input="hello", embd_normalize=1)).sum() == pytest.approx(1, abs=1e-6)


def test_the_form_of_llama_server(client, refused):
    body = client.post("/embedding", json={"content": ["a", {"prompt_string": "bb"}], "embd_normalize": -1}).json()
    assert [entry["index"] for entry in body] == [0, 1]
    expected = vectors(client, input=["a", "bb"], normalize=False)
    assert np.array_equal([entry["embedding"] for entry in body], expected[:, None])
    refused("/embedding", {"input": "a"}, 400, "content")
    refused("/embedding", {"content": "a", "encoding_format": "base64"}, 400, "encoding_format")


def test_dimensions(client, refused):
    whole = vectors(client, input="hello")[0]
    short = vectors(client, input="hello", dimensions=3)[0]
    np.testing.assert_allclose(short, whole[:3] / np.linalg.norm(whole[:3]), atol=1e-6)
    text = client.post(PATH, json={"input": "hello", "dimensions": 3, "encoding_format": "base64"}).json()
    np.testing.assert_allclose(np.frombuffer(base64.b64decode(text["data"][0]["embedding"]), "<f4"), short, atol=1e-6)
    refused(PATH, {"input": "x", "dimensions": HIDDEN + 1}, 400, "dimensions")
    refused(PATH, {"input": "x", "dimensions": 0}, 400, "dimensions")


def test_two_thousand_texts(live):
    texts = [f"text {i}" for i in range(2048)]
    made = vectors(live.client, input=texts, normalize=False)
    assert made.shape == (2048, HIDDEN)
    assert np.array_equal(made[777], vectors(live.client, input="text 777", normalize=False)[0])


@pytest.mark.parametrize("given", ["", [], [""], ["a"] * 2049, [[]], [-1], [["a"]], 1, None, [1.5], ["a", 1.5], [261]])
def test_wrong_inputs(refused, given):
    refused(PATH, {"input": given})


def test_truncation(live, refused):
    text = "word " * 2000
    refused(PATH, {"input": text}, 400, "input")
    for side, expected in ((None, "word word "), ("right", "word word "), ("left", "word word ")):
        live.client.post(PATH, json={"input": text, "truncate_prompt_tokens": 10, "truncation_side": side}).raise_for_status()
        assert live.engine.tokenizer.decode(live.engine.seen[-1].prompt) == expected
    live.client.post(PATH, json={"input": "abcdef", "truncate_prompt_tokens": 2, "truncation_side": "left"})
    assert live.engine.tokenizer.decode(live.engine.seen[-1].prompt) == "ef"
    live.client.post(PATH, json={"input": [1, 2, 3], "truncate_prompt_tokens": 2})
    assert live.engine.seen[-1].prompt == [1, 2]
    live.client.post(PATH, json={"input": text, "truncate_prompt_tokens": -1}).raise_for_status()
    assert len(live.engine.seen[-1].prompt) == 4096
    refused(PATH, {"input": "x", "truncate_prompt_tokens": 4097}, 400, "truncate_prompt_tokens")
    assert live.client.post(PATH, json={"input": [1] * 5000, "truncate_prompt_tokens": 9}).json()["usage"]["prompt_tokens"] == 9
    assert vectors(live.client, input="untouched afterwards").shape == (1, HIDDEN)


PROMPTS = EmbeddingSettings(pooling=("cls",), prompts={"query": "Q: ", "document": "D: "}, default_prompt="document")


@pytest.mark.parametrize(
    "fields,text",
    [
        ({}, "D: x"), ({"input_type": "query"}, "Q: x"), ({"input_type": "search_query"}, "Q: x"),
        ({"input_type": "passage"}, "D: x"), ({"input_type": "clustering"}, "x"), ({"prompt_name": "query"}, "Q: x"),
    ],
)  # fmt: skip
def test_prompts(make_server, fields, text):
    live = make_server(ServerSettings(embedding=PROMPTS))
    live.client.post(PATH, json={"input": "x", **fields}).raise_for_status()
    request = live.engine.seen[-1]
    assert live.engine.tokenizer.decode(request.prompt) == text and request.pooling.modes == ("cls",)
    assert live.client.post(PATH, json={"input": "x", "prompt_name": "other"}).status_code == 400


def test_prompts_that_are_not_pooled(make_server):
    settings = EmbeddingSettings(prompts={"query": "Q: "}, default_prompt="query", include_prompt=False, lower_case=True)
    live = make_server(ServerSettings(embedding=settings))
    live.client.post(PATH, json={"input": ["AB", "C"]}).raise_for_status()
    assert [(live.engine.tokenizer.decode(r.prompt), r.pooling.skip) for r in live.engine.seen] == [("Q: ab", 3), ("Q: c", 3)]
    live.client.post(PATH, json={"input": [5, 6]}).raise_for_status()
    assert live.engine.seen[-1].prompt == [5, 6] and live.engine.seen[-1].pooling.skip == 0


def test_many_texts_take_the_places_that_are_free(make_server):
    live = make_server(capacity=3)
    assert vectors(live.client, input=[f"{i}" for i in range(100)]).shape == (100, HIDDEN)
    live.engine.frozen = True
    with ThreadPoolExecutor(2) as pool:
        asked = pool.submit(live.client.post, "/v1/completions", json={"prompt": "x", "max_tokens": 1, "n": 2})
        wait_for(lambda: live.engine.admitted == 2)
        texts = pool.submit(vectors, live.client, input=["a", "b", "c"])
        wait_for(lambda: live.engine.admitted == 3)
        assert_error(live.client.post(PATH, json={"input": "d"}), 429)
        live.engine.frozen = False
        assert asked.result().status_code == 200 and texts.result().shape == (3, HIDDEN)
    wait_for(lambda: live.engine.admitted == 0)
