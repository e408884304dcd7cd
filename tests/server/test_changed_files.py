"""`dso serve` with a packed checkpoint whose file changes: every client gets an error, and the process survives."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from transformers import AutoTokenizer

from deepseek_optimizer import load_model
from deepseek_optimizer.serving import make_async_engine
from support.live_server import LiveServer, assert_error
from support.saved_llama import saved_llama
from support.warm_python import DSO, WarmPython

TEXT = "/v1/completions"
SHORT = {"prompt": "hello", "max_tokens": 8, "temperature": 0, "ignore_eos": True}
LONG = {**SHORT, "max_tokens": 60_000}


@pytest.fixture(scope="module")
def floats(tmp_path_factory, byte_tokenizer):
    folder = tmp_path_factory.mktemp("served") / "floats"
    return saved_llama(folder, byte_tokenizer, tie_word_embeddings=False, max_position_embeddings=65_536)


@pytest.fixture
def packed(tmp_path, floats, byte_tokenizer):
    load_model(floats, precision="int8").save_pretrained(tmp_path / "packed")
    byte_tokenizer.save_pretrained(tmp_path / "packed")
    return tmp_path / "packed"


@pytest.fixture
def live(packed):
    engine = make_async_engine(load_model(packed, kv_cache_memory=1 << 26), AutoTokenizer.from_pretrained(packed))
    with LiveServer(engine) as server:
        yield server


def check_lost(client: httpx.Client, words: str) -> None:
    """Checks the answers and the log of a server whose model's file has changed."""
    for path in ("/ready", "/health"):
        found = client.get(path)
        assert (found.status_code, found.json()) == (503, {"status": "dead"})
    assert client.get("/v1/models").status_code == 200
    for path, body in ((TEXT, SHORT), ("/v1/embeddings", {"input": "hello"})):
        found = client.post(path, json=body)
        assert_error(found, 503)
        assert found.json()["error"]["code"] == "model_file_changed" and found.headers["retry-after"]
        message = found.json()["error"]["message"]
        assert f"model.safetensors {words}; restore the file and restart the server" in message and "/" not in message


def test_a_file_truncated_during_requests(packed):
    options = ("--port", "0", "--kv-cache-memory", "67108864")
    with WarmPython(DSO, "serve", packed, *options) as process, ThreadPoolExecutor(1) as pool:
        log: list[str] = []
        address = next(filter(None, (re.search(r"http://127\.0\.0\.1:\d+", line) for line in process.stderr)))[0]
        reading = threading.Thread(target=lambda: log.extend(process.stderr), daemon=True)
        reading.start()
        with httpx.Client(base_url=address, timeout=60) as client:
            assert client.get("/ready").status_code == 200
            whole = pool.submit(client.post, TEXT, json=LONG)
            with client.stream("POST", TEXT, json={**LONG, "stream": True}) as stream:
                events = filter(None, stream.iter_lines())
                for _ in range(5):
                    assert json.loads(next(events)[6:])["choices"][0]["finish_reason"] is None
                os.truncate(packed / "model.safetensors", 0)
                *_, last, done = events
            error = json.loads(last[6:])["error"]
            assert done == "data: [DONE]" and error["code"] == "model_file_changed" and str(packed) not in last
            assert_error(whole.result(), 503)
            check_lost(client, "was cut short or cannot be read while its weights are in use")
            assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
        reading.join(10)
    errors = [line for line in log if "can no longer be used" in line]
    assert len(errors) == 1 and str(packed) in errors[0] and "Traceback" not in "".join(log)


def test_an_idle_server_notices(live, packed, caplog):
    assert live.client.get("/ready").status_code == 200
    with open(packed / "model.safetensors", "r+b") as file:
        file.seek(-64, os.SEEK_END)
        file.write(bytes(64))
    check_lost(live.client, "was written to while its weights are in use")
    assert sum("can no longer be used" in record.message for record in caplog.records) == 1


def test_a_replaced_file_does_not_affect_the_server(live, packed: Path, caplog):
    def text() -> str:
        return live.client.post(TEXT, json=SHORT).json()["choices"][0]["text"]

    before = text()
    live.call(live.engine.log_replaced_files)
    assert not caplog.records
    (packed / "new").write_bytes(b"another model")
    os.replace(packed / "new", packed / "model.safetensors")
    assert text() == before and live.client.get("/ready").status_code == 200
    for _ in range(2):
        live.call(live.engine.log_replaced_files)
    (record,) = caplog.records
    assert str(packed / "model.safetensors") in record.message and "uses the loaded version" in record.message
