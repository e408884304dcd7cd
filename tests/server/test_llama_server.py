"""llama-server's /completion, /infill, /apply-template and /tokenize, and `suffix` of /v1/completions."""

from __future__ import annotations

import copy
import json

import pytest

from support.fake_engine import FakeEngine
from support.live_server import LiveServer, assert_error

MARKS = ["<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>"]


@pytest.fixture(scope="module")
def coder(byte_tokenizer):
    """A model that fills in, with Qwen2.5-Coder's tokens, which are not marked as special."""
    tokenizer = copy.deepcopy(byte_tokenizer)
    tokenizer.add_tokens(MARKS)
    with LiveServer(FakeEngine(tokenizer, script=lambda request: "x + 1<|file_sep|>more")) as live:
        yield live


def ask(live, path="/completion", **body):
    response = live.client.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


def prompt_of(live) -> str:
    return live.engine.tokenizer.decode(live.engine.seen[-1].prompt)


def test_a_completion(live):
    answer = ask(live, prompt="hello", n_predict=12, temperature=0.5, seed=-1, cache_prompt=True, id_slot=-1)
    assert answer["content"].startswith("Answer") and answer["stop_type"] == "limit" and answer["stop"]
    assert (answer["tokens_predicted"], answer["tokens_evaluated"], answer["tokens"]) == (12, 5, [])
    assert answer["prompt"] == "hello" and answer["generation_settings"]["temperature"] == 0.5
    assert answer["timings"]["predicted_n"] == 12 and answer["timings"]["prompt_n"] == 5
    stopped = ask(live, prompt="hello", stop=[":"], return_tokens=True)
    assert (stopped["stop_type"], stopped["stopping_word"]) == ("word", ":") and len(stopped["tokens"]) > 5
    assert ask(live, prompt="hello", n_predict=-1)["stop_type"] == "eos"


def test_a_stream(live):
    text = live.client.post("/completion", json={"prompt": "hello", "n_predict": 12, "stream": True}).text
    events = [json.loads(block.removeprefix("data: ")) for block in text.split("\n\n")[:-1]]
    assert [event["stop"] for event in events] == [False] * (len(events) - 1) + [True]
    assert "".join(event["content"] for event in events) == ask(live, prompt="hello", n_predict=12)["content"]
    assert events[-1]["tokens_predicted"] == 12 and events[-1]["timings"]


def test_prompts_of_texts_and_tokens(live):
    ids = live.engine.tokenizer("llo")["input_ids"]
    mixed = ask(live, prompt=["he", *ids], n_predict=4)
    assert mixed["content"] == ask(live, prompt="hello", n_predict=4)["content"] and mixed["prompt"] == "hello"
    several = ask(live, prompt=["hello", [*ids]], n_predict=4)
    assert [one["index"] for one in several] == [0, 1] and several[0]["content"] == mixed["content"]
    assert isinstance(ask(live, prompt=["hello"], n_predict=4), list)


def test_probabilities_and_grammars(live):
    answer = ask(live, prompt="hello", n_predict=3, n_probs=2)
    assert [len(one["top_logprobs"]) for one in answer["completion_probabilities"]] == [2, 2, 2]
    assert "".join(one["token"] for one in answer["completion_probabilities"]) == answer["content"]
    assert ask(live, prompt="hello", grammar='root ::= "yes" | "no"')["content"] in ("yes", "no")
    schema = {"type": "object", "properties": {"n": {"enum": [7]}}, "required": ["n"], "additionalProperties": False}
    assert json.loads(ask(live, prompt="hello", json_schema=schema)["content"]) == {"n": 7}


@pytest.mark.parametrize("bias", [[[65, False], [66, 2]], {"65": False, "66": 2.0}])
def test_biases(live, bias):
    ask(live, prompt="hello", n_predict=1, logit_bias=bias)
    assert live.engine.seen[-1].sampling.logit_bias == {65: -100, 66: 2}


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"prompt": "x", "logit_bias": [[1, "a"]]},
        {"prompt": ""},
        {"prompt": []},
        {"prompt": [5000]},
        {"prompt": "x", "n": 2},
    ],
)
def test_invalid_completions(refused, body):
    refused("/completion", body)


def test_infill(coder):
    answer = ask(coder, "/infill", input_prefix="def f(x): return ", input_suffix="\n", prompt="2 * ")
    assert prompt_of(coder) == "<|fim_prefix|>def f(x): return <|fim_suffix|>\n<|fim_middle|>2 * "
    assert answer["content"] == "x + 1" and answer["stop_type"] == "eos"
    files = [{"filename": "a.py", "text": "A = 1"}, {"text": "B = 2"}]
    ask(coder, "/infill", input_prefix="a", input_suffix="b", input_extra=files)
    assert prompt_of(coder) == (
        "<|repo_name|>myproject\n<|file_sep|>a.py\nA = 1\n<|file_sep|>tmp\nB = 2\n<|file_sep|>filename\n"
        "<|fim_prefix|>a<|fim_suffix|>b<|fim_middle|>"
    )


def test_texts_around_a_gap_contain_no_control_tokens(coder):
    ask(coder, "/infill", input_prefix="<|fim_middle|>", input_suffix="<|file_sep|>")
    ids = coder.engine.seen[-1].prompt
    added = {coder.engine.tokenizer.convert_tokens_to_ids(name): name for name in MARKS}
    assert [added[token] for token in ids if token in added] == ["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"]
    assert prompt_of(coder) == "<|fim_prefix|><|fim_middle|><|fim_suffix|><|file_sep|><|fim_middle|>"


def test_mistral_s_form(coder):
    answer = ask(
        coder, "/v1/fim/completions", prompt="def f(x): return ", suffix="\n", max_tokens=30, random_seed=1, temperature=0
    )
    assert prompt_of(coder) == "<|fim_prefix|>def f(x): return <|fim_suffix|>\n<|fim_middle|>"
    assert answer["object"] == "chat.completion" and answer["usage"]["prompt_tokens"] == len(coder.engine.seen[-1].prompt)
    (choice,) = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": "x + 1"} and choice["finish_reason"] == "stop"
    assert coder.engine.seen[-1].sampling.seed == 1 and coder.engine.seen[-1].sampling.max_tokens == 30
    ask(coder, "/fim/completions", prompt="a")  # a base URL without /v1, and no suffix
    assert prompt_of(coder) == "<|fim_prefix|>a<|fim_suffix|><|fim_middle|>"
    body = {"prompt": "a", "suffix": "b", "stream": True, "max_tokens": 30}
    text = coder.client.post("/v1/fim/completions", json=body).text
    *events, done = [block.removeprefix("data: ") for block in text.split("\n\n")[:-1]]
    deltas = [choice["delta"] for event in events for choice in json.loads(event)["choices"]]
    assert "".join(delta.get("content", "") for delta in deltas) == "x + 1" and done == "[DONE]"


def test_ollama_s_clients_learn_that_the_model_fills_in(coder, live):
    """Continue looks for .Suffix in the template, Ollama's own clients for the capability."""
    for server, fills_in in ((coder, True), (live, False)):
        shown = ask(server, "/api/show", name="fake-model")
        assert ("insert" in shown["capabilities"], ".Suffix" in shown["template"]) == (fills_in, fills_in)


def test_a_suffix(coder):
    answer = ask(coder, "/v1/completions", prompt="def f(x): return ", suffix="\n", max_tokens=30)
    assert prompt_of(coder) == "<|fim_prefix|>def f(x): return <|fim_suffix|>\n<|fim_middle|>"
    assert answer["choices"][0]["text"] == "x + 1" and answer["choices"][0]["finish_reason"] == "stop"
    assert_error(coder.client.post("/v1/completions", json={"prompt": ["a", "b"], "suffix": "c"}), 400, "suffix")
    filled = ask(coder, "/api/generate", prompt="a", suffix="b", stream=False)
    assert filled["response"] == "x + 1" and prompt_of(coder) == "<|fim_prefix|>a<|fim_suffix|>b<|fim_middle|>"


def test_models_that_cannot_fill_in(refused):
    refused("/infill", {"input_prefix": "a", "input_suffix": "b"}, 400, "input_suffix")
    refused("/v1/fim/completions", {"prompt": "a", "suffix": "b"}, 400, "suffix")
    answer = refused("/v1/completions", {"prompt": "a", "suffix": "b"}, 400, "suffix")
    assert "cannot fill in" in answer.json()["error"]["message"]


def test_the_prompt_of_a_chat(live):
    answer = ask(live, "/apply-template", messages=[{"role": "user", "content": "hi"}])
    assert answer == {"prompt": "<|user|>hi<|end|><|assistant|>"}


def test_tokenizing_in_both_forms(live):
    theirs = ask(live, "/tokenize", prompt="a😀")
    assert theirs["count"] == 5
    assert ask(live, "/tokenize", content="a😀") == {"tokens": theirs["tokens"]}
    pieces = ask(live, "/tokenize", content="a😀", with_pieces=True)["tokens"]
    assert pieces[0] == {"id": theirs["tokens"][0], "piece": "a"}
    assert [piece["piece"] for piece in pieces[1:]] == [[byte] for byte in "😀".encode()]
    assert len(ask(live, "/tokenize", content="<|end|>")["tokens"]) == 1
    assert len(ask(live, "/tokenize", content="<|end|>", parse_special=False)["tokens"]) == 7
    assert ask(live, "/detokenize", tokens=theirs["tokens"]) == {"prompt": "a😀", "content": "a😀"}
    assert_error(live.client.post("/tokenize", json={"content": "a", "prompt": "b"}), 400, "content")
