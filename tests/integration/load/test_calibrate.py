"""`calibration`: how weights are rounded on a text, by every way of loading, and where it is rejected or not used."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from deepseek_optimizer import CheckpointError, ConfigError, DeepSeekConfig, DynamicGraphOptimizer, load_model, load_tokenizer
from deepseek_optimizer.backends.cpu import unavailable_reason
from deepseek_optimizer.calibration.text import stretches
from deepseek_optimizer.integration.load import calibrate
from deepseek_optimizer.integration.load.calibrate import BUILT_IN, UNUSED
from deepseek_optimizer.integration.load.pack_checkpoint import pack_checkpoint
from deepseek_optimizer.quant import get_format
from support.calibrated import inputs_of, save_unequal

FAST = "cpu" if unavailable_reason() is None else "reference"


@pytest.fixture(scope="module", params=["llama-tied", "llama-gqa"])
def original(request, tmp_path_factory, byte_tokenizer):
    """Tied or not."""
    return save_unequal(tmp_path_factory.mktemp("calibrate") / "model", request.param, byte_tokenizer, 6000)


@pytest.fixture(scope="module")
def text(original):
    return str(original.parent / "text.txt")


@pytest.fixture(scope="module")
def calibrated(original, text):
    return load_model(original, precision="int4", calibration=text, backend=FAST)


def tiles_of(model) -> dict[str, torch.Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.dtype == torch.uint8}


def assert_equal_bits(a, b) -> None:
    ours, theirs = tiles_of(a), tiles_of(b)
    assert ours.keys() == theirs.keys() and ours
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    ids = torch.arange(40)[None] + 5
    with torch.inference_mode():
        assert torch.equal(a(ids).logits, b(ids).logits)


@pytest.mark.parametrize("precision", ["int3", "int4", "q4_1"])
def test_products_are_closer_than_with_plain_rounding(original, text, precision):
    model = load_model(original, precision=precision, calibration=text, backend=FAST)
    plain = AutoModelForCausalLM.from_pretrained(original)
    seen = inputs_of(plain, stretches(load_tokenizer(original), (original.parent / "text.txt").read_text(encoding="utf-8")))
    packing, better = get_format(precision), []
    for name, weight in plain.named_parameters():
        if name in seen:
            packed = model.get_submodule(name.removesuffix(".weight")).packed
            assert packed.format == precision
            ours, theirs = (
                ((packing.unpack(tiles, *weight.shape) - weight) @ seen[name].t()).square().mean().item()
                for tiles in (packed.data, packing.pack(weight.detach()))
            )
            better.append(theirs / ours)
    # Later layers are rounded for the inputs that earlier ones, rounded, give them, not for these.
    assert len(better) > 10 and sum(better) / len(better) > 1.5
    rounding = model.dso.manifest.rounding
    assert rounding["method"] == "compensated" and rounding["text"] == text and rounding["tokens"] > 512
    assert rounding["matrices"] == len(better)
    assert rounding["plain"] == ({} if plain.config.tie_word_embeddings else {"model.embed_tokens.weight": 1})
    report = model.report()
    assert report.config["calibration"] == text and report.rounding == dict(rounding) and text in str(report)


def test_it_is_deterministic_and_kept(calibrated, original, text, tmp_path):
    assert_equal_bits(calibrated, load_model(original, precision="int4", calibration=text, backend=FAST))
    calibrated.save_pretrained(tmp_path / "saved")
    stored = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert stored["quantization_config"]["calibration"] == text
    assert stored["packed_manifest"]["rounding"] == dict(calibrated.dso.manifest.rounding)
    again = load_model(tmp_path / "saved", backend=FAST)
    assert_equal_bits(again, calibrated)
    assert again.dso.manifest.rounding == calibrated.dso.manifest.rounding
    assert_equal_bits(AutoModelForCausalLM.from_pretrained(tmp_path / "saved"), calibrated)
    with pytest.raises(CheckpointError, match="convert the original"):
        load_model(tmp_path / "saved", calibration="other.txt")


def test_every_way_in_gives_the_same_bits(calibrated, original, text, tmp_path):
    config = DeepSeekConfig(precision="int4", calibration=text, backend=FAST)
    loaded = AutoModelForCausalLM.from_pretrained(original, quantization_config=config)
    assert_equal_bits(loaded, calibrated)
    assert loaded.config.quantization_config.precision == "int4" and config.precision == "int4"
    pack_checkpoint(original, tmp_path / "packed", {"precision": "int4", "calibration": text, "backend": FAST})
    packed = load_model(tmp_path / "packed", backend=FAST)
    assert_equal_bits(packed, calibrated)
    assert packed.dso.manifest.rounding == calibrated.dso.manifest.rounding
    with pytest.raises(ConfigError, match="load_model or `dso convert`"):
        DynamicGraphOptimizer(AutoModelForCausalLM.from_pretrained(original), config=config)


def test_the_reference_backend_rounds_alike(calibrated, original, text):
    other = load_model(original, precision="int4", calibration=text, backend="reference")
    ids = torch.arange(40)[None] + 5
    with torch.inference_mode():
        exact = load_model(original, backend=FAST)(ids).logits.log_softmax(-1)
        kl = [(exact.exp() * (exact - m(ids).logits.log_softmax(-1))).sum(-1).mean() for m in (other, calibrated)]
    assert 0.5 < kl[0] / kl[1] < 2


def test_the_built_in_text(original, monkeypatch):
    asked = {"precision": "int4", "calibration": "auto", "backend": FAST}
    plain = load_model(original, **asked)
    assert not plain.dso.manifest.rounding, "the tests switch it off"
    monkeypatch.delenv("DSO_CALIBRATION")
    monkeypatch.setattr(calibrate, "COUNT", 2)
    model = load_model(original, **asked)
    assert model.dso.manifest.rounding["text"] == BUILT_IN and BUILT_IN in str(model.report())
    for off in ({}, {"calibration": None}, {"calibration": "none"}):
        model = load_model(original, precision="int4", backend=FAST, **off)
        assert_equal_bits(model, plain)
        assert "`dso convert` calibrates" in str(model.report())
    for other in ({"precision": "int8"}, {}):
        model = load_model(original, backend=FAST, calibration="auto", **other)
        assert not model.dso.manifest.rounding and "`dso convert` calibrates" not in str(model.report())
    monkeypatch.setattr(calibrate, "estimated_seconds", lambda *_: 3600.0)
    with pytest.warns(UserWarning, match="without calibration, which would take about 1 h"):
        assert_equal_bits(load_model(original, **asked), plain)
    monkeypatch.setattr(calibrate, "_fits", lambda _: False)
    with pytest.warns(UserWarning, match="without calibration, which needs memory for the original model twice"):
        assert_equal_bits(load_model(original, **asked), plain)


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


def test_named_formats_are_kept(original, text):
    formats = {"model.layers.0.mlp.*": "int8", "model.layers.1.*": "bf16"}
    model = load_model(original, precision="int4", calibration=text, formats=formats, backend=FAST)
    actual = model.dso.manifest.formats()
    assert actual["model.layers.0.mlp.up_proj"] == "int8" and actual["model.layers.0.self_attn.q_proj"] == "int4"
    assert {format for name, format in actual.items() if "layers.1" in name} == {"bf16"}
