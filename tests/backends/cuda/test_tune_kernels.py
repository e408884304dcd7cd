"""Steps of a model are timed with several divisions, whose results are those of the reference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from support import triton_interpreter

triton_interpreter.require()

from deepseek_optimizer import load_model
from deepseek_optimizer.backends import cuda
from deepseek_optimizer.backends.base import CompileOptions
from deepseek_optimizer.backends.cuda import tuning
from deepseek_optimizer.backends.cuda.alternatives import choice_of
from deepseek_optimizer.backends.cuda.backend import CudaBackend
from deepseek_optimizer.backends.cuda.cost_table import Card, read, read_choices
from deepseek_optimizer.backends.cuda.division import DEFAULT, Division
from deepseek_optimizer.backends.cuda.scaled_mm import SCALED_MM
from deepseek_optimizer.errors import ConfigError
from deepseek_optimizer.tune import kernels
from support import family_configs as configs
from support.models import assert_close_rows, random_ids, random_model

from .plans import FORMAT_TOLERANCE, pair, stepwise

CPU = torch.device("cpu")
TINY = {
    "vocab_size": 31, "hidden_size": 40, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1,
}  # fmt: skip
OTHER = Division(programs=4, most_splits=2, vector_warps=2, block_n=32, tile_warps=8, tile_stages=1, chunk_blocks=2)


@pytest.fixture
def model(monkeypatch, tmp_path):
    """On backend `cuda`, in the interpreter."""
    spec = replace(cuda.SPEC, device_types=("cpu",), create=lambda where, settings: CudaBackend(where))
    monkeypatch.setattr(cuda, "SPEC", spec)
    random_model(configs.llama(**TINY)).save_pretrained(tmp_path)
    return load_model(tmp_path, backend="cuda", kv_cache_memory=1 << 20)


def test_any_division_gives_the_same_results():
    model = random_model(configs.llama(**TINY))
    made, exact = pair(CudaBackend(CPU, division=OTHER), model, "int4")
    assert made.plan.division == OTHER and made.plan._weights.matrices["lm_head.weight"].division == OTHER
    ids = random_ids(model.config, 10)
    assert_close_rows(stepwise(made, ids), stepwise(exact, ids), FORMAT_TOLERANCE["int4"])


def test_times_of_steps(model, monkeypatch):
    """The model's own plan keeps its division."""
    for name, value in (("CONTEXT", 33), ("PROMPT", 3), ("STEPS", {"decode": 2, "prompt": 2}), ("_WARM", 1)):
        monkeypatch.setattr(kernels, name, value)
    clock = iter(range(100))
    times = kernels.StepTimes(model, clock=lambda: next(clock))
    assert times.start == DEFAULT
    assert times(DEFAULT, "decode") == times(OTHER, "decode") == times(OTHER, "prompt") == 0.5
    assert list(times._plans) == [(DEFAULT, None), (OTHER, None)] and model.dso.plan.division == DEFAULT
    times(replace(OTHER, tile_warps=4), "decode")
    assert (DEFAULT, None) not in times._plans


def test_what_is_found_is_written(model, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    gain = tuning.Gain("tile_warps", 4, 8, 0.2)
    monkeypatch.setattr(kernels, "tune", lambda measure, start, note: (replace(start, tile_warps=8), [gain]))
    card = Card("a card", (9, 0), 132, "580.1", "3.9.0", "1.0")
    found = kernels.tune_kernels(model, card)
    assert read(card) == replace(DEFAULT, tile_warps=8) and found.path == card.path
    assert found.to_dict()["gains"] == [{"setting": "tile_warps", "before": 4, "after": 8, "gain": 0.2}]
    assert model.dso.plan.division == DEFAULT  # a plan that exists is not changed


def test_alternatives_that_are_faster_are_written(model, monkeypatch, tmp_path):
    """They stay when the kernels are tuned with a model that they do not fit."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(kernels, "tune", lambda measure, start, note: (start, []))
    for name, value in (("PROMPT", 3), ("STEPS", {"decode": 1, "prompt": 1}), ("_WARM", 1)):
        monkeypatch.setattr(kernels, name, value)
    measured = []

    def faster_rows(measure, name, note):
        measured.append((measure(name, 6), measure(None, 6)))
        return 64, 0.3

    monkeypatch.setattr(kernels, "faster_rows", faster_rows)
    monkeypatch.setattr(kernels, "available", lambda device: [replace(SCALED_MM, fits=lambda product: True)])
    card, wanted = Card("a card", (9, 0), 132, "580.1", "3.9.0", "1.0"), choice_of(SCALED_MM, 64)
    assert kernels.tune_kernels(model, card).alternatives == [wanted] and read_choices(card) == (wanted,)
    assert len(measured) == 1 and all(seconds > 0 for seconds in measured[0])
    monkeypatch.setattr(kernels, "available", lambda device: [SCALED_MM])
    assert kernels.tune_kernels(model, card).alternatives == [] and read_choices(card) == (wanted,)
    monkeypatch.setattr(kernels, "available", lambda device: [replace(SCALED_MM, fits=lambda product: True)])
    monkeypatch.setattr(kernels, "faster_rows", lambda measure, name, note: None)
    assert kernels.tune_kernels(model, card).alternatives == [] and read_choices(card) == ()


def test_models_that_cannot_be_measured(model, monkeypatch, tiny_model):
    with pytest.raises(ConfigError, match='those of backend "cuda", but the model runs on reference; use --device cuda'):
        kernels.StepTimes(load_model(tiny_model, backend="reference"))
    monkeypatch.setattr(type(model.dso), "compile_options", CompileOptions(host_experts=("a",)))
    with pytest.raises(ConfigError, match="some experts of the model run on the CPU; tune the kernels with a model that fits"):
        kernels.StepTimes(model)
