"""DeepSeek-V4 in `DeepSeekTrainer` and `dso train`: as in Transformers, and from training to a packed model that generates."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from deepseek_optimizer import ConfigError, load_model
from deepseek_optimizer.train.balancing import routers
from deepseek_optimizer.train.precision import set_training_dtype
from deepseek_optimizer.train.prepare import prepare
from support.family_configs import deepseek_v4
from support.models import random_model
from support.training import Rows, arguments, losses, make_trainer

EXACT = ("attn_hc", "ffn_hc", "hc_head", "sinks", "position_bias", "norm")  # parameters that Transformers keeps in fp32


def fresh(seed: int = 0, mtp_layers: int = 0):
    config = deepseek_v4(moe_intermediate_size=48, num_nextn_predict_layers=mtp_layers)
    torch.manual_seed(seed)  # MTP layers are initialized at random
    return random_model(config, seed=seed)  # Transformers' grouped products need multiples of 8


def loaded_in_bf16(folder):
    fresh().save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).train()


def gradients(model):
    rows = [Rows(3, 40)[i] for i in range(3)]
    loss = model(**{name: torch.stack([row[name] for row in rows]) for name in rows[0]}, use_cache=False).loss
    loss.backward()
    return loss.detach(), {name: p.grad.float() for name, p in model.named_parameters() if p.grad is not None}


def distance(actual, exact):
    """Of all gradients together, relative to the exact ones."""
    off = sum((actual[name] - gradient).square().sum() for name, gradient in exact.items())
    return (off / sum(gradient.square().sum() for gradient in exact.values())).sqrt()


def test_fp32_equals_transformers_trainer(tmp_path):
    shared = ("output_dir", "max_steps", "per_device_train_batch_size", "logging_steps", "report_to", "save_strategy",
              "disable_tqdm", "dataloader_pin_memory", "lr_scheduler_type")  # fmt: skip
    fields = {name: getattr(arguments(tmp_path), name) for name in shared}
    theirs = Trainer(fresh(), TrainingArguments(**fields, use_cpu=True, learning_rate=1e-3), train_dataset=Rows(16, 40))
    theirs.train()
    ours = make_trainer(
        fresh(),
        tmp_path,
        bf16=False,
        optimizer_state="fp32",
        moe_balance_rate=0.0,
        learning_rate=1e-3,
        train_dataset=Rows(16, 40),
    )
    ours.train()
    torch.testing.assert_close(torch.tensor(losses(ours)), torch.tensor(losses(theirs)), rtol=1e-4, atol=0)


FIELDS = {"heads": {"num_attention_heads": 9, "sliding_window": 5}, "two streams": {"hc_mult": 2, "index_topk": 2}}


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("name", FIELDS)
def test_gradients_equal_those_of_transformers(name, side):
    """For texts with padding too."""
    model = random_model(deepseek_v4(**FIELDS[name])).train()
    inputs = {name: torch.stack([Rows(3, 53)[i][name] for i in range(3)]) for name in ("input_ids", "labels")}
    padding = torch.arange(53) < torch.tensor([[0], [9], [25]])
    if side != "none":
        padding = padding.flip(1) if side == "right" else padding
        inputs |= {"attention_mask": (~padding).long(), "labels": inputs["labels"].masked_fill(padding, -100)}

    def run():
        model.zero_grad()
        loss = model(**inputs, use_cache=False).loss
        loss.backward()
        return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected, theirs = run()
    prepared = prepare(model)
    native = ("Attention", "DecoderLayer", "HyperConnection", "HyperHead", "RMSNorm", "Experts", "MLP", "GroupedLinear")
    assert all(prepared.native[f"DeepseekV4{part}"] for part in native) and not prepared.notes
    with prepared.saved:
        loss, ours = run()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        assert (ours[name] - gradient).norm() <= 1e-4 * gradient.norm().clamp(min=1e-3), name


@pytest.mark.parametrize("heads", [1, 6])
def test_masks_of_pairs_of_tokens(heads):
    """A caller's own mask, which may fall off with the distance, and by another factor for each head."""
    model = random_model(deepseek_v4(layer_types=["sliding_attention"] * 4)).train()
    place = torch.arange(30)
    behind = place[:, None] - place
    factors = torch.linspace(0.1, 0.6, heads)[:, None, None]
    mask = (-factors * behind).masked_fill(behind < 0, torch.finfo(torch.float32).min)[None]
    ids = Rows(1, 30)[0]["input_ids"][None]

    def run():
        model.zero_grad()
        loss = model(ids, attention_mask=mask, labels=ids, use_cache=False).loss
        loss.backward()
        return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected, theirs = run()
    prepare(model)
    loss, ours = run()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    assert distance(ours, theirs) <= 1e-4


def test_caches_and_attention_weights_are_transformers_own():
    model = fresh().eval()
    ids = Rows(1, 30)[0]["input_ids"][None]
    expected = model(ids, output_attentions=True, output_hidden_states=True)
    made = model.generate(ids, max_new_tokens=5, do_sample=False)
    prepare(model)
    outputs = model(ids, output_attentions=True, output_hidden_states=True)
    for ours, theirs in zip(
        (*outputs.attentions, *outputs.hidden_states), (*expected.attentions, *expected.hidden_states), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), made)


@pytest.mark.parametrize("memory", ["full", "selective", "recompute"])
def test_gradients_in_bf16_are_as_exact_as_transformers(tmp_path, memory):
    """Those of fp32 equal Transformers' (above); in bf16, each rounds in another order."""
    _, exact = gradients(fresh().train())
    loss, expected = gradients(loaded_in_bf16(tmp_path))
    model = fresh().train()
    set_training_dtype(model, torch.bfloat16)
    for name, parameter in model.named_parameters():
        assert (parameter.dtype == torch.float32) == any(part in name for part in EXACT), name
    prepared = prepare(model, activation_memory=memory)
    with prepared.saved:
        ours, own = gradients(model)
    assert prepared.native["DeepseekV4RMSNorm"] and prepared.native["Linear"]
    torch.testing.assert_close(ours.float(), loss.float(), rtol=1e-2, atol=0)
    assert own.keys() == expected.keys()
    assert distance(own, exact) <= 1.5 * distance(expected, exact)


def test_training_to_a_packed_model(tmp_path):
    model = fresh()
    before = {path: router.e_score_correction_bias.clone() for path, router in routers(model)}
    trainer = make_trainer(
        model, tmp_path / "run", max_steps=40, learning_rate=1e-2, moe_balance_rate=0.01, train_dataset=Rows(2)
    )
    trainer.train()
    actual = losses(trainer)
    assert actual[-1] < 0.5 * actual[0]
    after = {path: router.e_score_correction_bias for path, router in routers(model)}
    assert len(before) == 2 and all(not torch.equal(after[path], bias) for path, bias in before.items())
    trainer.save_model(str(tmp_path / "model"))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    ids = Rows(2)[0]["input_ids"][None]
    with torch.no_grad():
        assert plain(ids, labels=ids).loss < 0.6 * actual[0]
        expected = plain(ids).logits
        torch.testing.assert_close(load_model(tmp_path / "model", precision="fp32")(ids).logits, expected, rtol=1e-3, atol=1e-3)
    load_model(tmp_path / "model", precision="int4").save_pretrained(tmp_path / "int4")
    packed = load_model(tmp_path / "int4")
    made = packed.generate(ids[:, :8], max_new_tokens=16, do_sample=False)
    right = (made[0, 8:] == ids[0, 8:]).float().mean()
    assert right > 0.5  # it has learned the two rows by heart


def test_mtp_layers_are_trained_and_draft(tmp_path):
    model = fresh(mtp_layers=1)
    trainer = make_trainer(
        model, tmp_path / "run", max_steps=40, learning_rate=1e-2, mtp_loss_weight=0.5, train_dataset=Rows(2)
    )
    report = trainer.report()
    assert [note for note in report.notes if "MTP layer 0: initialized at random" in note]
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "mtp_loss" in entry]
    assert logs[-1]["mtp_loss"] < 0.2 * logs[0]["mtp_loss"]
    trainer.save_model(str(tmp_path / "model"))
    fast = load_model(tmp_path / "model", precision="fp32")
    ids = Rows(2)[0]["input_ids"][None, :8]
    options = {"max_new_tokens": 16, "do_sample": False}
    made = fast.generate(ids, **options)
    always = {"use_mtp": True, "num_assistant_tokens": 1, "num_assistant_tokens_schedule": "constant"}
    assert torch.equal(made, fast.generate(ids, **options, **always))
    assert fast.dso.speculation.acceptance[0] > 0.5
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    assert len(plain.model.layers) == 4


def test_the_mtp_loss_is_added_with_its_weight(tmp_path):
    logged = {}
    for weight in (None, 0.5):
        trainer = make_trainer(fresh(mtp_layers=1), tmp_path, bf16=False, mtp_loss_weight=weight, max_steps=1)
        trainer.train()
        logged[weight] = trainer.state.log_history[0]
    assert logged[0.5]["loss"] == pytest.approx(logged[None]["loss"] + 0.5 * logged[0.5]["mtp_loss"], rel=1e-4)


@pytest.mark.parametrize("mtp", [{}, {"mtp_loss_weight": 0.3, "activation_memory": "recompute"}], ids=["plain", "mtp"])
def test_resumed_equals_uninterrupted(tmp_path, mtp, caplog):
    fields = {"moe_balance_rate": 0.05, "learning_rate": 1e-3, "max_steps": 4, **mtp}
    layers = 1 if mtp else 0

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 2

    whole = make_trainer(fresh(mtp_layers=layers), tmp_path / "a", **fields)
    whole.train()
    saving = {"save_strategy": "steps", "save_steps": 2}
    make_trainer(fresh(mtp_layers=layers), tmp_path / "b", callbacks=[Stop()], **saving, **fields).train()
    rest = make_trainer(fresh(1, layers), tmp_path / "b", **saving, **fields)
    rest.train(resume_from_checkpoint=True)
    assert "keys" not in caplog.text  # missing or unexpected ones
    a, b = whole.model.state_dict(), rest.model.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_the_best_checkpoint_is_loaded(tmp_path):
    trainer = make_trainer(
        fresh(), tmp_path, max_steps=4, learning_rate=0.3, eval_strategy="steps", eval_steps=1,
        save_strategy="steps", save_steps=1, load_best_model_at_end=True, metric_for_best_model="loss", greater_is_better=False,
    )  # fmt: skip
    trainer.train()
    actual = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert min(actual) < actual[-1]  # so large a learning rate makes it worse
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(actual), rel=1e-6)


def test_documents_of_a_row_would_be_joined(tmp_path):
    with pytest.raises(ConfigError, match="packing=True: deepseek_v4 would join the documents of a row; set packing=False"):
        make_trainer(fresh(), tmp_path, packing=True)
