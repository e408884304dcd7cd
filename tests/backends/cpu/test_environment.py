"""The environment variables DSO_ISA and DSO_THREADS take effect, or raise an error."""

from __future__ import annotations

import pytest

from deepseek_optimizer import ConfigError, DeepSeekConfig, load_model
from deepseek_optimizer.backends.cpu import CpuBackend, native
from deepseek_optimizer.errors import BackendError


def test_a_forced_isa_runs(monkeypatch, tiny_model):
    first = native.isa_names()[0]
    monkeypatch.setenv("DSO_ISA", first)
    assert load_model(tiny_model).dso.backend.isa.startswith(first)
    monkeypatch.setenv("DSO_ISA", "")
    assert CpuBackend().isa == native.Context().isa


def test_an_unsupported_isa_names_the_missing_features(monkeypatch, tiny_model):
    missing = next((name for name in native.isa_names() if not native.isa_runs_here(name)), None)
    if missing is None:
        pytest.skip("this CPU runs every ISA")
    monkeypatch.setenv("DSO_ISA", missing)
    with pytest.raises(BackendError, match=f"DSO_ISA={missing}.*(lacks|missing|needs|cannot|not in this build)"):
        load_model(tiny_model)


def test_unknown_isa(monkeypatch, tiny_model):
    monkeypatch.setenv("DSO_ISA", "nonsense")
    with pytest.raises(BackendError, match=f"DSO_ISA=nonsense.*{native.isa_names()[0]}"):
        load_model(tiny_model)


def test_the_config_overrides_the_environment(monkeypatch):
    monkeypatch.setenv("DSO_ISA", "nonsense")
    monkeypatch.setenv("DSO_THREADS", "x")
    assert CpuBackend(isa=native.isa_names()[0], threads=2).threads == 2


def test_threads(monkeypatch, tiny_model):
    monkeypatch.setenv("DSO_THREADS", "3")
    assert load_model(tiny_model).dso.backend.threads == 3
    assert load_model(tiny_model, DeepSeekConfig(threads=2)).dso.backend.threads == 2


@pytest.mark.parametrize("text", ["0", "-1", "abc", "1.5", "99999999999999", "1025", " "])
def test_invalid_thread_counts(monkeypatch, tiny_model, text):
    monkeypatch.setenv("DSO_THREADS", text)
    with pytest.raises(ConfigError, match="DSO_THREADS must be a whole number"):
        load_model(tiny_model)
