"""The plans of vision towers give what Transformers computes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from support import triton_interpreter

triton_interpreter.require()

from deepseek_optimizer.backends import cuda
from deepseek_optimizer.backends.cuda.backend import CudaBackend
from integration.multimodal import test_tower as towers


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    """Backend `cuda` on the CPU."""
    spec = replace(cuda.SPEC, device_types=("cpu",), create=lambda where, settings: CudaBackend(where, False))
    monkeypatch.setattr(cuda, "SPEC", spec)


@pytest.mark.parametrize("family", towers.TOWERS)
def test_results_are_those_of_transformers(family):
    """Windows, whole pictures over a cache, RoPE of height and width, relative positions, padding."""
    model, arguments = towers.model_of(family), towers.pictures_of(family, 1)
    ours = towers.optimized(model, backend="cuda")
    assert ours.report().backend == "cuda" and set(ours.report().towers.values()) == {"plan"}
    towers.assert_close(towers.features(ours, arguments), towers.features(model, arguments))
