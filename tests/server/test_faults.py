"""Faults below the server, in a real engine: the affected request gets an error, and all others continue."""

from __future__ import annotations

import itertools
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from deepseek_optimizer import load_model
from deepseek_optimizer.cache.prefix_cache import keys
from deepseek_optimizer.quant import pack
from deepseek_optimizer.server.settings import ServerSettings
from deepseek_optimizer.serving import make_async_engine
from support import warm_python
from support.live_server import LiveServer, assert_error, wait_for
from support.saved_llama import saved_llama

PATH = "/v1/completions"
POISON = 7  # a token whose embedding is NaN
CACHE = 1 << 18  # bytes: about ten blocks, which successive requests reuse
BODY = {"prompt": [65] * 40, "max_tokens": 30, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def model(tmp_path_factory, byte_tokenizer):
    """A Llama with an untied head, so that damage to one embedding affects no other token."""
    return saved_llama(tmp_path_factory.mktemp("untied"), byte_tokenizer, tie_word_embeddings=False)


@pytest.fixture
def server(model):
    loaded = load_model(model, precision="fp32", kv_cache_memory=CACHE, threads=1)
    embedding = loaded.get_input_embeddings()
    table = embedding.dequantized()
    table[POISON] = float("nan")
    embedding.weight.data.copy_(pack(table, "fp32").data)
    engine = make_async_engine(loaded, AutoTokenizer.from_pretrained(model), model_name="tiny")
    assert 8 <= engine.core.blocks <= 16
    with LiveServer(engine, ServerSettings(drain_seconds=2)) as live:
        before = [text_of(live, body) for body in company()]
        yield live
        wait_for(lambda: engine.admitted == 0)
        if engine.alive:
            assert engine.core.cache_usage() == 0 and live.client.get("/health").status_code == 200
            assert [text_of(live, body) for body in company()] == before


def company() -> list[dict]:
    return [{**BODY, "prompt": [70 + i] * (20 + 9 * i)} for i in range(5)]


def text_of(live: LiveServer, body: dict) -> str:
    result = live.client.post(PATH, json=body)
    assert result.status_code == 200, result.text
    return result.json()["choices"][0]["text"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("place", [0, 20, 99])
def test_nan_logits_fail_only_their_request(server, stream, place):
    """Through the model: keys and values of all tokens after it are NaN too."""
    prompt = [66] * 100
    prompt[place] = POISON
    body = {**BODY, "prompt": prompt, "stream": stream}
    alone = [text_of(server, other) for other in company()]
    with ThreadPoolExecutor(8) as pool:
        others = [pool.submit(text_of, server, other) for other in company() * 3]
        damaged = [pool.submit(server.client.post, PATH, json=body) for _ in range(4)]
        for answer in damaged:
            assert_error(answer.result(), 500)
        assert [other.result() for other in others] == alone * 3
    core = server.engine.core
    assert core.metrics.finished["error"] == 4
    assert core.prefix is not None and core.prefix.known(keys(prompt, "", 3)) == 0  # its blocks are not in the prefix cache


def test_nan_logits_during_an_answer_end_it_with_an_error(server, monkeypatch):
    """The text so far is followed by the error, without a finish reason."""
    step = server.engine.core.step

    def slow_step():  # so that the client gets the first token before the error
        time.sleep(0.05)
        return step()

    monkeypatch.setattr(server.engine.core, "step", slow_step)
    body = {**BODY, "stream": True, "logit_bias": {str(POISON): 60}}
    events = server.client.post(PATH, json=body).text.split("\n\n")
    assert len(events) > 3 and events[-2:] == ["data: [DONE]", ""]
    last = json.loads(events[-3][6:])
    assert last["error"]["type"] == "server_error" and "finite" not in events[-3]
    assert all(json.loads(event[6:])["choices"][0]["finish_reason"] is None for event in events[:-3])


def test_a_step_without_memory_fails_only_its_requests(server, monkeypatch):
    runner, failing = server.engine.core.runner, threading.Event()
    real = runner.step

    def step(parts, rows, **options):
        if failing.is_set():
            failing.clear()
            raise MemoryError("4096 bytes at 0x7f0000000000")
        return real(parts, rows, **options)

    monkeypatch.setattr(runner, "step", step)
    failing.set()
    actual = server.client.post(PATH, json=BODY)
    assert actual.status_code >= 500
    assert_error(actual, actual.status_code)
    assert text_of(server, BODY)


def test_the_engines_thread_dies(server, monkeypatch):
    """All its requests get a 5xx, and the server reports that it is unhealthy."""
    runner, dying, steps = server.engine.core.runner, threading.Event(), itertools.count()
    real = runner.step

    def step(parts, rows, **options):
        if next(steps) > 10:  # some have started by then
            dying.wait(20)
            raise ZeroDivisionError("a bug at /secret/path")
        return real(parts, rows, **options)

    monkeypatch.setattr(runner, "step", step)
    with ThreadPoolExecutor(8) as pool:
        bodies = [{**BODY, "max_tokens": 150, "prompt": [80 + i] * 5, "stream": i % 2 == 0} for i in range(8)]
        answers = [pool.submit(server.client.post, PATH, json=body) for body in bodies]
        wait_for(lambda: server.engine.admitted == 8)
        dying.set()
        for body, answer in zip(bodies, answers, strict=True):
            actual = answer.result()
            if body["stream"] and actual.status_code == 200:
                assert '"error"' in actual.text.split("\n\n")[-3]
            else:
                assert_error(actual, 503)
            assert "secret" not in actual.text
    for path, status in (("/health", 503), ("/ready", 503), ("/v1/models", 200)):
        assert server.client.get(path).status_code == status
    assert_error(server.client.post(PATH, json=BODY), 503)


def test_missing_memory_is_an_error_and_not_a_hang(tmp_path, byte_tokenizer):
    """`dso serve` with a model larger than its memory limit: one line of error, and no server."""
    config = LlamaConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=8,
        vocab_size=len(byte_tokenizer), max_position_embeddings=256,
    )  # fmt: skip
    code = f"""
import resource, sys
import torch, transformers, uvicorn
import deepseek_optimizer.server.run, deepseek_optimizer.serving
from deepseek_optimizer_cli.app import main
used = int(open("/proc/self/statm").read().split()[0]) * 4096
resource.setrlimit(resource.RLIMIT_AS, (used + (250 << 20), resource.RLIM_INFINITY))
sys.argv = ["dso", "serve", {str(tmp_path / "m")!r}, "--port", "0", "--precision", "fp32"]
main()
"""
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "m")
    byte_tokenizer.save_pretrained(tmp_path / "m")
    done = warm_python.run(code)
    assert done.returncode == 2 and done.stderr.startswith("dso: the model's weights: "), done.stderr
