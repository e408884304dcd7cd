"""`DeepSeekTrainer`'s steps: against Transformers' Trainer, for each storage and rounding of weights, and non-finite values."""

from __future__ import annotations

import warnings

import pytest
import torch
from transformers import Trainer, TrainingArguments

from deepseek_optimizer import ConfigError, DeepSeekTrainer, NotEnoughMemoryError
from deepseek_optimizer.errors import TrainingError
from deepseek_optimizer.integration.bind.runtime import OptimizerWarning
from deepseek_optimizer.train.optimizer import DeepSeekAdamW
from support.family_configs import llama, qwen3
from support.memory import memory_of
from support.models import random_model
from support.training import Rows, arguments, losses, make_trainer


def _plain(model, folder, **fields):
    base = {name: getattr(arguments(folder), name) for name in
            ("output_dir", "max_steps", "per_device_train_batch_size", "logging_steps", "learning_rate", "report_to",
             "save_strategy", "disable_tqdm", "dataloader_pin_memory", "lr_scheduler_type")}  # fmt: skip
    args = TrainingArguments(**{**base, "optim": "adamw_torch", "use_cpu": True, **fields})
    trainer = Trainer(model, args, train_dataset=Rows(), eval_dataset=Rows(8))
    trainer.train()
    return trainer


@pytest.mark.parametrize("config", [llama, qwen3])
def test_fp32_equals_transformers_trainer(tmp_path, config):
    fields = {"weight_decay": 0.1, "max_grad_norm": 1.0, "gradient_accumulation_steps": 2, "lr_scheduler_type": "cosine",
              "warmup_steps": 2}  # fmt: skip
    plain = _plain(random_model(config()), tmp_path, **fields)
    ours = make_trainer(random_model(config()), tmp_path, bf16=False, optimizer_state="fp32", **fields)
    ours.train()
    assert isinstance(ours._own, DeepSeekAdamW)
    torch.testing.assert_close(torch.tensor(losses(ours)), torch.tensor(losses(plain)), rtol=1e-5, atol=0)
    for name in ("grad_norm", "learning_rate"):
        theirs = [entry[name] for entry in plain.state.log_history if name in entry]
        actual = [entry[name] for entry in ours.state.log_history if name in entry]
        torch.testing.assert_close(torch.tensor(actual), torch.tensor(theirs), rtol=1e-4, atol=0, msg=name)
    for a, b in zip(ours.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-4)
    theirs = plain.evaluate()["eval_loss"]
    assert ours.evaluate()["eval_loss"] == pytest.approx(theirs, rel=1e-5)


def test_bf16_follows_fp32(tmp_path):
    """Rounding to bf16 (2^-9 relative) changes single losses by a percent, but not the run."""
    plain = losses(_plain(random_model(llama()), tmp_path, max_steps=10, learning_rate=3e-3))
    for fields in ({}, {"master_weights": "stochastic"}, {"optimizer_state": "int8"}, {"gradient_accumulation_steps": 1}):
        ours = make_trainer(random_model(llama()), tmp_path, max_steps=10, learning_rate=3e-3, **fields)
        ours.train()
        assert ours.model.dtype == torch.bfloat16 == ours.model.lm_head.weight.dtype
        assert ours.model.model.rotary_emb.inv_freq.dtype == torch.float32
        assert losses(ours)[-1] == pytest.approx(plain[-1], rel=0.02) and plain[-1] < 0.9 * plain[0]


def test_all_recompute_settings_give_bitwise_equal_runs(tmp_path):
    runs = []
    for memory in ("full", "selective", "recompute"):
        trainer = make_trainer(random_model(llama(tie_word_embeddings=True)), tmp_path, activation_memory=memory)
        trainer.train()
        runs.append(losses(trainer))
    assert runs[0] == runs[1] == runs[2]


def test_fused_and_whole_logits(tmp_path):
    runs = []
    for fused in (True, False):
        trainer = make_trainer(random_model(llama()), tmp_path, fused_loss=fused, bf16=False)
        trainer.train()
        assert trainer.report().fused_loss is fused
        runs.append(losses(trainer))
    assert runs[0] == pytest.approx(runs[1], rel=1e-5)


def test_accumulation_is_in_fp32(tmp_path):
    """Eight passes of one row equal one pass of eight, up to bf16 rounding of the gradients, not of their sum."""
    runs = []
    for rows, steps in ((8, 1), (1, 8)):
        trainer = make_trainer(
            random_model(llama()), tmp_path, per_device_train_batch_size=rows, gradient_accumulation_steps=steps, max_steps=4
        )
        seen = []
        trainer._after_optimizer_step, after = lambda t=trainer, s=seen: s.append(_sums(t)), trainer._after_optimizer_step
        trainer._after_optimizer_step = lambda a=after, t=trainer, s=seen: (s.append(_sums(t)), a())
        trainer.train()
        assert seen[0] == (steps > 1)
        assert not hasattr(next(trainer.model.parameters()), "main_grad")
        runs.append(losses(trainer))
    assert runs[0] == pytest.approx(runs[1], rel=5e-3)


def _sums(trainer) -> bool:
    sums = [getattr(p, "main_grad", None) for p in trainer.model.parameters()]
    assert all(s is None or (s.dtype == torch.float32 and not s.any()) for s in sums)  # the optimizer freed them
    return all(s is not None for s in sums)


def test_gradients_are_freed_as_they_are_used(tmp_path):
    trainer = make_trainer(random_model(llama()), tmp_path)
    step, left = DeepSeekAdamW.step, []

    def watched(self, closure=None):
        assert all(p.grad is not None for p in trainer.model.parameters())
        step(self, closure)
        left.extend(p.grad for p in trainer.model.parameters())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DeepSeekAdamW, "step", watched)
        trainer.train()
    assert left and all(grad is None for grad in left)


@pytest.mark.parametrize("optim", ["adamw_torch", "adafactor", "sgd"])
def test_other_optimizers(tmp_path, optim):
    plain = _plain(random_model(llama()), tmp_path, optim=optim)
    ours = make_trainer(random_model(llama()), tmp_path, optim=optim)
    ours.train()
    assert ours.model.dtype == torch.float32 and ours._own is None
    assert losses(ours) == pytest.approx(losses(plain), rel=1e-4)


def test_a_custom_optimizer(tmp_path):
    model = random_model(llama())
    trainer = make_trainer(model, tmp_path, optimizers=(torch.optim.SGD(model.parameters(), lr=1e-3), None))
    trainer.train()
    assert model.dtype == torch.float32 and losses(trainer)[-1] < losses(trainer)[0]


def test_model_init(tmp_path):
    trainer = make_trainer(None, tmp_path, model_init=lambda: random_model(llama()))
    trainer.train()
    first = losses(trainer)
    trainer.train()
    assert losses(trainer) == first and trainer.model.dtype == torch.bfloat16


class _Damaged(Rows):
    """Rows, some of which have a token for which a damaged model returns NaN."""

    def __init__(self, rows) -> None:
        super().__init__()
        self._rows = rows

    def __getitem__(self, index):
        row = super().__getitem__(index)
        return {**row, "input_ids": row["input_ids"].clone().fill_(2)} if index in self._rows else row


def _damaged_model():
    model = random_model(llama())
    embeddings = model.get_input_embeddings()
    embeddings.register_forward_hook(lambda _, ids, states: states * float("nan") if (ids[0] == 2).any() else None)
    return model


def _in_order(rows, **fields):
    return {"train_dataset": _Damaged(rows), "train_sampling_strategy": "sequential", **fields}


def test_a_non_finite_loss_stops_before_the_update(tmp_path):
    for optim in ("adamw_deepseek", "adamw_torch"):
        folder = tmp_path / optim
        trainer = make_trainer(_damaged_model(), folder, optim=optim, save_strategy="steps", save_steps=2, **_in_order({6, 7}))
        with pytest.raises(
            TrainingError, match=r"step 4: the loss is nan.*latest complete checkpoint is .*checkpoint-2;"
        ) as caught:
            trainer.train()
        assert caught.value.step == 4 and caught.value.last.endswith("checkpoint-2")
        assert all(torch.isfinite(p).all() for p in trainer.model.parameters())
        assert type(trainer.model).__mro__[1].__name__ == "LlamaPreTrainedModel"  # restored


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("optim", ["adamw_deepseek", "adamw_torch"])
def test_skipped_steps_change_nothing_and_are_counted(tmp_path, optim, steps):
    data = _in_order(
        {6, 7, 8, 9, 10, 11} if steps == 1 else {10}, optim=optim, on_nan="skip", gradient_accumulation_steps=steps, max_steps=3
    )
    trainer = make_trainer(_damaged_model(), tmp_path, logging_nan_inf_filter=False, **data)
    weights = []
    after = trainer._after_optimizer_step
    trainer._after_optimizer_step = lambda: (weights.append(trainer.model.lm_head.weight.detach().clone()), after())
    if steps == 1:
        trainer.args.max_steps = 7
    with pytest.warns(OptimizerWarning, match="was skipped"):
        trainer.train()
    changed = [not torch.equal(a, b) for a, b in zip(weights, weights[1:], strict=False)]
    assert changed == ([True, True, False, False, False, True] if steps == 1 else [True, False])
    assert trainer.state.log_history[-2]["skipped_steps"] == (3 if steps == 1 else 1)


def test_skipping_ends(tmp_path):
    data = _in_order(set(range(16)), on_nan="skip", max_steps=8)
    with pytest.raises(TrainingError, match="6th step in a row"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        make_trainer(_damaged_model(), tmp_path, **data).train()


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_non_finite_gradients(tmp_path, policy):
    """The loss is finite, since the damaged weight affects only the backward pass."""
    model = random_model(llama())
    handle = model.lm_head.weight.register_hook(lambda grad: grad * float("inf"))
    trainer = make_trainer(model, tmp_path, on_nan=policy, max_steps=2)
    before = model.model.norm.weight.detach().clone()
    if policy == "stop":
        with pytest.raises(TrainingError, match="step 1: the gradients are not finite"):
            trainer.train()
    else:
        with pytest.warns(OptimizerWarning, match="was skipped"):
            trainer.train()
    handle.remove()
    assert torch.equal(model.model.norm.weight.float(), before.bfloat16().float())


def test_impossible_memory_is_rejected_before_allocation(tmp_path, monkeypatch):
    from deepseek_optimizer.train import report

    model = random_model(llama())
    trainer = make_trainer(model, tmp_path)
    planned = trainer.report().memory
    weights = sum(p.numel() for p in model.parameters())
    assert (planned.weights, planned.masters, planned.moments, planned.gradients) == tuple(weights * n for n in (2, 2, 4, 2))
    assert planned.tokens == 48
    monkeypatch.setattr(report, "free_memory", lambda: memory_of(planned.total - 4 * weights - 1))
    with pytest.raises(NotEnoughMemoryError, match='optimizer_state="int8"'):
        trainer.train()
    assert model.dtype == torch.float32 and trainer.optimizer is None and trainer._prepared is None
    monkeypatch.setattr(report, "free_memory", lambda: memory_of(planned.total))
    trainer.train()


def test_report(tmp_path):
    trainer = make_trainer(random_model(llama(tie_word_embeddings=True)), tmp_path, gradient_accumulation_steps=3)
    report = trainer.report()
    assert report.trained == report.weights == trainer.model.num_parameters()
    assert report.native["Linear"] == 22 and not report.others and report.optimizer == "adamw_deepseek"
    assert report.memory.accumulators == 4 * report.trained
    assert "22 Linear" in str(report) and "adamw_deepseek" in str(report)
    assert not trainer.model.model.norm.__dict__.get("kept")


def test_plain_training_arguments_are_rejected(tmp_path):
    with pytest.raises(ConfigError, match="DeepSeekTrainingArguments"):
        DeepSeekTrainer(random_model(llama()), TrainingArguments(output_dir=str(tmp_path)))


def test_gradients_are_freed_after_a_step_of_a_custom_optimizer(tmp_path):
    """It keeps its gradients until `zero_grad`, which Trainer calls on the model, which does not know `main_grad`."""
    runs = []
    for free in (True, False):
        model = random_model(llama(), dtype=torch.bfloat16)
        optimizer = DeepSeekAdamW(model.parameters(), lr=1e-3, free_gradients=free)
        constant = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
        args = arguments(tmp_path, gradient_accumulation_steps=2)
        trainer = DeepSeekTrainer(model, args, train_dataset=Rows(), optimizers=(optimizer, constant))
        trainer.train()
        runs.append(losses(trainer))
    assert runs[0] == runs[1]
