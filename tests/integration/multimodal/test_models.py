"""Models with a vision tower: pixels in, logits out, as Transformers computes them."""

from __future__ import annotations

import copy
import json
import warnings
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from deepseek_optimizer import DeepSeekConfig, DynamicGraphOptimizer, load_model
from deepseek_optimizer.checkpoint import open_checkpoint
from deepseek_optimizer.errors import ConfigError
from deepseek_optimizer.integration.bind.packed_model import OptimizerWarning
from deepseek_optimizer.integration.load.general import why_language_alone
from support.multimodal import FAMILIES, make_model, make_prompts

TOLERANCE = 1e-5  # of logits of magnitude 1 to 2, in fp32
WIDER = {"gemma4_small": 5e-5}  # norms over 4 elements amplify rounding, in Transformers to 2e-5
FP32 = DeepSeekConfig(precision="fp32", prefill_chunk=32)  # chunks end within pictures


def optimized(model: Any, config: DeepSeekConfig = FP32) -> Any:
    return DynamicGraphOptimizer(copy.deepcopy(model), config=config).optimize()


@torch.no_grad()
def logits_of(model: Any, arguments: dict[str, Any], **more: Any) -> torch.Tensor:
    """Logits of the real tokens; an optimized model must use its plan."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", OptimizerWarning)
        logits = model(**arguments, **more).logits
    return logits[arguments["attention_mask"][:, -logits.shape[1] :].bool()]


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_generated_tokens(family):
    """One to five pictures of odd shapes in one batch, and a prompt without any."""
    model = make_model(FAMILIES[family])
    ours = optimized(model)
    for seed, counts in enumerate(([2, 0, 3], [1])):
        arguments = make_prompts(FAMILIES[family], counts, seed).arguments
        torch.testing.assert_close(
            logits_of(ours, arguments), logits_of(model, arguments), atol=WIDER.get(family, TOLERANCE), rtol=0
        )
        # Gemma 4's own forward embeds a generated placeholder as padding.
        options = {"max_new_tokens": 7, "do_sample": False, "suppress_tokens": [140, 143, 144]}
        expected = model.generate(**arguments, **options)
        assert ours.generate(**arguments, **options).tolist() == expected.tolist()


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3", "gemma4", "gemma4_small", "qwen3_vl", "qwen3_5"])
def test_chunks_and_caches(family, backend):
    """Any division into steps gives the same; so does a second turn with text only, from the cache of the first."""
    model = make_model(FAMILIES[family])
    arguments = make_prompts(FAMILIES[family], [5], tail=1).arguments
    turn = torch.tensor([[7, 8, 9]])
    whole = torch.cat([arguments["input_ids"], turn], 1)
    ours = [optimized(model, DeepSeekConfig(precision="fp32", prefill_chunk=n, backend=backend)) for n in (16, 512)]
    first, second = (logits_of(m, arguments) for m in ours)
    torch.testing.assert_close(first, second, atol=WIDER.get(family, TOLERANCE), rtol=0)
    both = {**arguments, "input_ids": whole, "attention_mask": torch.ones_like(whole)}
    if types := FAMILIES[family].types:
        both[types] = torch.cat([arguments[types], torch.zeros_like(turn)], 1)
    with torch.no_grad():
        output = ours[0](**arguments, use_cache=True)
        cache = output["cache" if "cache" in output else "past_key_values"]
        more = ours[0](input_ids=turn, attention_mask=both["attention_mask"], past_key_values=cache).logits[0]
    torch.testing.assert_close(more, logits_of(model, both)[-3:], atol=WIDER.get(family, TOLERANCE), rtol=0)


@pytest.mark.parametrize(
    "options",
    [
        {"prompt_lookup_num_tokens": 3, "do_sample": False},
        {"num_beams": 2, "do_sample": False},
        {"num_return_sequences": 2, "do_sample": True, "top_k": 1},
        {"use_cache": False, "do_sample": False},
    ],
    ids=["drafts", "beams", "copies", "no cache"],
)
def test_ways_of_generating(options):
    model = make_model(FAMILIES["qwen2_5_vl"])
    arguments = make_prompts(FAMILIES["qwen2_5_vl"], [2]).arguments
    options = {**options, "suppress_tokens": [140, 143], "max_new_tokens": 9}
    plain = {**options, "prompt_lookup_num_tokens": None}
    expected = model.generate(**arguments, **plain)
    assert optimized(model).generate(**arguments, **options).tolist() == expected.tolist()


@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3", "deepseek_ocr2", "qwen3_5", "gemma4", "gemma4_small"])
def test_files(family, tmp_path):
    """`from_pretrained`, `load_model`, and a packed checkpoint that is loaded again."""
    from transformers import AutoModelForImageTextToText

    model = make_model(FAMILIES[family])
    model.save_pretrained(tmp_path / "float")
    arguments = make_prompts(FAMILIES[family], [1, 2]).arguments
    expected = logits_of(model, arguments)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "float", quantization_config=FP32)
    assert loaded.report().path == "multimodal"
    torch.testing.assert_close(logits_of(loaded, arguments), expected, atol=WIDER.get(family, TOLERANCE), rtol=0)
    packed = load_model(tmp_path / "float", precision="int8", kv_cache="int8")
    assert type(packed) is type(model) and packed.report().kv_cache == "int8"
    assert {row.format for row in packed.report().language.formats} >= {"int8"}
    assert {row.format for row in packed.report().rest.formats} >= {"fp32"}  # the vision tower keeps its precision
    near = logits_of(packed, arguments)
    wide = family == "gemma4_small"  # norms over 4 elements amplify errors of weights: those of bf16 to 0.09
    torch.testing.assert_close(near, expected, atol=0.3 if wide else 0.15, rtol=0)
    packed.save_pretrained(tmp_path / "packed")
    assert torch.equal(logits_of(load_model(tmp_path / "packed"), arguments), near)


@pytest.mark.parametrize("family", ["qwen3_5", "gemma4", "gemma4_small"])
@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"vision": "off"}, ""),
        ({"strict": True}, "strict=True"),
    ],
    ids=["asked for", "strict"],
)
def test_language_model_alone(family, fields, reason, tmp_path):
    model = make_model(FAMILIES[family])
    model.save_pretrained(tmp_path)
    alone = load_model(tmp_path, precision="fp32", **fields)
    assert type(alone).__name__.endswith("ForCausalLM")
    assert ("does not read pictures" in str(alone.report())) is bool(reason) and reason in str(alone.report())
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    with torch.no_grad():
        torch.testing.assert_close(alone(ids).logits, model(ids).logits, atol=WIDER.get(family, TOLERANCE), rtol=0)


@pytest.mark.parametrize("family", ["qwen3_5", "gemma4"])
def test_causal_class_of_a_packed_whole_model(family, tmp_path):
    """Transformers loads what it loads of the original: of Qwen3.5 the language model, and all of Gemma 4."""
    make_model(FAMILIES[family]).save_pretrained(tmp_path / "float")
    formats = {"model.visual.merger.linear_fc1": "bf16"} if family == "qwen3_5" else {}  # a part that is not loaded
    load_model(tmp_path / "float", precision="int8", formats=formats).save_pretrained(tmp_path / "packed")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert type(loaded) is type(AutoModelForCausalLM.from_pretrained(tmp_path / "float"))
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    same = load_model(tmp_path / "packed", **({"vision": "off"} if family == "qwen3_5" else {}))
    assert type(same) is type(loaded)
    with torch.no_grad():
        logits = loaded(ids).logits
        assert torch.equal(logits, same(ids).logits)
    if family == "qwen3_5":
        loaded.save_pretrained(tmp_path / "language")
        with torch.no_grad():
            assert torch.equal(load_model(tmp_path / "language")(ids).logits, logits)


def test_settings_that_need_a_plan_of_the_whole_model(tmp_path):
    make_model(FAMILIES["qwen3_5"]).save_pretrained(tmp_path)
    with open_checkpoint(tmp_path) as checkpoint:
        assert why_language_alone(checkpoint, DeepSeekConfig()) is None
        assert "kl_budget=0.1 needs" in str(why_language_alone(checkpoint, DeepSeekConfig(kl_budget=0.1)))
        assert why_language_alone(checkpoint, DeepSeekConfig(vision="off")) == ""


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_5"])
@pytest.mark.parametrize("saved", [None, "Qwen3_5ForCausalLM", "Unknown"])
def test_config_that_does_not_name_the_class(family, saved, tmp_path):
    """A missing or foreign entry of `architectures` does not change which model a file contains."""
    model = make_model(FAMILIES[family])
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["architectures"] = [saved] if saved else None
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert type(load_model(tmp_path)) is type(model)


def test_limits_that_are_infinite(tmp_path):
    """As a new model has them: they are no damage."""
    model = make_model(FAMILIES["gemma4_small"])
    for name, buffer in model.named_buffers():
        if name.endswith("input_max"):
            buffer.fill_(torch.inf)
    model.save_pretrained(tmp_path)
    arguments = make_prompts(FAMILIES["gemma4_small"], [1]).arguments
    loaded = load_model(tmp_path, precision="fp32")
    torch.testing.assert_close(logits_of(loaded, arguments), logits_of(model, arguments), atol=WIDER["gemma4_small"], rtol=0)


def test_families_whose_language_model_is_not_loaded_alone(tmp_path):
    make_model(FAMILIES["qwen2_5_vl"]).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="vision='off': the language model of this qwen2_5_vl checkpoint cannot"):
        load_model(tmp_path, vision="off")


def test_copies_and_deletion():
    model = optimized(make_model(FAMILIES["qwen3_vl"]))
    arguments = make_prompts(FAMILIES["qwen3_vl"], [1]).arguments
    expected = logits_of(model, arguments)
    twin = copy.deepcopy(model)
    assert twin.dso.language is not model.dso.language
    del model
    assert torch.equal(logits_of(twin, arguments), expected)
    assert twin.num_parameters() > 0


def test_what_the_plan_does_not_serve():
    """Gradients and attention weights: Transformers' own forward, with a warning."""
    model = make_model(FAMILIES["gemma3"])
    arguments = make_prompts(FAMILIES["gemma3"], [1]).arguments
    ours = optimized(model)
    ours.set_attn_implementation("eager")
    with pytest.warns(OptimizerWarning, match="output_attentions"):
        output = ours(**arguments, output_attentions=True)
    torch.testing.assert_close(output.logits, model(**arguments).logits, atol=TOLERANCE, rtol=0)


def test_settings():
    model = make_model(FAMILIES["smolvlm"])
    with pytest.raises(ConfigError, match="formats names 'nothing'"):
        optimized(model, DeepSeekConfig(formats={"nothing": "int8"}))
    with pytest.raises(ConfigError, match=r"write 'model\.text_model\.layers\.0\.\*'"):
        optimized(model, DeepSeekConfig(formats={"model.layers.0.*": "int8"}))
    formats = {"model.vision_model.*": "int8", "model.text_model.layers.0.*": "int8"}
    report = optimized(model, DeepSeekConfig(formats=formats)).report()
    assert {row.format: row.matrices for row in report.language.formats}["int8"] == 7
    assert {row.format for row in report.rest.formats} >= {"int8"}
    with pytest.raises(ConfigError, match="kl_budget"):
        optimized(model, DeepSeekConfig(kl_budget=0.1))
    assert optimized(model, DeepSeekConfig(kv_cache="int8")).dso.language.kv_dtype == "int8"
