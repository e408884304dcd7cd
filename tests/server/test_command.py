"""`dso serve`: errors are reported before a model is loaded. The commands of README and docs are tested in tests/docs."""

from __future__ import annotations

import importlib.util
import re
import socket
import subprocess
import sys

import httpx
import pytest
import torch
from typer.testing import CliRunner

from deepseek_optimizer.integration.load import placement
from deepseek_optimizer.system import memory
from deepseek_optimizer_cli.app import app
from support.memory import memory_of
from support.warm_python import DSO, WarmPython


@pytest.fixture
def serve(tmp_path):
    """serve(*options) -> typer's result; the model does not exist, so an attempt to load it is an error."""

    def invoke(*options):
        return CliRunner().invoke(app, ["serve", str(tmp_path / "no-model"), *map(str, options)])

    return invoke


def error_of(result) -> str:
    assert result.exit_code == 2 and result.stderr.startswith("dso: ") and result.stderr.count("\n") == 1, result.output
    return result.stderr


def test_a_missing_extra_names_the_package(serve, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in ("fastapi", "uvicorn") else real(name))
    message = error_of(serve())
    assert "fastapi, uvicorn" in message and 'pip install "deepseek-optimizer[serve]"' in message


def test_the_command_needs_no_extra_to_show_its_help():
    code = (
        "import sys\nfor name in ('fastapi', 'uvicorn', 'httptools', 'orjson', 'prometheus_client'): sys.modules[name] = None\n"
        "from deepseek_optimizer_cli.app import app\n"
        "try: app(['serve', '--help'])\nexcept SystemExit as e: assert not e.code"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "--api-key-file" in done.stdout, done.stderr


def test_wrong_options(serve, tmp_path):
    assert "cannot be read" in error_of(serve("--api-key-file", tmp_path / "nowhere"))
    (tmp_path / "empty").write_text("# none\n")
    assert "contains no key" in error_of(serve("--api-key-file", tmp_path / "empty"))
    assert "hermes" in error_of(serve("--tool-format", "nothing"))
    assert "model, vllm, openai" in error_of(serve("--generation-config", "auto"))
    assert "no-model" in error_of(serve("--port", 0))
    assert "NAME=PATH" in error_of(serve("--lora", "name"))
    assert "given twice" in error_of(serve("--lora", "a=x", "--lora", "a=y"))
    assert "lora_dir" in error_of(serve("--allow-lora-loading"))
    assert "need --ray" in error_of(serve("--replicas", 2))
    assert "--port 0, --state-dir: not available with --ray" in error_of(serve("--ray", "--port", 0, "--state-dir", tmp_path))
    for option in ("--allow-lora-loading", "--enable-sleep-mode", "--access-log", "--log-format=json"):
        assert f"{option.partition('=')[0]}: not available with --ray" in error_of(serve("--ray", option))
    assert "--max-replicas must be" in error_of(serve("--ray", "--replicas", 3, "--max-replicas", 2))
    assert "--replica-cpus must be" in error_of(serve("--ray", "--replica-cpus", 0))
    assert "--no-drafts contradicts" in error_of(serve("--no-drafts", "--draft-precision", "int4"))
    assert "need a single model" in error_of(serve("other", "--draft-model", "small"))
    assert "localhost" in error_of(serve("--allow-origin", "example.com"))


def test_a_used_port_is_reported_before_loading(serve):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert "cannot listen at 127.0.0.1:" in error_of(serve("--port", taken.getsockname()[1]))


def test_too_large_a_cache_is_reported_before_loading(serve):
    assert "the KV cache: 1000000.00 GB needed" in error_of(serve("--kv-cache-memory", 10**15, "--port", 0))


def test_a_cache_on_a_card_is_checked_against_the_card(serve, monkeypatch):
    """Whose memory may be larger or smaller than the host's."""
    cards = {torch.device("cuda", 0): memory_of(10**16), torch.device("cpu"): memory_of(0)}
    monkeypatch.setattr(memory, "device_memory", cards.__getitem__)
    monkeypatch.setattr(placement, "why_no_cuda", lambda: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    options = "--kv-cache-memory", 10**15, "--port", 0
    assert "no-model" in error_of(serve("--device", "cuda", *options))
    assert "the KV cache: 1000000.00 GB needed, but only 0.00 GB" in error_of(serve(*options))


def test_an_ocr_model_that_cannot_see_is_reported_before_loading(serve, tiny_model):
    assert "--ocr needs one that sees" in error_of(serve("--ocr", tiny_model, "--port", 0))


def test_readable_key_files_give_a_warning(serve, tmp_path):
    (tmp_path / "keys").write_text("alpha\n")
    (tmp_path / "keys").chmod(0o644)
    result = serve("--api-key-file", tmp_path / "keys", "--port", 0)
    assert "chmod 600" in result.stderr or result.exit_code == 2


@pytest.fixture(scope="module")
def served(tiny_model):
    """The real command, with the tiny model."""
    process = WarmPython(DSO, "serve", tiny_model, "--port", "0", "--served-model-name", "r1-int4", "--draft-precision", "int8")
    banner = ""
    while "address" not in banner:
        line = process.stderr.readline()
        assert line, banner
        banner += line
    yield banner, int(re.search(r"http://127\.0\.0\.1:(\d+)/", banner)[1])
    process.terminate()
    process.communicate(timeout=30)
    assert process.returncode == 0


def test_props_and_defaults(served, tiny_model):
    _, port = served
    with httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
        props = client.get("/props").json()
        params = props["default_generation_settings"]["params"]
        (card,) = client.get("/v1/models").json()["data"]
    assert (params["temperature"], params["top_p"], params["max_tokens"]) == (0.7, 0.95, 256)  # a context of 256 tokens
    assert card["default_sampling"]["temperature"] == 0.7
    assert props["model_path"] == str(tiny_model) and props["total_slots"] == 32 and props["chat_template"]


def test_scanned_uploads(tiny_model, tmp_path):
    """The real command with an OCR model, whose weights are random."""
    pytest.importorskip("PIL", reason="needs Pillow")
    from support.documents import scanned_pdf
    from support.picture_processors import picture, save_pair

    save_pair(tmp_path / "seeing")
    process = WarmPython(DSO, "serve", tiny_model, "--port", "0", "--ocr", tmp_path / "seeing", "--max-scanned-pages", "1")
    banner = ""
    while "address" not in banner or "ocr " not in banner:
        line = process.stderr.readline()
        assert line, banner
        banner += line
    with httpx.Client(base_url=re.search(r"http://127\.0\.0\.1:\d+", banner)[0], timeout=120) as client:
        sent = [
            client.post("/v1/files", files={"file": ("a.pdf", scanned_pdf(pages))}, data={"purpose": "user_data"})
            for pages in (["Typed.", picture(60, 80)], [picture(60, 80)] * 2)
        ]
    process.terminate()
    process.communicate(timeout=30)
    assert sent[0].status_code == 200 and sent[0].json()["warnings"][0] == "pages that the OCR model has read: 2", sent[0].text
    assert sent[1].status_code == 400 and "at most 1 are read by the OCR model" in sent[1].text
    assert process.returncode == 0


def test_the_banner(served):
    banner, _ = served
    for word in (
        "model     r1-int4 (llama)",
        "backend",
        "threads",
        "context   256 tokens",
        "drafts    by the model itself in int8",
        "no API key required",
    ):
        assert word in banner
    free = r"half of the [\d,]+ MB that .+ would be [\d,]+ MB, shared with another model's"
    size = rf"grows to at most [\d,]+ MB \(32 sequences of 256 tokens; {free}\)"
    assert re.search(f"cache     fp32, {size}", banner), banner
