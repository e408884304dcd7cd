"""More threads than processors: a warning wherever they are requested."""

from __future__ import annotations

import json

import pytest

from deepseek_optimizer import load_model
from deepseek_optimizer.backends.cpu import native, oversubscription, unavailable_reason
from deepseek_optimizer.integration.bind.runtime import OptimizerWarning
from deepseek_optimizer.integration.load.pack_checkpoint import pack_checkpoint

pytestmark = pytest.mark.skipif(unavailable_reason() is not None, reason="no native build")


@pytest.fixture
def few(monkeypatch):
    """A machine with two processors."""
    monkeypatch.setattr(native.library(), "dso_usable_cpus", lambda: 2)


def test_as_many_threads_as_processors_give_no_warning(few):
    assert (
        oversubscription(1) is None
        and oversubscription(2) is None
        and "3 threads share the 2 processors" in (oversubscription(3) or "")
    )


def test_loading_warns(few, tiny_model):
    with pytest.warns(OptimizerWarning, match="3 threads share the 2 processors"):
        model = load_model(tiny_model, precision="int8", threads=3)
    assert any("3 threads" in warning for warning in model.report().to_dict()["warnings"])


def test_the_environment_counts_too(few, tiny_model, tmp_path, monkeypatch):
    monkeypatch.setenv("DSO_THREADS", "3")
    messages: list[str] = []
    pack_checkpoint(tiny_model, tmp_path / "out", {"precision": "int8"}, tell=messages.append)
    assert any("3 threads share the 2 processors" in line for line in messages)


def test_training_uses_the_environments_threads_and_warns(few, tiny_model, tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from deepseek_optimizer.train.ops.native import context
    from deepseek_optimizer_cli.app import app

    monkeypatch.setenv("DSO_THREADS", "3")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert context().threads == 3
    (tmp_path / "chats.jsonl").write_text(
        json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}), encoding="utf-8"
    )
    arguments = ["train", "--model", tiny_model, "--data", tmp_path / "chats.jsonl", "--output", tmp_path / "out", "--dry-run"]
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0 and "3 threads share the 2 processors" in result.stdout, result.output
