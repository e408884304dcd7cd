"""LoRA adapters in the API: listed, chosen by `model`, loaded and unloaded by requests only if that is allowed."""

from __future__ import annotations

import os

import pytest

from deepseek_optimizer.errors import AdapterError, CheckpointError, ConfigError, NotEnoughMemoryError
from deepseek_optimizer.server.settings import ServerSettings
from support.live_server import assert_error

LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"


@pytest.fixture
def allowed(make_server, tmp_path):
    """A server whose requests may load adapters from a directory, and that directory."""
    root = tmp_path / "adapters"
    for name in ("one", "deep/two"):
        (root / name).mkdir(parents=True)
    (tmp_path / "outside").mkdir()
    (root / "link").symlink_to(tmp_path / "outside")
    (root / "file").write_text("x")
    return make_server(ServerSettings(allow_lora_loading=True, lora_dir=str(root))), root


def names(live):
    return [card["id"] for card in live.client.get("/v1/models").json()["data"]]


def test_loading_choosing_and_unloading(allowed):
    live, root = allowed
    answer = live.client.post(LOAD, json={"lora_name": "first", "lora_path": "one"})
    assert answer.status_code == 200 and answer.text == "Success: LoRA adapter 'first' added successfully."
    assert live.client.post(LOAD, json={"lora_name": "second", "lora_path": str(root / "deep/two")}).status_code == 200
    assert [str(adapter.path) for adapter in live.engine.adapters] == [str(root / "one"), str(root / "deep/two")]
    assert names(live) == ["fake-model", "first", "second"]
    card = live.client.get("/v1/models/second").json()
    assert card["parent"] == "fake-model" and card["id"] == "second" and card["root"] == str(root / "deep/two")
    base = live.client.get("/v1/models/fake-model").json()
    assert base["root"] == "fake-model" and base["parent"] is None
    for path, body in (
        ("/v1/completions", {"prompt": "x", "max_tokens": 2}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2}),
        ("/v1/responses", {"input": "x", "max_output_tokens": 2}),
        ("/v1/embeddings", {"input": "x"}),
    ):
        answer = live.client.post(path, json={"model": "second", **body}).json()
        assert answer["model"] == "second" and live.engine.seen[-1].adapter == "second"
        answer = live.client.post(path, json={"model": "fake-model", **body}).json()
        assert answer["model"] == "fake-model" and live.engine.seen[-1].adapter == ""
        live.client.post(path, json=body)
        assert live.engine.seen[-1].adapter == ""
    answer = live.client.post(UNLOAD, json={"lora_name": "first", "lora_int_id": 1})
    assert answer.status_code == 200 and answer.text == "Success: LoRA adapter 'first' removed successfully."
    assert names(live) == ["fake-model", "second"]
    assert_error(live.client.post("/v1/completions", json={"model": "first", "prompt": "x"}), 404, "model")
    assert_error(live.client.post(UNLOAD, json={"lora_name": "first"}), 404, "lora_name")
    again = {"lora_name": "second", "lora_path": "one"}
    assert_error(live.client.post(LOAD, json=again), 400, "lora_name")
    assert live.client.post(LOAD, json={**again, "load_inplace": True}).status_code == 200
    assert live.client.get("/v1/models/second").json()["root"] == str(root / "one")


@pytest.mark.parametrize(
    "path",
    [
        "..",
        ".",
        "../outside",
        "/etc",
        "one/../../outside",
        "link",
        "file",
        "missing",
        "one\x00",
        "~",
        "one/" * 500,
    ],
)
def test_paths_outside_the_directory(allowed, path):
    live, _ = allowed
    answer = live.client.post(LOAD, json={"lora_name": "a", "lora_path": path})
    assert_error(answer, 404, "lora_path")
    assert names(live) == ["fake-model"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"lora_path": "one"}, "lora_name"),
        ({"lora_name": "a"}, "lora_path"),
        ({"lora_name": "", "lora_path": "one"}, "lora_name"),
        ({"lora_name": "a" * 300, "lora_path": "one"}, "lora_name"),
        ({"lora_name": 1, "lora_path": "one"}, "lora_name"),
        ({"lora_name": "a", "lora_path": ["one"]}, "lora_path"),
        ({"lora_name": "a", "lora_path": ""}, "lora_path"),
        ({"lora_name": "a", "lora_path": "x" * 5000}, "lora_path"),
    ],
)
def test_invalid_bodies(allowed, body, param):
    assert_error(allowed[0].client.post(LOAD, json=body), 400, param)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (lambda path: AdapterError("adapts 'lm_head', which is not supported", path=path), 400),
        (lambda path: CheckpointError("is truncated", file=path / "adapter_model.safetensors"), 400),
        (lambda path: NotEnoughMemoryError("the adapter", 10, 1, "free memory"), 503),
    ],
)
def test_failures_name_no_paths(allowed, monkeypatch, error, status):
    live, root = allowed

    def fail(name, path, replace):
        raise error(path)

    monkeypatch.setattr(live.engine, "load_adapter", fail)
    answer = live.client.post(LOAD, json={"lora_name": "a", "lora_path": "one"})
    assert_error(answer, status, "lora_path" if status == 400 else None)
    assert str(root) not in answer.text and os.sep + "one" not in answer.text


def test_not_unless_allowed(make_server, tmp_path):
    live = make_server(ServerSettings(lora_dir=str(tmp_path)))
    for path in (LOAD, UNLOAD):
        assert_error(live.client.post(path, json={"lora_name": "a", "lora_path": "b"}), 404)
        assert path not in live.client.get("/openapi.json").json()["paths"]
    with pytest.raises(ConfigError, match="lora_dir"):
        ServerSettings(allow_lora_loading=True)


def test_the_schema_has_the_routes(allowed):
    paths = allowed[0].client.get("/openapi.json").json()["paths"]
    assert LOAD in paths and UNLOAD in paths
