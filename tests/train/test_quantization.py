"""Quantization-aware training: what is rounded, and that the packed result has exactly the weights that were trained."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import LlamaConfig

from deepseek_optimizer import ConfigError, DeepSeekConfig, DeepSeekTrainer, DynamicGraphOptimizer, load_model
from deepseek_optimizer.integration.bind.modules import Packed
from deepseek_optimizer.integration.load.rounding import round_in_place
from deepseek_optimizer.quant import get_format
from deepseek_optimizer.train.arguments import DeepSeekTrainingArguments
from deepseek_optimizer.train.quantization import RoundedWeights, calibration_texts, packing_config
from support.family_configs import deepseek_v3, llama
from support.models import random_model
from support.train_runs import StopAt, differences, fingerprint, tiny_llama, tiny_trainer
from support.training import Rows, arguments, losses, make_trainer


def _packed(model):
    """Each packed parameter of an optimized model, as floats."""
    held = [(f"{path}.{leaf}", w) for path, m in model.named_modules() if isinstance(m, Packed) for leaf, w in m.held().items()]
    return {
        name: torch.stack([get_format(w.format).unpack(tiles, w.rows, w.cols) for tiles in w.data]).flatten(0, -3)
        if hasattr(w, "count")
        else get_format(w.format).unpack(w.data, w.rows, w.cols)
        for name, w in held
    }


def _rounded(model, format):
    """The parameters while they are rounded, as float32."""
    weights = RoundedWeights(model, format)
    before = {name: p.data_ptr() for name, p in model.named_parameters()}
    weights.round()
    weights.round()  # has no effect
    result = {name: p.data.float().clone() for name, p in model.named_parameters(remove_duplicate=False)}
    changed = {name for name, p in model.named_parameters() if p.data_ptr() != before[name]}
    weights.restore()
    weights.restore()
    assert all(p.data_ptr() == before[name] for name, p in model.named_parameters())
    return result, changed


@pytest.mark.parametrize("format", ["int4", "q4_1", "int8", "q5_0", "int3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", [llama, deepseek_v3])
def test_rounded_weights_are_those_of_the_packed_checkpoint(tmp_path, config, format, dtype):
    model = random_model(config()).to(dtype)
    rounded, changed = _rounded(model, format)
    RoundedWeights(model, format).write(model, tmp_path)
    packed = _packed(load_model(tmp_path))
    assert changed and changed <= packed.keys() and len(packed) == len(changed)
    for name, weight in packed.items():
        assert torch.equal(rounded[name].reshape(weight.shape), weight.to(dtype).float()), name


def _texts(count=4, length=64):
    return list(torch.randint(3, 200, (count, 1, length), generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("format", ["int4", "q4_1", "int3"])
@pytest.mark.parametrize("config", [llama, deepseek_v3])
def test_calibrated_weights_are_those_of_compensated_rounding(tmp_path, config, format):
    model = random_model(config())
    twin = DynamicGraphOptimizer(copy.deepcopy(model), config=DeepSeekConfig(mtp="off")).optimize()
    round_in_place(twin, packing_config(format), _texts())
    expected = _packed(twin)
    weights = RoundedWeights(model, format)
    outcome = weights.calibrate(model, _texts())
    assert outcome.compensated > 0
    weights.round()
    rounded = {name: p.data.float().clone() for name, p in model.named_parameters(remove_duplicate=False)}
    weights.write(model, tmp_path)
    packed = _packed(load_model(tmp_path))
    assert packed.keys() == expected.keys()
    for name, weight in packed.items():
        assert torch.equal(rounded[name].reshape(weight.shape), weight), name
        alike = (weight - expected[name]).abs() <= 2e-3 * expected[name].abs().max()  # scales may differ in their last bit
        assert alike.float().mean() > (0.95 if format == "int3" else 0.999), name  # int3 chooses its codes again


def test_the_state_of_rounding_is_kept():
    model = random_model(llama())
    weights, again = RoundedWeights(model, "int4"), RoundedWeights(model, "int4")
    weights.calibrate(model, _texts())
    again.load_state(weights.state())
    rounded = []
    for rounding in (weights, again):
        rounding.round()
        rounded.append([p.detach().clone() for p in model.parameters()])
        rounding.restore()
    assert all(map(torch.equal, *rounded))


def test_training_starts_from_the_calibrated_weights(tmp_path):
    def kl(**fields):
        model = random_model(llama())
        with torch.no_grad():
            model.lm_head.weight.mul_(10)
        return _distill(tmp_path, model, bf16=False, train_dataset=Rows(64), **fields)

    calibrated, plain = kl(), kl(calibrate=False)
    calibrated.calibrate()
    before = {name: p.detach().clone() for name, p in calibrated.model.named_parameters()}
    calibrated.calibrate()  # has no effect
    assert all(torch.equal(p, before[name]) for name, p in calibrated.model.named_parameters())
    assert 0 < calibrated.evaluate()["eval_kl"] < 0.97 * plain.evaluate()["eval_kl"]


def test_calibration_reads_the_training_data():
    rows = [{"input_ids": [i] * 5, "attention_mask": [1, 1, 1, 0, 0]} for i in range(4)]
    whole = calibration_texts(rows, llama())
    assert len(whole) == 1 and sorted(whole[0][0].tolist()) == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]  # shorter than a stretch
    streamed = calibration_texts(iter([{"input_ids": list(range(600))}]), LlamaConfig(max_position_embeddings=100))
    assert [text.shape for text in streamed] == [(1, 100)] * 6 and streamed[1][0, 0] == 100
    many = calibration_texts([{"input_ids": torch.arange(512)}] * 100, LlamaConfig())
    assert [text.shape for text in many] == [(1, 512)] * 16


def test_exact_and_minimal_formats_are_those_of_packing():
    model = random_model(deepseek_v3())
    formats = {weight.name: weight.packed.format for weight in RoundedWeights(model, "int4")._weights}
    assert not any("gate.weight" in name or "norm" in name for name in formats)  # routers stay exact
    assert all(format == ("int8" if "kv_b_proj" in name else "int4") for name, format in formats.items())
    assert "model.embed_tokens.weight" in formats and any(".experts." in name for name in formats)
    tied = [weight.name for weight in RoundedWeights(random_model(llama(tie_word_embeddings=True)), "int4")._weights]
    assert "model.embed_tokens.weight" in tied and "lm_head.weight" not in tied


@pytest.mark.parametrize("fields", [{"bf16": False}, {"activation_memory": "recompute"}])
def test_the_gradient_of_the_rounded_weights_reaches_the_original_ones(tmp_path, fields):
    """One step of SGD: original - rate * the gradient that the rounded model has as an ordinary model."""
    model = random_model(llama(tie_word_embeddings=True))
    dtype = torch.float32
    rounded = copy.deepcopy(model)
    RoundedWeights(rounded, "int4").round()
    common = {"max_steps": 1, "optim": "sgd", "learning_rate": 0.5, "max_grad_norm": 0.0, "calibrate": False, **fields}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = make_trainer(model, tmp_path, quantize="int4", **common)
    trainer.train()
    plain = make_trainer(rounded, tmp_path, **common)
    start = {name: p.detach().clone() for name, p in rounded.named_parameters()}
    plain.train()
    assert losses(trainer) == losses(plain)
    for (name, ours), theirs in zip(model.named_parameters(), rounded.parameters(), strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours - before[name], theirs - start[name], rtol=1e-3, atol=1e-6, msg=name)


def _distill(folder, model, **fields):
    given = {"quantize": "int4", "teacher": "self", "max_steps": 40, "learning_rate": 3e-4, "gradient_accumulation_steps": 2}
    return make_trainer(model, folder, **{**given, **fields})


def test_distillation_lowers_the_divergence_of_the_packed_model(tmp_path):
    model = random_model(llama())
    with torch.no_grad():
        model.lm_head.weight.mul_(10)  # distributions that are not flat
    original = copy.deepcopy(model).eval()
    trainer = _distill(tmp_path, model, bf16=False)
    texts = torch.stack([row["input_ids"] for row in trainer.eval_dataset])
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert before["eval_loss"] == pytest.approx(before["eval_kl"], rel=1e-5)
    assert 0 < after["eval_kl"] < 0.6 * before["eval_kl"]
    trainer.save_model(str(tmp_path / "packed"))
    trainer.rounded.round()
    with torch.no_grad():
        wanted = original(texts).logits.log_softmax(-1)
        rounded = trainer.model.eval()(texts).logits.log_softmax(-1)
        packed = load_model(tmp_path / "packed", activation="int16")(texts).logits.log_softmax(-1)
    exact, of_packed = ((wanted.exp() * (wanted - q)).sum(-1).mean().item() for q in (rounded, packed))
    assert after["eval_kl"] == pytest.approx(exact, rel=1e-3)  # the loss in chunks is the plain one
    assert of_packed == pytest.approx(exact, rel=0.05)


def test_the_weight_of_the_teacher_mixes_both_losses(tmp_path):
    def loss(**fields):
        return _distill(tmp_path, random_model(llama()), bf16=False, **fields).evaluate()["eval_loss"]

    ours, plain = loss(), make_trainer(random_model(llama()), tmp_path, bf16=False, quantize="int4").evaluate()["eval_loss"]
    assert loss(teacher_weight=0.25) == pytest.approx(0.25 * ours + 0.75 * plain, rel=1e-5)


def test_another_model_can_be_the_teacher(tmp_path):
    torch.manual_seed(1)
    random_model(llama(num_hidden_layers=1)).save_pretrained(tmp_path / "teacher")
    trainer = make_trainer(random_model(llama()), tmp_path, bf16=False, teacher=str(tmp_path / "teacher"), max_steps=20)
    before = trainer.evaluate()["eval_kl"]
    trainer.train()
    assert trainer.evaluate()["eval_kl"] < before
    random_model(llama(vocab_size=300)).save_pretrained(tmp_path / "other")
    with pytest.raises(ConfigError, match="teacher: .*other has a vocabulary of 300 tokens, but the model one of"):
        make_trainer(random_model(llama()), tmp_path, teacher=str(tmp_path / "other"))


@pytest.mark.parametrize("fields", [{}, {"gradient_accumulation_steps": 2, "packing": True}], ids=["plain", "packing"])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, fields):
    def run(folder, resume=False, stop=None):
        callbacks = [] if stop is None else [StopAt(stop)]
        common = {"max_steps": 4, "save_steps": 2, "quantize": "int4", "teacher": "self", **fields}
        model = tiny_llama(attention_dropout=0.0, max_position_embeddings=40)
        trainer = tiny_trainer(folder, model, DeepSeekTrainer, DeepSeekTrainingArguments, callbacks, **common)
        trainer.train(resume_from_checkpoint=resume)
        return fingerprint(trainer)

    straight = run(tmp_path / "straight")
    run(tmp_path / "run", stop=2)
    assert differences(straight, run(tmp_path / "run", resume=True)) == []


def test_padding_does_not_count():
    from deepseek_optimizer.train.modules.distillation import Distillation

    ids = torch.tensor([[0, 5, 0, 6, 0, 0], [7, 8, 9, 0, 0, 0]])
    labels = torch.tensor([[-100, -100, -100, 6, -100, -100], [-100, 8, 9, 0, -100, -100]])
    counted = Distillation(None, 1.0, padding=0)._counted(ids, labels, None)
    assert counted.int().tolist() == [[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 0, 0]]
    assert Distillation(None, 1.0)._counted(ids, labels, torch.ones_like(ids)).all()


def test_the_memory_plan_has_the_rounded_weights_and_the_teacher(tmp_path):
    model = random_model(llama(tie_word_embeddings=True)).bfloat16()
    plan = _distill(tmp_path, model).report().memory
    plain = make_trainer(random_model(llama(tie_word_embeddings=True)).bfloat16(), tmp_path).report().memory
    assert plan.teacher == plan.weights and 0.9 * plan.weights < plan.rounded <= plan.weights
    assert plan.total == plain.total + plan.teacher + plan.rounded + 4 * model.num_parameters()  # and sums of gradients
    assert "rounded" in str(plan) and "teacher" in str(plan)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"quantize": "int5"}, "quantize: unknown weight format 'int5'"),
        ({"quantize": "bf16"}, "quantize='bf16' rounds nothing; choose a quantized format"),
        ({"quantize": "int4", "save_dtype": "bf16"}, "save_dtype='bf16' has no effect with quantize='int4'"),
        ({"quantize": "int4", "fp8_enabled": True}, "quantize='int4' cannot be combined with fp8_enabled"),
        ({"quantize": "int4", "mtp_loss_weight": 0.3}, "quantize='int4' cannot be combined with mtp_loss_weight"),
        ({"teacher": "self"}, 'teacher="self" .* needs quantize'),
        ({"quantize": "int4", "teacher": "self", "teacher_weight": 1.5}, "teacher_weight must be above 0 and at most 1"),
        ({"quantize": "int4", "teacher": "self", "fused_loss": False}, "teacher='self' needs fused_loss=True"),
    ],
)
def test_arguments_that_contradict_each_other(tmp_path, fields, message):
    with pytest.raises(ConfigError, match=message):
        arguments(tmp_path, **fields)


def test_models_that_cannot_be_rounded(tmp_path):
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(tiny_llama(), peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with pytest.raises(ConfigError, match="quantize='int4' trains all weights, but the model has an adapter"):
        make_trainer(adapted, tmp_path, quantize="int4")
    RoundedWeights(random_model(llama()), "int4").write(random_model(llama()), tmp_path)
    with pytest.raises(ConfigError, match="quantize needs the original weights"):
        RoundedWeights(load_model(tmp_path), "int4")
    with pytest.raises(ConfigError, match="cannot be combined with compute_metrics"):
        make_trainer(random_model(llama()), tmp_path, quantize="int4", teacher="self", compute_metrics=lambda _: {})
