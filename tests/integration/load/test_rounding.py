"""The order in which matrices are rounded, and matrices rounded each as if it were the only one."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from deepseek_optimizer import load_model, load_tokenizer
from deepseek_optimizer.backends.cpu import unavailable_reason
from deepseek_optimizer.calibration.text import stretches
from deepseek_optimizer.config import DeepSeekConfig
from deepseek_optimizer.integration.load import rounding
from deepseek_optimizer.integration.load.rounding import round_alone, round_in_place
from deepseek_optimizer.quant import get_format
from support.calibrated import inputs_of, inputs_read, save_unequal, squares_read

BACKENDS = ["reference"] + (["cpu"] if unavailable_reason() is None else [])
FAST = BACKENDS[-1]


@pytest.fixture(scope="module", params=["llama-tied", "llama-gqa"])
def original(request, tmp_path_factory, byte_tokenizer):
    """Tied or not."""
    return save_unequal(tmp_path_factory.mktemp("rounding") / "model", request.param, byte_tokenizer, 6000)


def texts_of(original) -> list[torch.Tensor]:
    return stretches(load_tokenizer(original), (original.parent / "text.txt").read_text(encoding="utf-8"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_equal_those_in_transformers(original, backend):
    seen = inputs_of(AutoModelForCausalLM.from_pretrained(original), texts_of(original))
    model = load_model(original, backend=backend)
    actual = squares_read(model, texts_of(original))
    head = {"lm_head.weight", "model.embed_tokens.weight"}
    assert actual.keys() == seen.keys() - head and len(seen.keys() & head) == 1
    for name, squares in actual.items():
        assert torch.allclose(squares, seen[name].square().sum(0), rtol=1e-3), name
    assert model.dso.changed() is None, "the model is unchanged"


def test_matrices_are_rounded_for_their_inputs_in_the_rounded_model(original, monkeypatch):
    model, seen = load_model(original, backend=FAST), {}
    usual = rounding._Rounding.rounded

    def rounded(self, places, inputs, *rest):
        seen.update({name: torch.cat(rows).float() for name, rows in inputs.rows.items()})
        return usual(self, places, inputs, *rest)

    monkeypatch.setattr(rounding._Rounding, "rounded", rounded)
    round_in_place(model, DeepSeekConfig(precision="int4"), texts_of(original))
    actual = inputs_read(model, texts_of(original))
    assert len(actual) >= 14
    for name, inputs in actual.items():
        assert torch.allclose(inputs, seen[name], rtol=1e-3, atol=1e-3 * inputs.abs().max()), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_matrix_is_compensated_for_the_original_inputs(original, backend):
    plain, model = AutoModelForCausalLM.from_pretrained(original), load_model(original, backend=backend)
    ids = torch.arange(40)[None] + 5
    before = model(ids).logits
    steps: list[tuple[int, int]] = []
    asked: set[tuple[str, str]] = set()

    def wanted(name: str, own: str) -> list[str]:
        formats = [] if name.endswith("k_proj.weight") else ["int3", "int4"]
        asked.update((name, format) for format in formats)
        return formats

    found, outcome = round_alone(model, wanted, texts_of(original), lambda done, total: steps.append((done, total)))
    assert found.keys() == asked and steps[-1][0] == steps[-1][1]
    untied = {} if plain.config.tie_word_embeddings else {"model.embed_tokens.weight": 2}
    assert outcome.compensated == len(asked) - sum(untied.values()) and outcome.plain == untied
    assert torch.equal(model(ids).logits, before), "the model is unchanged"
    weights, inputs = dict(plain.named_parameters()), inputs_of(plain, texts_of(original))
    for (name, format), matrix in found.items():
        packing, weight = get_format(format), weights[name].detach()
        assert matrix.format == format and matrix.shape == weight.shape
        ours, nearest = packing.unpack(matrix.data, *weight.shape), packing.pack(weight)
        if name not in inputs:  # an embedding without a tied head
            assert torch.equal(matrix.data, nearest)
            continue
        errors = [((w - weight) @ inputs[name].t()).square().sum() for w in (ours, packing.unpack(nearest, *weight.shape))]
        assert errors[0] < 0.9 * errors[1], (name, format)


def test_torch_threads_are_restored(original):
    torch.set_num_threads(2)
    try:
        round_alone(load_model(original, backend=FAST), lambda name, own: ["int4"], texts_of(original)[:1])
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
