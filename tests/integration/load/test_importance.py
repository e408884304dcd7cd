"""The importance of columns on a text, as measured on Transformers' model."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from deepseek_optimizer import load_model, load_tokenizer
from deepseek_optimizer.backends.cpu import unavailable_reason
from deepseek_optimizer.calibration.text import stretches
from deepseek_optimizer.integration.load.importance import measure_importance
from support.calibrated import inputs_of, save_unequal

BACKENDS = ["reference"] + (["cpu"] if unavailable_reason() is None else [])
FAST = BACKENDS[-1]


@pytest.fixture(scope="module", params=["llama-tied", "llama-gqa"])
def original(request, tmp_path_factory, byte_tokenizer):
    """Tied or not."""
    return save_unequal(tmp_path_factory.mktemp("importance") / "model", request.param, byte_tokenizer, 6000)


def texts_of(original) -> list[torch.Tensor]:
    result = stretches(load_tokenizer(original), (original.parent / "text.txt").read_text(encoding="utf-8"))
    assert len(result) > 1
    return result


@pytest.mark.parametrize("backend", BACKENDS)
def test_measured_inputs_equal_transformers(original, backend):
    seen = inputs_of(AutoModelForCausalLM.from_pretrained(original), texts_of(original))
    model = load_model(original, backend=backend)
    steps: list[tuple[int, int]] = []
    actual = measure_importance(model, texts_of(original), lambda done, total: steps.append((done, total)))
    assert actual.keys() == seen.keys() and steps[-1] == (len(steps), len(steps))
    for name, rows in seen.items():
        expected = rows.double().square().mean(0)
        assert torch.allclose(actual[name].double(), expected / expected.mean(), rtol=1e-3), name
    assert model.dso.changed() is None, "the model is unchanged"


def test_torch_threads_are_restored(original):
    torch.set_num_threads(2)
    try:
        measure_importance(load_model(original, backend=FAST), texts_of(original)[:1])
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
