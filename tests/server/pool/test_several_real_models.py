"""The real command with two models in a directory: one loaded at a time, one pool of threads, prompts known after a restart."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from deepseek_optimizer_cli.app import app
from support.live_server import wait_for
from support.warm_python import DSO, WarmPython

PROMPT = "a prompt of more than two blocks, " * 3  # 102 bytes, each of which is a token


@contextmanager
def served(*options: object) -> Iterator[httpx.Client]:
    """`dso serve` with these options; it must end with status 0."""
    process = WarmPython(DSO, "serve", *options, "--port", "0")
    log = ""
    while "address" not in log:
        line = process.stderr.readline()
        assert line, log
        log += line
    found = re.search(r"http://127\.0\.0\.1:(\d+)/", log)
    assert found is not None
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{found[1]}", timeout=60) as client:
            yield client
    finally:
        process.terminate()
        process.communicate(timeout=60)
    assert process.returncode == 0


def ask(client: httpx.Client, model: str) -> dict:
    body = {"model": model, "prompt": PROMPT, "max_tokens": 20, "temperature": 0, "ignore_eos": True}
    answer = client.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def loaded(client: httpx.Client) -> list[str]:
    return [m["id"] for m in client.get("/v1/models").json()["data"] if m["status"]["value"] == "loaded"]


@pytest.fixture
def directory(tiny_model: Path, tmp_path: Path) -> Path:
    for name, temperature in (("first", 0.5), ("second", 0.25)):
        shutil.copytree(tiny_model, tmp_path / "models" / name)
        settings = {"do_sample": True, "temperature": temperature}
        (tmp_path / "models" / name / "generation_config.json").write_text(json.dumps(settings))
    (tmp_path / "models" / "broken").mkdir()
    (tmp_path / "models" / "broken" / "config.json").write_text("{}")
    return tmp_path / "models"


@pytest.mark.slow
def test_two_models_take_turns_and_remember_prompts(directory, tmp_path):
    options = ["--models-dir", directory, "--prefix-cache-dir", tmp_path / "cache", "--kv-cache-memory", 1 << 24]
    with served(*options, "--models-memory", 20 << 20) as client:  # room for one
        texts = [ask(client, name)["choices"][0]["text"] for name in ("first", "second", "first")]
        assert texts[0] == texts[1] == texts[2] and loaded(client) == ["first"]
        cards = {m["id"]: m for m in client.get("/v1/models").json()["data"]}
        assert cards["first"]["default_sampling"]["temperature"] == 0.5 and cards["second"]["max_model_len"] == 256
        assert client.post("/v1/completions", json={"model": "broken", "prompt": "a"}).status_code == 503
        assert str(directory) not in client.get("/v1/models").text
    with served(*options, "--pin", "second") as client:
        wait_for(lambda: client.get("/ready").status_code == 200, 60)
        with ThreadPoolExecutor(4) as threads:
            answers = list(threads.map(lambda n: ask(client, ("first", "second")[n % 2]), range(8)))
        assert all(a["choices"][0]["text"] == texts[0] for a in answers) and loaded(client) == ["first", "second"]
        assert all(a["usage"]["prompt_tokens_details"]["cached_tokens"] == 96 for a in answers)


def test_wrong_options(tmp_path):
    def error_of(*options: object) -> str:
        result = CliRunner().invoke(app, ["serve", *map(str, options), "--port", "0"])
        assert result.exit_code == 2 and result.stderr.startswith("dso: "), result.output
        return str(result.stderr)

    assert "--models-dir" in error_of()
    assert "cannot be read" in error_of("--models-dir", tmp_path / "none")
    assert "need several models" in error_of(tmp_path / "a", "--pin", "a")
    assert "--served-model-name" in error_of(tmp_path / "a", tmp_path / "b", "--served-model-name", "c")
    assert "there is no model 'c'" in error_of(tmp_path / "a", tmp_path / "b", "--pin", "c")
    assert "two models have the name a" in error_of(tmp_path / "a", tmp_path / "x" / "a")
