"""Models without an execution plan, on the general path: the same results as Transformers, whatever their family."""

from __future__ import annotations

import copy

import pytest
import torch

from deepseek_optimizer import DeepSeekConfig, DynamicGraphOptimizer, load_model
from deepseek_optimizer.backends.cpu import unavailable_reason
from deepseek_optimizer.errors import ConfigError
from deepseek_optimizer.integration.general.head import head_name
from deepseek_optimizer.integration.general.modules import GeneralLinear
from deepseek_optimizer.models import ENCODERS, SUPPORTED
from deepseek_optimizer.quant import PackedMatrix, get_format, unpack
from support.general_models import CASES, inputs_of, random_general

NAMES = [name for name in CASES if not name.startswith(ENCODERS) and name not in SUPPORTED]


def first(output):
    """Logits or hidden states."""
    return output[0]


def check_close(fast, plain, relative):
    assert fast.shape == plain.shape and fast.isfinite().all()
    assert (fast - plain).abs().max() <= relative * plain.abs().max()


@pytest.mark.parametrize("name", NAMES)
def test_equals_transformers(tmp_path, name):
    plain = random_general(name)
    plain.save_pretrained(tmp_path)
    fast = load_model(tmp_path, precision="fp32")
    assert type(fast) is type(plain) and fast.report().path == "general"
    assert sum(isinstance(module, GeneralLinear) for module in fast.modules()) == fast.report().layers > 0
    with torch.no_grad():
        call = inputs_of(plain)
        check_close(first(fast(**call)), first(plain(**call)), 1e-5)


def with_rounded_weight(head):
    """A float head with the values of a `PackedHead`'s packed copy."""
    plain = torch.nn.Linear(head.in_features, head.out_features, bias=head.bias is not None)
    plain.weight.copy_(unpack(PackedMatrix(head.format, head.out_features, head.in_features, head.tiles)))
    plain.bias = head.bias
    return plain


@pytest.mark.parametrize("precision", ["int8", "int4", "q4_1", "bf16"])
@pytest.mark.parametrize("name", ["electra", "gpt2", "t5", "opt"])
def test_formats_against_their_own_values(tmp_path, name, precision):
    """The packed layers give what Transformers gives with the same, rounded weights, within the rounding of activations."""
    plain = random_general(name)
    plain.save_pretrained(tmp_path)
    fast = load_model(tmp_path, precision=precision)
    layers = {path: module for path, module in fast.named_modules() if isinstance(module, GeneralLinear)}
    assert {layer.format for layer in layers.values()} == {precision}
    with torch.no_grad():
        for path, layer in layers.items():
            own = plain.get_submodule(path).weight
            step = {"int8": 1 / 127, "int4": 1 / 7, "q4_1": 1 / 7, "bf16": 1 / 128}[precision]
            assert (layer.weight - own).abs().max() <= step * own.abs().max()
            own.copy_(layer.weight)
        if (path := head_name(fast)) is not None:
            plain.set_submodule(path, with_rounded_weight(fast.get_submodule(path)))
        call = inputs_of(plain)
        rounding = 1e-5 if get_format(precision).activation == "fp32" else 0.05
        check_close(first(fast(**call)), first(plain(**call)), rounding)


@pytest.mark.parametrize("name", ["gpt2", "bloom", "t5", "whisper", "mamba", "gpt_neox"])
def test_generate(tmp_path, name):
    plain = random_general(name)
    plain.save_pretrained(tmp_path)
    fast = load_model(tmp_path, precision="fp32")
    call = {k: v for k, v in inputs_of(plain).items() if not k.startswith("decoder")}
    if "attention_mask" in call and not plain.config.is_encoder_decoder:
        call = {k: v.flip(1) for k, v in call.items()}  # padding on the left
    options = {"max_new_tokens": 5, "do_sample": False, "num_beams": 2 if name == "t5" else 1}
    assert fast.generate(**call, **options).tolist() == plain.generate(**call, **options).tolist()


@pytest.mark.parametrize("name", ["olmoe", "flex_olmo"])
def test_experts_are_packed(tmp_path, name):
    plain = random_general(name, num_experts_per_tok=6)  # all of them: rounding cannot change the choice
    plain.save_pretrained(tmp_path)
    fast = load_model(tmp_path, precision="int8", formats={"model.layers.*.mlp.experts.down_proj": "bf16"})
    report = fast.report()
    assert report.experts == 2 and {row.format for row in report.formats} == {"int8", "bf16"}
    assert not any("Experts" in kind for kind in report.in_torch)
    with torch.no_grad():
        call = inputs_of(plain)
        check_close(first(fast(**call)), first(plain(**call)), 0.1)
    packed = tmp_path / "packed"
    fast.save_pretrained(packed)
    with torch.no_grad():
        assert torch.equal(first(load_model(packed)(**call)), first(fast(**call)))
        in_place = DynamicGraphOptimizer(plain, config=DeepSeekConfig(precision="fp32")).optimize()
        expected = first(random_general(name, num_experts_per_tok=6)(**call))
        check_close(first(in_place(**call)), expected, 1e-5)


def test_experts_of_another_layout_stay_in_torch(tmp_path):
    """Aria's are transposed."""
    plain = random_general("aria_text")
    plain.save_pretrained(tmp_path)
    report = load_model(tmp_path, precision="int8").report()
    assert report.experts == 0 and any("Experts" in name for name in report.in_torch)


def test_the_head_gets_contiguous_inputs(tmp_path):
    """torch would copy a frozen weight for every row of a strided input, such as the last tokens of a batch."""
    random_general("gpt2").save_pretrained(tmp_path)
    model = load_model(tmp_path, precision="fp32")
    seen = []
    model.lm_head.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(**inputs_of(model), logits_to_keep=1)
    assert seen[0].shape == (2, 1, 36) and seen[0].is_contiguous()


@pytest.mark.parametrize("name", ["gpt2", "t5", "bert-mlm", "opt", "gpt_neox"])  # the last has a head of its own
def test_the_head_computes_with_a_packed_copy(tmp_path, name):
    plain = random_general(name)
    plain.save_pretrained(tmp_path)
    assert load_model(tmp_path, precision="fp32").report().head is None
    model = load_model(tmp_path, precision="int8")
    head = model.get_output_embeddings()
    assert model.report().head == "int8" and "head, by a int8 copy" in str(model.report())
    assert model.num_parameters() == plain.num_parameters() and not any("tiles" in key for key in model.state_dict())
    x = torch.randn(2, 3, head.in_features)
    with torch.no_grad():
        exact = torch.nn.functional.linear(x, head.weight, head.bias)
        packed = head(x)
        assert 0 < (packed - exact).abs().max() <= 0.02 * exact.abs().max()
        assert torch.equal(copy.deepcopy(model).get_output_embeddings()(x), packed)
        head.weight.mul_(2)  # as training would
        torch.testing.assert_close(head(x), torch.nn.functional.linear(x, head.weight, head.bias))


def test_a_head_too_large_for_its_format(tmp_path):
    """Its packed copy would be NaN."""
    plain = random_general("gpt_neox")
    with torch.no_grad():
        plain.get_output_embeddings().weight[3, 5] = 1e8
    plain.save_pretrained(tmp_path)
    with pytest.raises(
        ConfigError, match=r"(lm_head|embed_out)\.weight has weights of up to 1e\+08, which are too large for int8"
    ):
        load_model(tmp_path, precision="int8")


@pytest.mark.skipif(unavailable_reason() is not None, reason="the reference backend does not round activations")
def test_activations(tmp_path):
    """int8 activations, which are faster, instead of the int16 that int8 weights have by default."""
    plain = random_general("electra")
    plain.save_pretrained(tmp_path)
    call = inputs_of(plain)
    with torch.no_grad():
        expected = first(plain(**call))
        default, fast = (first(load_model(tmp_path, precision="int8", activation=a)(**call)) for a in ("auto", "int8"))
    check_close(fast, expected, 0.05)
    assert (fast - default).abs().max() > 0


def test_bf16_checkpoints_keep_their_dtype(tmp_path):
    plain = random_general("electra").bfloat16()
    plain.save_pretrained(tmp_path)
    fast = load_model(tmp_path, precision="int8")
    assert fast.dtype == torch.bfloat16 and fast.electra.encoder.layer[0].output.dense.bias.dtype == torch.bfloat16
    with torch.no_grad():
        call = inputs_of(plain)
        assert first(fast(**call)).dtype == torch.bfloat16
        check_close(first(fast(**call)).float(), first(plain(**call)).float(), 0.05)


def test_a_module_that_several_parents_share_is_packed_once(tmp_path):
    """ALBERT runs one layer's modules several times, so its parameters are few."""
    plain = random_general("albert", num_hidden_layers=5)
    plain.save_pretrained(tmp_path)
    assert load_model(tmp_path, precision="int8").report().layers == 8
