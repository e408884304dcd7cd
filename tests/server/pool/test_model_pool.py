"""A server with several models, over engines without models: loading by name, unloading by least use, and what clients see."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from deepseek_optimizer.errors import CheckpointError, ConfigError
from deepseek_optimizer.server.http.json_body import PICTURE_BODY
from deepseek_optimizer.server.keys import ApiKeys
from deepseek_optimizer.server.pool.model_list import ModelFile
from deepseek_optimizer.server.pool.model_pool import ModelPool
from deepseek_optimizer.server.pool_app import create_pool_app, opener
from deepseek_optimizer.server.settings import ServerSettings
from support import batches
from support.fake_engine import FakeEngine
from support.live_server import LiveServer, assert_error, wait_for

MB = 1 << 20


class Models:
    """Models of 10 MB by name, loaded by `load`, which waits while `held` is cleared."""

    def __init__(self, tokenizer: Any, *names: str) -> None:
        self.tokenizer, self.files = tokenizer, {name: ModelFile(name, f"/secret/{name}", 10 * MB, 512) for name in names}
        self.events: list[str] = []
        self.engines: dict[str, FakeEngine] = {}
        self.held, self.errors = threading.Event(), dict[str, Exception]()
        self.held.set()
        self.at_once = self.loading = 0
        self.step_seconds = 0.0

    def list_files(self) -> dict[str, ModelFile]:
        return dict(self.files)

    def load(self, file: ModelFile) -> tuple[FakeEngine, ServerSettings, int]:
        self.loading += 1
        self.at_once = max(self.at_once, self.loading)
        assert self.held.wait(20)
        self.loading -= 1
        if (error := self.errors.get(file.name)) is not None:
            raise error
        self.events.append(f"load {file.name}")
        engine = FakeEngine(self.tokenizer, model_name=file.name, step_seconds=self.step_seconds)
        closing, name = engine.close, file.name

        async def close() -> None:
            self.events.append(f"unload {name}")
            await closing()

        engine.close = close
        self.engines[name] = engine
        return engine, ServerSettings(), 10 * MB


@pytest.fixture
def models(byte_tokenizer) -> Models:
    return Models(byte_tokenizer, "a", "b", "c")


@pytest.fixture
def serve(models, monkeypatch):
    """serve(**options of ModelPool) -> a running server."""
    # The processes for templates and grammars take a second to start.
    monkeypatch.setattr("deepseek_optimizer.server.state.ServerState.warm_up", lambda _: None)
    monkeypatch.setattr("gc.collect", lambda *_: 0)  # of this process it takes half a second

    @contextmanager
    def start(settings: ServerSettings | None = None, **options: Any) -> Iterator[LiveServer]:
        settings = settings or ServerSettings()
        pool = ModelPool(settings, models.list_files, opener(models.load), **{"memory": 25 * MB, **options})
        with LiveServer(None, settings, app=create_pool_app(pool)) as live:
            yield live

    return start


def ask(live: LiveServer, model: str | None, **fields: Any) -> httpx.Response:
    body = {"prompt": "hello", "max_tokens": 8, **({} if model is None else {"model": model}), **fields}
    return live.client.post("/v1/completions", json=body)


def status_of(live: LiveServer, name: str) -> dict[str, Any]:
    return next(m for m in live.client.get("/v1/models").json()["data"] if m["id"] == name)


def test_models_are_loaded_when_requests_name_them(serve, models):
    with serve() as live:
        cards = live.client.get("/v1/models").json()["data"]
        assert [(m["id"], m["status"]["value"], m["size_bytes"], m["max_model_len"]) for m in cards] == [
            (name, "unloaded", 10 * MB, 512) for name in "abc"
        ]
        assert models.events == []
        answer = ask(live, "b")
        assert answer.status_code == 200 and answer.json()["model"] == "b" and models.events == ["load b"]
        assert ask(live, "b").json()["choices"] == answer.json()["choices"] and models.events == ["load b"]
        card = status_of(live, "b")
        assert card["status"] == {"value": "loaded", "failed": False, "pinned": False} and card["max_model_len"] == 4096
        assert live.client.get("/v1/models/b").json() == card and live.client.get("/models").json()["data"][1] == card
        streamed = ask(live, "a", stream=True).text
        assert streamed.endswith("data: [DONE]\n\n") and '"model":"a"' in streamed


def test_an_empty_name_is_refused(serve, models):
    with serve() as live:
        assert_error(ask(live, ""), 400, "model")
        assert models.events == []


@pytest.mark.parametrize("name", ["d", "../a", "/secret/a", "a/../b", "x" * 1024])
def test_unknown_names(serve, models, name):
    with serve() as live:
        assert_error(ask(live, name), 404, "model")
        assert live.client.get(f"/v1/models/{quote(name or ' ', safe='')}").status_code == 404
        for path in ("/models/load", "/models/unload"):
            assert live.client.post(path, json={"model": name}).status_code == (404 if name else 400)
        assert models.events == []


def test_requests_that_name_no_model(serve, models):
    with serve() as live:
        assert_error(ask(live, None), 400, "model")
        ask(live, "b")
        assert ask(live, None).json()["model"] == "b"  # the last one used
    with serve(default="c") as live:
        assert ask(live, None).json()["model"] == "c"
    del models.files["b"], models.files["c"]
    with serve() as live:
        assert live.client.get("/favicon.ico").status_code == 404 and models.events.count("load a") == 0
        assert ask(live, None).json()["model"] == "a"
        assert live.client.get("/nothing").status_code == 404


def test_one_load_at_a_time_and_once_for_all_requests(serve, models):
    with serve(memory=100 * MB) as live, ThreadPoolExecutor(12) as threads:
        answers = list(threads.map(lambda n: ask(live, "abc"[n % 3]), range(12)))
        assert [a.json()["model"] for a in answers] == list("abcabcabcabc")
        assert sorted(models.events) == ["load a", "load b", "load c"] and models.at_once == 1


def test_the_least_recently_used_model_is_unloaded(serve, models):
    with serve() as live:  # room for two
        for name in "abac":
            ask(live, name)
        assert models.events == ["load a", "load b", "unload b", "load c"]
        ask(live, "b")
        assert models.events[4:] == ["unload a", "load b"] and status_of(live, "a")["status"]["value"] == "unloaded"


def test_pinned_models_stay(serve, models):
    with serve(pinned=["a"]) as live:
        wait_for(lambda: models.events == ["load a"])
        for name in "bcb":
            assert ask(live, name).status_code == 200
        assert models.events == ["load a", "load b", "unload b", "load c", "unload c", "load b"]
        assert status_of(live, "a")["status"]["pinned"]
    with pytest.raises(ConfigError, match="there is no model 'x'"), serve(pinned=["x"]):
        pass


def test_requests_in_flight_are_not_cut(serve, models):
    """A stream ends as it would; the model that needs its memory, and later requests for its own, wait."""
    models.step_seconds = 0.02
    with serve(memory=15 * MB) as live, ThreadPoolExecutor(4) as threads:
        expected = ask(live, "a", max_tokens=40).json()["choices"][0]["text"]
        body = {"prompt": "hello", "model": "a", "max_tokens": 40, "stream": True}
        with live.client.stream("POST", "/v1/completions", json=body) as stream:
            lines = stream.iter_lines()
            first = next(lines)
            other = threads.submit(ask, live, "b")
            wait_for(lambda: status_of(live, "a")["status"]["value"] == "unloading")
            later = threads.submit(ask, live, "a")
            assert models.events == ["load a"]
            events = [json.loads(line[6:]) for line in [first, *lines] if line.startswith("data: {")]
        assert "".join(e["choices"][0]["text"] for e in events if e["choices"]) == expected
        assert other.result().json()["model"] == "b" and later.result().json()["model"] == "a"
        assert models.events == ["load a", "unload a", "load b", "unload b", "load a"]


def test_a_request_waits_for_a_bounded_time(serve, models):
    models.held.clear()
    with serve(load_seconds=0.2) as live:
        answer = ask(live, "a")
        assert_error(answer, 503)
        assert answer.headers["Retry-After"] == "10" and status_of(live, "a")["status"]["value"] == "loading"
        models.held.set()
        wait_for(lambda: status_of(live, "a")["status"]["value"] == "loaded")
        assert ask(live, "a").status_code == 200


def test_a_model_that_cannot_be_loaded(serve, models, monkeypatch):
    models.errors["a"] = CheckpointError("has no tensor x", file="/secret/a")
    models.errors["b"] = RuntimeError("/secret/b is broken")
    with serve() as live:
        for name, reason in (("a", "a: has no tensor x"), ("b", "RuntimeError")):
            answer = ask(live, name)
            assert_error(answer, 503)
            assert reason in answer.text and "secret" not in answer.text and answer.headers["Retry-After"] == "30"
            status = status_of(live, name)["status"]
            assert status["value"] == "failed" and status["failed"] and reason in status["reason"]
        models.errors.clear()
        assert ask(live, "a").status_code == 503  # not tried again at once
        assert live.client.post("/models/load", json={"model": "a"}).json() == {"success": True}
        wait_for(lambda: status_of(live, "a")["status"]["value"] == "loaded")
        monkeypatch.setattr("deepseek_optimizer.server.pool.model_pool._RETRY", 0.0)
        assert ask(live, "a").status_code == ask(live, "b").status_code == 200


def test_a_model_that_is_too_large(serve, models):
    with serve(memory=5 * MB) as live:
        answer = ask(live, "a")
        assert_error(answer, 503)
        assert "--models-memory" in answer.text and models.events == []
    with serve(pinned=["a"], memory=15 * MB) as live:
        wait_for(lambda: models.events == ["load a"])
        assert "--models-memory" in ask(live, "b").text


def test_loading_and_unloading_by_request(serve, models):
    with serve() as live:
        assert_error(live.client.post("/models/unload", json={"model": "a"}), 400, "model")
        assert live.client.post("/models/load", json={"model": "a"}).json() == {"success": True}
        wait_for(lambda: status_of(live, "a")["status"]["value"] == "loaded")
        assert live.client.post("/models/unload", json={"model": "a"}).json() == {"success": True}
        wait_for(lambda: status_of(live, "a")["status"]["value"] == "unloaded")
        assert models.events == ["load a", "unload a"]
        assert live.client.post("/models/load", json={"model": 3}).status_code == 400
        assert ask(live, "a").status_code == 200


def test_new_and_removed_files(serve, models):
    with serve() as live:
        models.files["d"] = ModelFile("d", "/secret/d", MB)
        assert [m["id"] for m in live.client.get("/v1/models").json()["data"]] == ["a", "b", "c", "d"]
        assert ask(live, "d").status_code == 200
        del models.files["d"], models.files["a"]
        assert [m["id"] for m in live.client.get("/v1/models").json()["data"]] == ["b", "c", "d"]  # d is loaded
        assert ask(live, "a").status_code == 404


def test_an_engine_that_has_stopped_is_not_loaded_again(serve, models):
    """The server is about to end then, see `engine_death`."""
    with serve() as live:
        ask(live, "a")
        ask(live, "b")
        assert live.client.get("/health").status_code == live.client.get("/ready").status_code == 200
        live.call(models.engines["a"].die)
        assert_error(ask(live, "a"), 503)
        assert_error(live.client.post("/models/load", json={"model": "a"}), 503)
        assert ask(live, "b").status_code == 200 and models.events == ["load a", "load b"]
        for path in ("/health", "/ready"):
            answer = live.client.get(path)
            assert answer.status_code == 503 and answer.json() == {"status": "dead"}


def test_metrics_of_all_models(serve, models):
    with serve() as live:
        ask(live, "a")
        ask(live, "b")
        families = list(text_string_to_metric_families(live.client.get("/metrics").text))
        names = [family.name for family in families]
        assert len(names) == len(set(names))
        samples = {(s.name, s.labels.get("model_name"), s.labels.get("status")): s.value for f in families for s in f.samples}
        assert samples["dso:model_status", "a", "loaded"] == 1 and samples["dso:model_status", "c", "unloaded"] == 1
        assert samples["dso:model_memory_bytes", "b", None] == 10 * MB and samples["dso:model_loads_total", None, None] == 2
        queues = {s.labels["model_name"] for f in families if f.name == "dso:queue_waiting" for s in f.samples}
        assert queues == {"a", "b", ""}
        handlers = {s.labels["handler"] for f in families if f.name == "http_requests" for s in f.samples}
        assert "/v1/completions" in handlers


def test_ollama_s_clients_see_all_models(serve, models):
    with serve() as live:
        tags = live.client.get("/api/tags").json()["models"]
        assert [(m["name"], m["size"]) for m in tags] == [(f"{name}:latest", 10 * MB) for name in "abc"]
        assert live.client.get("/api/ps").json() == {"models": []} and models.events == []
        assert live.client.get("/api/version").json()["version"] and models.events == []
        body = {"model": "b:latest", "prompt": "hello", "stream": False, "options": {"num_predict": 4}}
        assert live.client.post("/api/generate", json=body).json()["eval_count"] == 4
        assert live.client.post("/api/show", json={"name": "a:latest"}).status_code == 200
        running = live.client.get("/api/ps").json()["models"]
        assert [(m["name"], m["size"]) for m in running] == [("a:latest", 10 * MB), ("b:latest", 10 * MB)]
        assert live.client.post("/api/show", json={"name": "d:latest"}).status_code == 404


def test_version_and_load_need_no_model(serve, models):
    models.held.clear()
    with serve() as live, ThreadPoolExecutor(1) as threads:
        assert live.client.get("/version").json()["version"]
        idle = live.client.get("/load").json()
        assert idle["server_load"] == 0 and idle["queues"]["models"] == {"running": 0, "waiting": 0}
        answer = threads.submit(ask, live, "a")
        wait_for(lambda: live.client.get("/load").json()["queues"]["models"]["waiting"] == 1)
        models.held.set()
        assert answer.result().status_code == 200 and "grammars" in live.client.get("/load").json()["queues"]


def test_health_and_readiness(serve, models):
    models.held.clear()
    with serve(pinned=["a"]) as live:
        assert live.client.get("/health").status_code == 200
        waiting = live.client.get("/ready")
        assert waiting.status_code == 503 and waiting.json() == {"status": "loading"}
        models.held.set()
        wait_for(lambda: live.client.get("/ready").status_code == 200)


def test_keys_and_files_are_those_of_the_server(serve, models):
    with serve(ServerSettings(keys=ApiKeys(["one", "two"]))) as live:
        assert ask(live, "a").status_code == 401 and models.events == []
        assert live.client.post("/models/load", json={"model": "a"}).status_code == 401
        headers = {"Authorization": "Bearer one"}
        file = {"file": ("a.txt", b"Some text."), "purpose": (None, "user_data")}
        stored = live.client.post("/v1/files", files=file, headers=headers).json()
        assert live.client.get("/v1/files", headers=headers).json()["data"] == [stored]
        assert live.client.get("/v1/files", headers={"Authorization": "Bearer two"}).json()["data"] == []
        assert live.client.delete(f"/v1/files/{stored['id']}", headers=headers).json()["deleted"]


def test_invalid_bodies(serve, models):
    with serve() as live:
        for content, status in ((b"{", 400), (b"[]", 400), (b"x" * (PICTURE_BODY + 1), 413)):
            headers = {"content-type": "application/json"}
            assert live.client.post("/v1/completions", content=content, headers=headers).status_code == status
        assert live.client.post("/v1/completions", content=b"{}").status_code == 415
        assert_error(live.client.post("/v1/completions", json={"model": "a", "prompt": 3}), 400, "prompt")
        assert_error(live.client.post("/v1/completions", json={"model": 3, "prompt": "a"}), 400, "model")


def test_waiting_requests_are_bounded_and_end_when_clients_leave(serve, models, monkeypatch):
    monkeypatch.setattr("deepseek_optimizer.server.pool.model_pool._MAX_WAITING", (2, 4))
    models.held.clear()
    with serve() as live:
        pool = live.app.state.server
        with ThreadPoolExecutor(4) as threads:
            first = [threads.submit(ask, live, "a") for _ in range(2)]
            wait_for(lambda: pool._waiting.total() == 2)
            refused = ask(live, "a")
            assert_error(refused, 429)
            models.held.set()
            assert all(future.result().status_code == 200 for future in first)
        models.held.clear()
        with pytest.raises(httpx.ReadTimeout):
            live.client.post("/v1/completions", json={"model": "b", "prompt": "a"}, timeout=0.3)
        wait_for(lambda: pool._waiting.total() == 0)
        models.held.set()


def test_a_server_that_stops_refuses_those_who_wait(serve, models):
    models.held.clear()
    with serve() as live, ThreadPoolExecutor(2) as threads:
        answer = threads.submit(ask, live, "a")
        wait_for(lambda: live.app.state.server._waiting.total() == 1)
        live.server.stop()
        assert answer.result().status_code == 503
        models.held.set()
        live.thread.join(20)
        assert not live.thread.is_alive() and models.events in ([], ["load a"], ["load a", "unload a"])


def test_a_busy_model_keeps_no_other_out(serve, models):
    """Requests for one model arrive without end; another one is loaded all the same."""
    models.step_seconds = 0.005
    with serve(memory=15 * MB) as live, ThreadPoolExecutor(6) as threads:
        ask(live, "a")
        stop, begun = threading.Event(), time.monotonic()

        def crowd() -> list[int]:
            statuses = []
            while not stop.is_set() and time.monotonic() - begun < 15:
                statuses.append(ask(live, "a").status_code)
            return statuses

        crowds = [threads.submit(crowd) for _ in range(3)]
        assert ask(live, "b").status_code == 200
        stop.set()
        assert all(status == 200 for future in crowds for status in future.result())


def test_batches_name_models(serve, models):
    """The requests of one batch may be for several models, which are loaded for them."""
    with serve() as live:
        data = batches.lines(3, model="a", max_tokens=2) + batches.lines(1, model="none").replace(b"r0", b"wrong")
        batch = batches.ended(live.client, batches.create(live.client, batches.upload(live.client, data)))
        assert batch["request_counts"] == {"total": 4, "completed": 3, "failed": 1} and models.events == ["load a"]
        assert {line["response"]["body"]["model"] for line in batches.content(live.client, batch["output_file_id"])} == {"a"}
        (error,) = batches.content(live.client, batch["error_file_id"])
        assert error["custom_id"] == "wrong" and error["response"]["body"]["error"]["code"] == "model_not_found"
