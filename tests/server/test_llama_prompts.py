"""llama-server's forms of prompts, biases, probabilities and answers; its limits of prompts and answers; /completions without
/v1; counts of tokens."""

from __future__ import annotations

import json

import pytest

from support.live_server import assert_error


def ask(live, path="/completion", **body):
    response = live.client.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


def ids_of(live, text):
    return live.client.post("/tokenize", json={"content": text}).json()["tokens"]


def test_prompts_in_objects(live):
    text = ask(live, prompt="hello", n_predict=4)["content"]
    assert ask(live, prompt={"prompt_string": "hello"}, n_predict=4)["content"] == text
    ids = ids_of(live, "hello")
    several = ask(live, prompt=[ids, {"prompt_string": "hello"}, "hello"], n_predict=4)
    assert [one["content"] for one in several] == [text] * 3
    mixed = ask(live, prompt=[*ids[:2], "ll", ids[4]], n_predict=4)
    assert mixed["content"] == text and mixed["prompt"] == "hello"


def test_embeddings_of_the_same_forms(live):
    def vectors(given):
        return [one["embedding"] for one in ask(live, "/v1/embeddings", input=given)["data"]]

    ids = ids_of(live, "hello")
    parts = {"content": [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]}
    whole = vectors("hello")[0]
    assert vectors(ids) == vectors([*ids[:2], "llo"]) == vectors({"prompt_string": "hello"}) == vectors(parts) == [whole]
    assert vectors(["hello", ids, parts, [ids[0], "ello"]]) == [whole] * 4


@pytest.mark.parametrize("path,field", [("/completion", "prompt"), ("/v1/embeddings", "input")])
@pytest.mark.parametrize(
    "given",
    [
        [],
        {},
        {"content": "hello"},
        {"content": []},
        {"content": [{"type": "unknown"}]},
        {"content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]},
        {"prompt_string": "a", "content": [{"type": "text", "text": "a"}]},
        {"prompt_string": "a<__media__>", "multimodal_data": "AAAA"},
        ["a", {"prompt_string": 1}],
        [[1, "a"], None],
        [1, [2]],
        [1, {"prompt_string": "a"}],
        [5000, "a"],
    ],
)
def test_invalid_forms(refused, path, field, given):
    refused(path, {field: given}, 400)


def test_media_are_refused_by_name(refused):
    answer = refused("/completion", {"prompt": {"prompt_string": "a", "multimodal_data": "AAAA"}}, 400)
    assert "image input is not supported" in answer.json()["error"]["message"]


@pytest.mark.parametrize("biases", [[["ab", -7.5], [99, False]], {"ab": -7.5, "99": False}])
def test_biases_of_texts(live, biases):
    answer = ask(live, prompt="x", n_predict=1, logit_bias=biases)
    expected = {token: -7.5 for token in ids_of(live, "ab")} | {99: -100.0}
    assert live.engine.seen[-1].sampling.logit_bias == expected
    shown = {one["token"]: one["bias"] for one in answer["generation_settings"]["logit_bias"]}
    assert shown == {token: None if bias == -100 else bias for token, bias in expected.items()}


@pytest.mark.parametrize("biases", [[[1, "a"]], [["a", "b"]], [[1.5, 1]], [[1]], {"a" * 300: 1}, {"": 1}, [["a", 1e9]]])
def test_invalid_biases(refused, biases):
    refused("/completion", {"prompt": "x", "logit_bias": biases}, 400)


def test_ignore_eos_forbids_the_end(live):
    answer = ask(live, prompt="x", n_predict=3, ignore_eos=True)
    settings = answer["generation_settings"]
    assert settings["ignore_eos"] and settings["logit_bias"] == [{"token": t, "bias": None} for t in sorted(live.engine.eos)]
    assert ask(live, prompt="x", n_predict=3)["generation_settings"]["logit_bias"] == []


def test_fields_of_an_answer(live):
    fields = ["content", "generation_settings/n_predict", "timings/prompt_n", "nothing", "content/x"]
    answer = ask(live, prompt="x", n_predict=3, response_fields=fields)
    assert answer == {"content": ask(live, prompt="x", n_predict=3)["content"], "generation_settings/n_predict": 3,
                      "timings/prompt_n": 1}  # fmt: skip
    assert "model" in ask(live, prompt="x", n_predict=3, response_fields=[])
    text = live.client.post(
        "/completion", json={"prompt": "x", "n_predict": 3, "stream": True, "response_fields": ["stop"]}
    ).text
    assert json.loads(text.split("\n\n")[-2].removeprefix("data: ")) == {"stop": True}


def test_a_stream_has_tokens(live):
    text = live.client.post("/completion", json={"prompt": "x", "n_predict": 3, "stream": True}).text
    chunks = [json.loads(line.removeprefix("data: ")) for line in text.split("\n\n")[:-1]]
    assert sum(len(chunk["tokens"]) for chunk in chunks) == 3 and all(chunk["tokens"] for chunk in chunks[:-1])
    assert chunks[-1]["stop"] and not chunks[-1]["tokens"]


def test_probabilities_after_sampling(tiny_server):
    question = {"prompt": "hello there", "n_predict": 4, "seed": 1, "n_probs": 5, "ignore_eos": True}
    plain = ask(tiny_server, **question, temperature=1.5)
    answer = ask(tiny_server, **question, temperature=1.5, top_k=3, post_sampling_probs=True)
    for token in answer["completion_probabilities"]:
        assert set(token) == {"id", "token", "bytes", "prob", "top_probs"} and 0 < token["prob"] <= 1
        assert len(token["top_probs"]) == 3 and sum(other["prob"] for other in token["top_probs"]) == pytest.approx(1)
        assert token["prob"] in [other["prob"] for other in token["top_probs"]]
    assert all("logprob" in token and len(token["top_logprobs"]) == 5 for token in plain["completion_probabilities"])
    [greedy] = ask(tiny_server, **{**question, "n_predict": 1}, temperature=0, post_sampling_probs=True)[
        "completion_probabilities"
    ]
    assert greedy["prob"] == 1 and greedy["top_probs"] == [{name: greedy[name] for name in ("id", "token", "bytes", "prob")}]
    assert_error(
        tiny_server.client.post("/completion", json={**question, "post_sampling_probs": True, "mirostat": 2}),
        400,
        "sampled_logprobs",
    )


def test_the_path_without_v1_has_llama_servers_form_unless_a_model_is_named(live):
    native = ask(live, "/completions", prompt="hello", n_predict=4)
    assert native["content"] == ask(live, prompt="hello", n_predict=4)["content"]
    named = ask(live, "/completions", prompt="hello", max_tokens=4, model="fake-model")
    assert named["object"] == "text_completion" and named["choices"][0]["text"] == native["content"]
    assert "choices" in ask(live, "/v1/completions", prompt="hello")
    assert_error(live.client.post("/completions", json={"prompt": "x", "model": "other"}), 404, "model")
    assert_error(live.client.post("/completions", content=b"[]", headers={"content-type": "application/json"}), 400)


@pytest.mark.parametrize("path", ["/completion", "/v1/completions"])
def test_n_predict_ends_with_the_context(live, path):
    ask(live, path, prompt="x", n_predict=10**6, stop=["A"])
    assert live.engine.seen[-1].sampling.max_tokens == live.engine.room - 1
    ask(live, path, prompt="x", n_predict=5)
    assert live.engine.seen[-1].sampling.max_tokens == 5
    ask(live, "/v1/completions", prompt="x", n_predict=5, max_tokens=4)
    assert live.engine.seen[-1].sampling.max_tokens == 4


@pytest.mark.parametrize("prompt", ["a" * 5000, [1] * 5000])
def test_a_prompt_that_exceeds_the_context(live, prompt):
    error = live.client.post("/v1/completions", json={"prompt": prompt})
    assert error.status_code == 400
    detail = error.json()["error"]
    assert detail["type"] == "exceed_context_size_error" and detail["code"] == "context_length_exceeded"
    assert detail["n_prompt_tokens"] == 5000 and detail["n_ctx"] == live.engine.context and detail["param"] == "prompt"


def test_counts_of_tokens(live):
    messages = [{"role": "user", "content": "hello"}]
    prompt = ask(live, "/apply-template", messages=messages)["prompt"]
    size = len(ids_of(live, prompt))
    for path in ("/v1/chat/completions/input_tokens", "/chat/completions/input_tokens"):
        counted = ask(live, path, messages=messages, max_tokens=3)
        assert counted == {"object": "chat.completion.input_tokens", "input_tokens": size}
    stored = ask(live, "/v1/responses", input="hello", max_output_tokens=3)
    assert ask(live, "/v1/responses/input_tokens", input="hello") == {"object": "response.input_tokens", "input_tokens": size}
    more = ask(live, "/v1/responses/input_tokens", input="more", previous_response_id=stored["id"])
    assert more["input_tokens"] > size
    assert_error(live.client.post("/v1/chat/completions/input_tokens", json={}), 400, "messages")
    file = {"type": "file", "file": {"file_data": "aGk=", "filename": "a.txt"}}
    body = {"messages": [{"role": "user", "content": [file]}]}
    assert_error(live.client.post("/v1/chat/completions/input_tokens", json=body), 400, "messages")


def test_a_prompt_without_the_start_of_an_answer(live):
    messages = [{"role": "user", "content": "hello"}]
    whole = ask(live, "/apply-template", messages=messages)["prompt"]
    assert whole == ask(live, "/apply-template", messages=messages, add_generation_prompt=False)["prompt"] + "<|assistant|>"
