"""Options of replicas, without Ray."""

from __future__ import annotations

import pytest

from deepseek_optimizer.backends.cpu import native, unavailable_reason
from deepseek_optimizer.errors import ConfigError
from deepseek_optimizer_cli.serve_ray import cores_of_each


@pytest.mark.skipif(unavailable_reason() is not None, reason="no native build")
def test_processes_share_the_threads_that_a_model_takes_on_this_machine(monkeypatch):
    monkeypatch.setattr(native, "default_threads", lambda: 4)  # two hyper-threads a core
    monkeypatch.setattr(native.library(), "dso_usable_cpus", lambda: 8)
    assert [cores_of_each(processes) for processes in (1, 2, 3, 8)] == [4, 2, 1, 1]
    monkeypatch.setenv("DSO_THREADS", "6")
    assert cores_of_each(2) == 3
    monkeypatch.setenv("DSO_THREADS", "9")  # more than processors, which Ray would wait for without end
    assert cores_of_each(1) == 8
    monkeypatch.setenv("DSO_THREADS", "many")
    with pytest.raises(ConfigError, match="DSO_THREADS"):
        cores_of_each(2)
