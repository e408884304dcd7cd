"""The server over a real engine, with a tiny model of random weights."""

from __future__ import annotations

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from deepseek_optimizer import load_model
from deepseek_optimizer.engine.request import Request, SamplingParams
from deepseek_optimizer.server.keys import ApiKeys
from deepseek_optimizer.server.settings import ServerSettings
from deepseek_optimizer.serving import make_async_engine
from support.live_server import LiveServer, assert_error, wait_for
from support.lora import adapted, logits_of, save_adapter

CONTEXT = 256
TEXT = "/v1/completions"
CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "system", "content": "Be kind"}, {"role": "user", "content": "hi"}]


def start(model, settings=None, fields=None, **options) -> LiveServer:
    loaded = load_model(model, precision="fp32", **{"kv_cache_memory": 1 << 24, **(fields or {})})
    return LiveServer(make_async_engine(loaded, AutoTokenizer.from_pretrained(model), model_name="tiny", **options), settings)


@pytest.fixture(scope="module")
def server(tiny_model):
    with start(tiny_model) as live:
        yield live
        wait_for(lambda: live.engine.admitted == 0)
        assert live.client.get("/health").status_code == 200


def ask(live, path=TEXT, status=200, **body):
    rest = {"prompt": "hello"} if path == TEXT else {"messages": MESSAGES}
    result = live.client.post(path, json={**rest, "max_tokens": 20, **body})
    assert result.status_code == status, result.text
    return result.json()


def text_of(live, **body) -> str:
    return ask(live, **body)["choices"][0]["text"]


@pytest.mark.parametrize(
    "body", [{"temperature": 0}, {"temperature": 1, "seed": 3}, {"temperature": 0, "stop": ["e", "a", "\n"]}]
)
@pytest.mark.parametrize("path", [TEXT, CHAT])
def test_a_stream_equals_the_whole_answer(server, path, body):
    whole = ask(server, path, **body, max_tokens=100)
    rest = {"prompt": "hello"} if path == TEXT else {"messages": MESSAGES}
    options = {"stream": True, "stream_options": {"include_usage": True}}
    streamed = server.client.post(path, json={**rest, **body, **options, "max_tokens": 100}).text
    chunks = [json.loads(event[6:]) for event in streamed.split("\n\n")[:-2]]
    choices = [chunk["choices"][0] for chunk in chunks[:-1]]
    text = "".join(c["text"] if path == TEXT else c["delta"].get("content", "") for c in choices)
    choice = whole["choices"][0]
    assert text == (choice["text"] if path == TEXT else choice["message"]["content"])
    assert choices[-1]["finish_reason"] == choice["finish_reason"]
    for name in ("prompt_tokens", "completion_tokens"):
        assert chunks[-1]["usage"][name] == whole["usage"][name]


def test_answers_are_the_same_in_batches(server):
    bodies = [{"prompt": f"question {i}", "temperature": i % 2, "seed": i, "ignore_eos": True} for i in range(16)]
    alone = [text_of(server, **body) for body in bodies]
    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(lambda body: text_of(server, **body), bodies)) == alone


def test_several_answers_to_several_prompts(server):
    actual = ask(server, prompt=["one", "two"], n=2, seed=1)
    assert [choice["index"] for choice in actual["choices"]] == [0, 1, 2, 3]
    texts = [choice["text"] for choice in actual["choices"]]
    assert texts == [text_of(server, prompt=p, seed=s) for p in ("one", "two") for s in (1, 2)]
    assert actual["usage"]["prompt_tokens"] == 6


def test_log_probabilities_equal_the_model(server, tiny_model):
    from transformers import AutoModelForCausalLM

    choice = ask(server, temperature=0, logprobs=3, max_tokens=5, ignore_eos=True)["choices"][0]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_model), AutoTokenizer.from_pretrained(tiny_model)
    ids = tokenizer("hello", return_tensors="pt")["input_ids"]
    for at in range(5):
        expected = torch.log_softmax(model(ids).logits[0, -1].float(), -1)
        best = expected.topk(3)
        assert choice["logprobs"]["token_logprobs"][at] == pytest.approx(best.values[0].item(), abs=1e-3)
        assert sorted(choice["logprobs"]["top_logprobs"][at].values()) == pytest.approx(sorted(best.values.tolist()), abs=1e-3)
        ids = torch.cat([ids, best.indices[:1][None]], 1)


def test_embeddings_are_the_mean_of_the_last_hidden_states(server, tiny_model):
    texts = ["hello", "something longer than that"]
    actual = server.client.post("/v1/embeddings", json={"input": texts}).json()
    model, tokenizer = AutoModel.from_pretrained(tiny_model), AutoTokenizer.from_pretrained(tiny_model)
    for text, entry in zip(texts, actual["data"], strict=True):
        with torch.no_grad():
            expected = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0)
        np.testing.assert_allclose(entry["embedding"], (expected / expected.norm()).numpy(), atol=1e-5)


def test_a_language_model_judges_documents(server, tiny_model):
    from transformers import AutoModelForCausalLM

    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_model), AutoTokenizer.from_pretrained(tiny_model)
    tokens = tokenizer.convert_tokens_to_ids(["y", "n"])
    with server.engine.admit(2):
        texts = ["a document" * 10, "another one, of some length, for the prefix cache to hold"]
        for text in [texts[0], *texts]:
            ids = tokenizer(text)["input_ids"]
            request = Request(ids, SamplingParams(max_tokens=1), scored_tokens=tuple(tokens))

            async def scores(request=request):
                return [output async for output in server.engine.submit(request)][-1]

            output = asyncio.run_coroutine_threadsafe(scores(), server.server._loop).result(30)
            with torch.no_grad():
                expected = model(torch.tensor([ids])).logits[0, -1, tokens]
            np.testing.assert_allclose(output.scores, expected.numpy(), atol=1e-4)
            assert output.finish == "stop" and output.completion_tokens == 0


def test_prompts_at_the_context_limit(server):
    assert ask(server, prompt=[1] * (CONTEXT - 1), max_tokens=1, ignore_eos=True)["choices"][0]["finish_reason"] == "length"
    for length in (CONTEXT, CONTEXT + 1, 100 * CONTEXT):
        actual = server.client.post(TEXT, json={"prompt": [1] * length, "max_tokens": 1})
        assert_error(actual, 400, "prompt")
    assert_error(server.client.post(TEXT, json={"prompt": "x" * 100 * CONTEXT}), 400, "prompt")
    actual = ask(server, CHAT, max_tokens=None, ignore_eos=True)
    assert actual["usage"]["total_tokens"] == CONTEXT and actual["choices"][0]["finish_reason"] == "length"


def test_one_request_larger_than_the_whole_cache(tiny_model):
    with start(tiny_model, fields={"kv_cache_memory": 1 << 16}) as live:
        room = live.engine.core.blocks * 32
        assert room < CONTEXT
        assert_error(live.client.post(TEXT, json={"prompt": [1] * (room + 1), "max_tokens": 1}), 400, "prompt")
        texts = [text_of(live, prompt=[i] * 40, temperature=0, ignore_eos=True) for i in range(6)]
        with ThreadPoolExecutor(6) as pool:  # more than fit into the cache: they wait and are preempted
            actual = pool.map(lambda i: text_of(live, prompt=[i] * 40, temperature=0, ignore_eos=True), range(6))
            assert list(actual) == texts


def test_a_thousand_prompts_past_capacity(tiny_model):
    with start(tiny_model, max_waiting=16) as live, ThreadPoolExecutor(100) as pool:
        bodies = [{"prompt": f"{i}", "max_tokens": 2} for i in range(1000)]
        statuses = list(pool.map(lambda body: live.client.post(TEXT, json=body).status_code, bodies))
        assert set(statuses) <= {200, 429} and statuses.count(200) >= 48
        wait_for(lambda: live.engine.admitted == 0)
        assert text_of(live, ignore_eos=True, max_tokens=8, temperature=0)


def test_every_token_banned(server):
    actual = server.client.post(TEXT, json={"prompt": "x", "logit_bias": {str(i): -100 for i in range(261)}, "max_tokens": 3})
    assert actual.status_code in (200, 400), actual.text
    if actual.status_code == 200:
        assert actual.json()["choices"][0]["finish_reason"] in ("stop", "length")


def test_grammars_are_enforced(server):
    assert text_of(server, guided_regex="[0-9]{3}-[a-f]").count("-") == 1
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    message = ask(server, CHAT, response_format=form, max_tokens=50)["choices"][0]["message"]
    assert json.loads(message["content"])["a"] in (1, 2)


def test_a_disconnect_frees_the_slot(server):
    for stream in (False, True):
        with server.connect() as sock:
            body = json.dumps({"prompt": "x", "max_tokens": 250, "ignore_eos": True, "stream": stream}).encode()
            head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            sock.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
            wait_for(lambda: server.engine.admitted == 1)
        wait_for(lambda: server.engine.admitted == 0)
    metrics = server.client.get("/metrics").text
    assert 'vllm:num_requests_running{model_name="tiny"} 0.0' in metrics
    assert 'vllm:num_requests_waiting{model_name="tiny"} 0.0' in metrics


def test_cached_prefixes_are_not_shared_between_keys(tiny_model):
    prompt = "a prefix that is longer than a few blocks of the cache, " * 3
    with start(tiny_model, ServerSettings(keys=ApiKeys(["alpha", "beta"]))) as live:

        def cached(key: str) -> int:
            headers = {"Authorization": f"Bearer {key}"}
            actual = live.client.post(TEXT, json={"prompt": prompt, "max_tokens": 2}, headers=headers)
            return actual.json()["usage"]["prompt_tokens_details"]["cached_tokens"]

        assert [cached("alpha"), cached("beta")] == [0, 0]
        assert cached("alpha") >= 64 and cached("beta") >= 64


@pytest.mark.parametrize("stream", [False, True])
def test_non_finite_logits_fail_only_their_request(server, monkeypatch, stream):
    text = text_of(server, prompt="spoilt", temperature=0)
    runner = server.engine.core.runner
    real = runner.step

    def step(*arguments, **named):
        actual = real(*arguments, **named)
        actual.logits.fill_(float("nan"))
        return actual

    monkeypatch.setattr(runner, "step", step)
    assert_error(server.client.post(TEXT, json={"prompt": "spoilt", "stream": stream}), 500)
    monkeypatch.undo()
    assert text_of(server, prompt="spoilt", temperature=0) == text


def test_the_engines_thread_dies(tiny_model):
    with start(tiny_model) as live:
        assert text_of(live)

        def step():
            raise RuntimeError("/secret/path")

        live.engine.core.step = step
        actual = live.client.post(TEXT, json={"prompt": "x"})
        assert_error(actual, 503)
        assert "secret" not in actual.text
        assert live.client.get("/health").status_code == 503
        assert_error(live.client.post(TEXT, json={"prompt": "x"}), 503)


def test_a_conversation_longer_than_its_window(tiny_model):
    """Old messages are dropped, the system's and pinned ones stay, the number of dropped ones is reported, and most of a turn
    is cached."""
    with start(tiny_model, cache_window=CONTEXT) as live:
        messages = [*MESSAGES[:1], {"role": "user", "content": "PIN this", "pinned": True}]
        dropped, cached = [], []
        for turn in range(50):
            messages.append({"role": "assistant", "content": f"a {turn}"})
            messages.append({"role": "user", "content": f"q {turn}"})
            usage = ask(live, CHAT, messages=messages, max_tokens=4, temperature=0)["usage"]
            assert usage["prompt_tokens"] <= 3 * CONTEXT // 4
            dropped.append(usage.get("dropped_tokens", 0))
            if dropped[-1]:
                assert usage["context_tokens"] <= CONTEXT
            cached.append(usage["prompt_tokens_details"]["cached_tokens"])
        assert dropped[0] == 0 and dropped[-1] > 300 and dropped == sorted(dropped)
        assert len(set(dropped)) < 15  # the cut does not move for some turns, during which the prefix is cached
        assert sum(c >= 96 for c in cached[10:]) > 20
        events = live.client.post(CHAT, json={"messages": messages, "max_tokens": 4, "stream": True,
                                              "stream_options": {"include_usage": True}}).text  # fmt: skip
        assert '"dropped_tokens":' in events
        too_long = [{"role": "system", "content": "s" * 600}, {"role": "user", "content": "hi"}]
        assert_error(live.client.post(CHAT, json={"messages": too_long}), 400)


def test_adapters_are_loaded_chosen_and_unloaded(tiny_model, tmp_path):
    """Texts are those of PEFT, while adapters come and go between concurrent requests."""
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    expected = {"tiny": base}
    for n in range(3):
        folder = save_adapter(base, tmp_path / "adapters" / f"a{n}", seed=n, lora_alpha=64)
        expected[f"a{n}"] = adapted(base, folder)
    prompts = [f"question {n}" for n in range(12)]
    ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]

    def reference(name, n):
        text = list(ids[n])
        for _ in range(8):
            text.append(int(logits_of(expected[name], text)[-1].argmax()))
        return tokenizer.decode(text[len(ids[n]) :], skip_special_tokens=True)

    settings = ServerSettings(allow_lora_loading=True, lora_dir=str(tmp_path / "adapters"))
    with start(tiny_model, settings, adapters={"a0": str(tmp_path / "adapters" / "a0")}, max_loras=2) as live:
        post = live.client.post
        assert post("/v1/load_lora_adapter", json={"lora_name": "a1", "lora_path": "a1"}).status_code == 200
        full = post("/v1/load_lora_adapter", json={"lora_name": "a2", "lora_path": "a2"})
        assert_error(full, 400, "lora_name")
        names = ["tiny", "a0", "a1"]

        def text(n, name=None):
            name = name or names[n % 3]
            body = {"model": name, "prompt": prompts[n], "temperature": 0, "max_tokens": 8, "ignore_eos": True}
            return post(TEXT, json=body).json()["choices"][0]["text"]

        with ThreadPoolExecutor(12) as pool:
            texts = list(pool.map(text, range(12)))
        assert texts == [reference(names[n % 3], n) for n in range(12)]
        assert len({text(0, name) for name in names}) == 3
        assert post("/v1/unload_lora_adapter", json={"lora_name": "a0"}).status_code == 200
        assert post("/v1/load_lora_adapter", json={"lora_name": "a2", "lora_path": "a2"}).status_code == 200
        assert text(4, "a2") == reference("a2", 4)
        assert_error(post(TEXT, json={"model": "a0", "prompt": "x"}), 404, "model")
