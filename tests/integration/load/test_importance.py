"""`calibration`: what is measured on the text, that rounding depends on it, and where it is rejected."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from deepseek_optimizer import CheckpointError, ConfigError, DeepSeekConfig, DynamicGraphOptimizer, load_model, load_tokenizer
from deepseek_optimizer.backends.cpu import unavailable_reason
from deepseek_optimizer.calibration.text import stretches
from deepseek_optimizer.integration.load.importance import UNUSED, measure_importance
from deepseek_optimizer.quant import get_format
from support.calibrated import save_unequal

BACKENDS = ["reference"] + (["cpu"] if unavailable_reason() is None else [])
FAST = BACKENDS[-1]


@pytest.fixture(scope="module", params=["llama-tied", "llama-gqa"])
def original(request, tmp_path_factory, byte_tokenizer):
    """Tied or not."""
    return save_unequal(tmp_path_factory.mktemp("importance") / "model", request.param, byte_tokenizer, 6000)


def inputs_of(plain, texts) -> dict[str, torch.Tensor]:
    """Parameter name -> inputs of every linear module of Transformers' model, float32 [rows, K]."""
    seen: dict[str, list[torch.Tensor]] = {}
    names = {module: f"{name}.weight" for name, module in plain.named_modules() if isinstance(module, nn.Linear)}
    for module, name in names.items():
        module.register_forward_pre_hook(lambda _, x, name=name: seen.setdefault(name, []).append(x[0][0]))
    with torch.inference_mode():
        for ids in texts:
            plain(ids)
    if plain.config.tie_word_embeddings:
        seen["model.embed_tokens.weight"] = seen.pop("lm_head.weight")
    return {name: torch.cat(rows) for name, rows in seen.items()}


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


@pytest.mark.parametrize("precision", ["int4", "q4_1"])
def test_rounding_depends_on_importance(original, precision):
    text = str(original.parent / "text.txt")
    model = load_model(original, precision=precision, calibration=text, backend=FAST)
    plain = AutoModelForCausalLM.from_pretrained(original)
    importance = measure_importance(load_model(original, backend=FAST), texts_of(original))
    seen, packing = inputs_of(plain, texts_of(original)), get_format(precision)
    better = []
    for name, weight in plain.named_parameters():
        if weight.dim() == 2:
            packed = model.get_submodule(name.removesuffix(".weight")).packed
            assert torch.equal(packed.data, packing.pack(weight.detach(), importance.get(name))), name
        if name in seen:  # the error of the products, including correlations
            unweighted = packing.unpack(packing.pack(weight.detach()), *weight.shape)
            ours, theirs = (
                ((w - weight) @ seen[name].t()).square().mean()
                for w in (packing.unpack(packed.data, *weight.shape), unweighted)
            )
            better.append(bool(ours < theirs))
    assert sum(better) > 0.9 * len(better) > 5
    report = model.report()
    assert report.config["calibration"] == text and text in str(report) and not report.warnings
    assert set(map(str, (f.format for f in report.formats))) == {precision}


@pytest.mark.parametrize("precision", ["int8", "bf16", "fp32", "auto"])
def test_an_unneeded_text_is_not_read(original, precision):
    with pytest.warns(UserWarning, match="was not used"):
        model = load_model(original, precision=precision, calibration="absent.txt", backend=FAST)
    assert UNUSED in model.report().warnings


def test_errors_of_the_text_are_raised_before_reading_weights(original, tmp_path, monkeypatch):
    from deepseek_optimizer.integration.load import loader

    monkeypatch.setattr(loader, "_fill", lambda *_: pytest.fail("weights were read"))
    (tmp_path / "short.txt").write_text("Too short.")
    for name, message in (("absent.txt", "cannot be read"), ("short.txt", "short.txt has 10 tokens, too few")):
        with pytest.raises(ConfigError, match=message):
            load_model(original, precision="int4", calibration=str(tmp_path / name))


def test_packed_checkpoints(original, tmp_path, recwarn):
    text = original.parent / "text.txt"
    load_model(original, precision="int4", calibration=text, backend=FAST).save_pretrained(tmp_path / "packed")
    stored = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    assert stored["calibration"] == str(text)
    again = load_model(tmp_path / "packed", backend=FAST)
    assert again.report().config["calibration"] == str(text) and not again.report().warnings
    AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    with pytest.raises(CheckpointError, match="convert the original"):
        load_model(tmp_path / "packed", calibration="other.txt")


def test_where_it_is_rejected(original):
    config = DeepSeekConfig(precision="int4", calibration=str(original.parent / "text.txt"), backend=FAST)
    with pytest.raises(ConfigError, match="load_model.*dso convert"):
        AutoModelForCausalLM.from_pretrained(original, quantization_config=config)
    with pytest.raises(ConfigError, match="load_model or `dso convert`"):
        DynamicGraphOptimizer(AutoModelForCausalLM.from_pretrained(original), config=config)


def test_torch_threads_are_restored(original):
    torch.set_num_threads(2)
    try:
        measure_importance(load_model(original, backend=FAST), texts_of(original)[:1])
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
