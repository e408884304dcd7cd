"""`calibration` and `kl_budget` on models with experts and latent attention."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from deepseek_optimizer import DeepSeekConfig, load_model, load_tokenizer
from deepseek_optimizer.calibration.text import stretches
from support.calibrated import save_unequal, squares_read

CASE = "deepseek_v3-groups"
STACK = "model.layers.1.mlp.experts"


@pytest.fixture(scope="module")
def original(tmp_path_factory, byte_tokenizer):
    return save_unequal(tmp_path_factory.mktemp("moe") / "model", CASE, byte_tokenizer, 2500)


@pytest.fixture(scope="module")
def texts(original):
    result = stretches(load_tokenizer(original), (original.parent / "text.txt").read_text(encoding="utf-8"))
    assert len(result) > 1
    return result


def squares_that_experts_read(plain, texts) -> dict[str, torch.Tensor]:
    """Mean squares of the inputs of gate_up and down in layer 1, from Transformers' module."""
    experts = plain.get_submodule(STACK)
    sums = {"gate_up_proj": torch.zeros(experts.hidden_dim), "down_proj": torch.zeros(experts.intermediate_dim)}

    def hook(module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        x, index, _ = arguments
        for expert in range(module.num_experts):
            rows = x[(index == expert).any(1)]
            gate, up = (rows @ module.gate_up_proj[expert].T).chunk(2, -1)
            sums["gate_up_proj"] += rows.square().sum(0)
            sums["down_proj"] += (nn.functional.silu(gate) * up).square().sum(0)

    experts.register_forward_pre_hook(hook)
    with torch.inference_mode():
        for ids in texts:
            plain(ids)
    return sums


def test_inputs_of_experts_are_those_in_transformers(original, texts):
    plain = AutoModelForCausalLM.from_pretrained(original, attn_implementation="eager", experts_implementation="eager")
    model = load_model(original, backend="reference")
    actual = squares_read(model, texts)
    for leaf, squares in squares_that_experts_read(plain, texts).items():
        torch.testing.assert_close(actual[f"{STACK}.{leaf}"] / squares.mean(), squares / squares.mean(), rtol=1e-3, atol=1e-4)
    linear = {f"{n}.weight" for n, m in plain.model.named_modules(prefix="model") if isinstance(m, nn.Linear)}
    assert actual.keys() == linear | {
        f"model.layers.{i}.mlp.experts.{leaf}" for i in (1, 2) for leaf in ("gate_up_proj", "down_proj")
    }
    assert model.dso.changed() is None and model.get_submodule(STACK).listener is None, "the model is unchanged"


def test_experts_with_too_few_tokens_are_rounded_without_compensation(original, monkeypatch):
    text = str(original.parent / "text.txt")
    whole = load_model(original, backend="reference", precision="int4", calibration=text)
    assert f"{STACK}.down_proj" not in whole.dso.manifest.rounding["plain"]
    inputs_per_column = 15.5  # as many as an expert's down projection gets on average
    monkeypatch.setattr("deepseek_optimizer.calibration.inputs.FEWEST", inputs_per_column)
    with pytest.warns(UserWarning, match="matrices got too few tokens"):
        model = load_model(original, backend="reference", precision="int4", calibration=text)
    experts = model.get_submodule(STACK)
    assert 0 < model.dso.manifest.rounding["plain"][f"{STACK}.down_proj"] < experts.num_experts
    assert torch.isfinite(model(torch.arange(40)[None]).logits).all()


@pytest.mark.parametrize("way", ["load_model", "from_pretrained"])
def test_formats_to_a_budget(original, way, tmp_path):
    if way == "load_model":
        model = load_model(original, kl_budget=0.02, backend="reference", formats={"*.experts.down_proj": "int8"})
    else:
        config = DeepSeekConfig(kl_budget=0.02, backend="reference", formats={"*.experts.down_proj": "int8"})
        model = AutoModelForCausalLM.from_pretrained(original, quantization_config=config)
    formats = model.dso.manifest.formats()
    assert {formats[f"model.layers.{i}.mlp.experts.down_proj"] for i in (1, 2)} == {"int8"}, "explicit formats are kept"
    assert not {formats[f"model.layers.{i}.self_attn.kv_b_proj"] for i in range(3)} & {"int4", "q4_1"}
    assert len(set(formats.values())) > 1
    chosen = next(point for point in model.report().curve if point["chosen"])
    assert chosen["measured_kl"] <= 0.02
    assert sum(chosen["formats"].values()) == len(formats)
    model.save_pretrained(tmp_path / "m")
    again = load_model(tmp_path / "m", backend="reference")
    ids = torch.tensor([[3, 14, 15, 92]])
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
