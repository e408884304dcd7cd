"""/version, /load, sleep and wake, TLS, a prefix of all paths, request ids and logs."""

from __future__ import annotations

import datetime
import json
import logging
import re
import ssl
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from deepseek_optimizer import ConfigError, load_model, load_tokenizer
from deepseek_optimizer.integration.load.pack_checkpoint import pack_checkpoint
from deepseek_optimizer.server.http.logs import JsonFormatter, TextFormatter
from deepseek_optimizer.server.keys import ApiKeys
from deepseek_optimizer.server.run import check_tls
from deepseek_optimizer.server.settings import ServerSettings
from deepseek_optimizer.serving import make_async_engine
from support.certificates import issue_certificates
from support.live_server import LiveServer, assert_error, wait_for

ASKED = {"prompt": "x", "max_tokens": 4}


def test_version_and_load(live):
    assert isinstance(live.client.get("/version").json()["version"], str)
    assert live.client.get("/load").json()["server_load"] == 0
    live.engine.frozen = True
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(live.client.post, "/v1/completions", json={**ASKED, "n": 3})
        wait_for(lambda: live.engine.running == 3)
        load = live.client.get("/load").json()
        live.engine.frozen = False
        assert asked.result().status_code == 200
    assert load["server_load"] == load["running"] == 3 and load["waiting"] == 0
    assert load["queues"]["grammars"] == {"running": 0, "waiting": 0}


def test_sleep_must_be_enabled(client):
    assert client.get("/is_sleeping").json() == {"is_sleeping": False}
    for path in ("/sleep", "/wake_up"):
        assert_error(client.post(path), 404)


def assert_state(live, key, expected):
    """Compares the metric of the sleep."""
    families = text_string_to_metric_families(live.client.get("/metrics", headers=key).text)
    [family] = [family for family in families if family.name == "vllm:engine_sleep_state"]
    assert {sample.labels["sleep_state"]: sample.value for sample in family.samples} == {
        name: float(name == expected) for name in ("awake", "weights_offloaded", "discard_all")
    }


def test_sleep(make_server):
    live = make_server(ServerSettings(sleep_mode=True, keys=ApiKeys(["key"])))
    key = {"Authorization": "Bearer key"}
    assert_error(live.client.post("/sleep"), 401)
    assert live.client.post("/sleep", headers=key).status_code == 200
    assert live.client.get("/is_sleeping", headers=key).json() == {"is_sleeping": True}
    assert live.client.get("/ready").status_code == 503 and live.client.get("/health").status_code == 200
    for path, body in (("/v1/completions", ASKED), ("/v1/embeddings", {"input": "x"}), ("/tokenize", {"prompt": "x"})):
        refused = live.client.post(path, json=body, headers=key)
        assert_error(refused, 503)
        assert refused.headers["retry-after"] == "30" and "wake_up" in refused.text
    assert live.client.post("/sleep?level=2", headers=key).json() == {"released_bytes": 0}
    assert live.client.post("/sleep?level=3", headers=key).status_code == 400
    assert_state(live, key, "weights_offloaded")
    assert live.client.post("/wake_up?tags=weights", headers=key).json() == {"is_sleeping": True}  # only a part
    assert live.client.post("/wake_up?tags=kv_cache", headers=key).json() == {"is_sleeping": False}
    assert live.client.post("/wake_up?tags=other", headers=key).status_code == 400
    assert_state(live, key, "awake")
    assert live.client.post("/sleep?level=2", headers=key).status_code == 200
    assert_state(live, key, "discard_all")
    assert live.client.post("/wake_up", headers=key).json() == {"is_sleeping": False}
    assert live.client.post("/wake_up", headers=key).status_code == 200
    assert live.client.post("/v1/completions", json=ASKED, headers=key).status_code == 200
    assert live.client.get("/ready").status_code == 200


def test_requests_in_flight_end_before_the_sleep(make_server):
    live = make_server(ServerSettings(sleep_mode=True), step_seconds=0.005)
    with ThreadPoolExecutor(2) as pool:
        asked = pool.submit(live.client.post, "/v1/completions", json={**ASKED, "max_tokens": 30, "ignore_eos": True})
        wait_for(lambda: live.engine.running == 1)
        assert live.client.post("/sleep").status_code == 200
        assert asked.result().json()["usage"]["completion_tokens"] == 30
        live.client.post("/wake_up")
        live.engine.frozen = True
        asked = pool.submit(live.client.post, "/v1/completions", json=ASKED)
        wait_for(lambda: live.engine.running == 1)
        assert live.client.post("/sleep?mode=abort").status_code == 200
        assert asked.result().status_code == 503
    live.engine.frozen = False


def resident(path: Path) -> int:
    """Bytes of a file's mappings that are in memory."""
    parts = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(), flags=re.MULTILINE)
    mine = [part for part in parts if str(path) in part.partition("\n")[0]]
    return sum(int(re.search(r"^Rss: +(\d+) kB", part, re.MULTILINE)[1]) << 10 for part in mine)


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs /proc")
def test_sleep_releases_mapped_weights(tiny_model, tmp_path):
    packed = tmp_path / "packed"
    pack_checkpoint(tiny_model, packed, {"precision": "int8"}, tokenizer=load_tokenizer(tiny_model))
    model = load_model(packed, kv_cache_memory=1 << 22)
    if not list(model.dso.mappings):
        pytest.skip("the backend does not map files")
    (file,) = packed.glob("*.safetensors")
    with LiveServer(make_async_engine(model, load_tokenizer(packed)), ServerSettings(sleep_mode=True)) as live:
        question = {"prompt": "hello there, " * 8, "max_tokens": 8, "temperature": 0}
        before = live.client.post("/v1/completions", json=question).json()
        assert resident(file) > 0 and len(live.engine.core.prefix) > 0
        assert live.client.post("/sleep").status_code == 200
        assert resident(file) == 0 and len(live.engine.core.prefix) == 0 and live.engine.core.cache_usage() == 0
        assert_error(live.client.post("/v1/completions", json=question), 503)
        live.client.post("/wake_up")
        after = live.client.post("/v1/completions", json=question).json()
        assert after["choices"] == before["choices"] and after["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


@pytest.fixture(scope="module")
def certificates(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tls")
    issue_certificates(folder)
    return folder


def tls(folder: Path, **changes) -> ServerSettings:
    return ServerSettings(ssl_certfile=str(folder / "server.pem"), **{"ssl_keyfile": str(folder / "server-key.pem"), **changes})


@pytest.mark.parametrize("encrypted", [False, True])
def test_tls(make_server, certificates, encrypted):
    changes = {"ssl_keyfile": str(certificates / "server-encrypted.pem"), "ssl_keyfile_password": "secret"} if encrypted else {}
    settings = tls(certificates, **changes)
    check_tls(settings)
    assert "secret" not in repr(settings)
    live = make_server(settings)
    trust = ssl.create_default_context(cafile=str(certificates / "ca.pem"))
    with httpx.Client(base_url=f"https://127.0.0.1:{live.port}", verify=trust) as client:
        assert client.post("/v1/completions", json=ASKED).status_code == 200
        with client.stream("POST", "/v1/completions", json={**ASKED, "stream": True}) as streamed:
            assert "data: [DONE]" in streamed.read().decode()
        assert client.post("/v1/completions", content=b"x" * 100, headers={"content-type": "text/plain"}).status_code == 415
    with pytest.raises(httpx.HTTPError):
        live.client.get("/health")  # plain HTTP


def test_client_certificates(make_server, certificates):
    live = make_server(tls(certificates, ssl_ca_certs=str(certificates / "ca.pem")))
    trust = ssl.create_default_context(cafile=str(certificates / "ca.pem"))
    with httpx.Client(base_url=f"https://127.0.0.1:{live.port}", verify=trust) as client, pytest.raises(httpx.HTTPError):
        client.get("/health")
    trust.load_cert_chain(certificates / "client.pem", certificates / "client-key.pem")
    with httpx.Client(base_url=f"https://127.0.0.1:{live.port}", verify=trust) as client:
        assert client.get("/health").status_code == 200


@pytest.mark.parametrize(
    "changes",
    [
        {"ssl_keyfile": "/nowhere.pem"}, {"ssl_keyfile": "client-key.pem"}, {"ssl_ca_certs": "server-key.pem"},
        {"ssl_keyfile": "server-encrypted.pem"}, {"ssl_keyfile": "server-encrypted.pem", "ssl_keyfile_password": "wrong"},
    ],
)  # fmt: skip
def test_wrong_files_of_tls(certificates, changes):
    changes = {name: str(certificates / value) if value.endswith(".pem") else value for name, value in changes.items()}
    with pytest.raises(ConfigError, match="cannot be used"):
        check_tls(tls(certificates, **changes))


def test_wrong_settings():
    for fields in ({"ssl_keyfile": "x"}, {"root_path": "llm"}, {"root_path": "/llm/"}, {"root_path": "/a?b"}):
        with pytest.raises(ConfigError):
            ServerSettings(**fields)


def test_a_prefix_of_all_paths(make_server):
    live = make_server(ServerSettings(root_path="/llm", keys=ApiKeys(["key"])))
    key = {"Authorization": "Bearer key"}
    for prefix in ("", "/llm"):  # as a proxy forwards requests that removes the prefix, and one that does not
        assert live.client.get(f"{prefix}/health").status_code == 200  # needs no key
        assert_error(live.client.get(f"{prefix}/v1/models"), 401)
        assert live.client.get(f"{prefix}/v1/models", headers=key).status_code == 200
    for path in ("/llm/llm/v1/models", "/llmv1/models", "/llm/v1", "/other/v1/models"):
        assert_error(live.client.get(path, headers=key), 404)
    assert_error(live.client.get("/llmhealth"), 401)
    described = live.client.get("/openapi.json", headers={"Authorization": "Bearer key"}).json()
    assert described["servers"] == [{"url": "/llm"}] and "/v1/models" in described["paths"]


@pytest.fixture
def lines():
    """lines(formatter) -> a list of the lines that the server logs from then on."""
    logger, handlers = logging.getLogger("deepseek_optimizer.server"), []

    def start(formatter):
        written: list[str] = []

        class Handler(logging.Handler):
            def emit(self, record):
                written.append(self.format(record))

        handler = Handler()
        handler.setFormatter(formatter)
        logger.addHandler(handler)
        handlers.append(handler)
        logger.setLevel(logging.INFO)
        return written

    yield start
    for handler in handlers:
        logger.removeHandler(handler)


@pytest.mark.parametrize("given", ["abc-123", "4bf92f3577b34da6a3ce929d0e0e4736", "a" * 128])
def test_request_ids_are_returned_and_logged(make_server, lines, given):
    live, written = make_server(ServerSettings(access_log=True)), lines(JsonFormatter())
    response = live.client.post("/v1/completions", json=ASKED, headers={"X-Request-Id": given})
    assert response.headers["x-request-id"] == given
    wait_for(lambda: written)
    line = json.loads(written[-1])
    assert line["request_id"] == given and line["route"] == "/v1/completions" and line["method"] == "POST"
    assert line["status"] == 200 and line["seconds"] > 0 and line["level"] == "info"
    assert datetime.datetime.fromisoformat(line["time"]).tzinfo is not None


@pytest.mark.parametrize("given", ["", "a" * 129, 'a"b', "a b", "é", "a\tb"])
def test_other_ids_are_replaced(make_server, lines, given):
    live, written = make_server(ServerSettings(access_log=True)), lines(TextFormatter("%(message)s"))
    ids = {live.client.get("/health", headers=[(b"X-Request-Id", given.encode())]).headers["x-request-id"] for _ in range(2)}
    assert len(ids) == 2 and all(re.fullmatch("[0-9a-f]{32}", one) for one in ids)
    wait_for(lambda: len(written) >= 2)
    assert {line.rpartition("[")[2].rstrip("]") for line in written} == ids


def test_exceptions_in_json():
    try:
        raise ValueError("é\n\u2028")
    except ValueError as error:
        record = logging.LogRecord(
            "x", logging.ERROR, "f", 1, "failed: %s", ("a\nb",), (type(error), error, error.__traceback__)
        )
    line = JsonFormatter().format(record)
    assert "\n" not in line and json.loads(line)["message"] == "failed: a\nb" and "ValueError" in json.loads(line)["exception"]
