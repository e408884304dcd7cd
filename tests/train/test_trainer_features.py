"""Trainer's features in `DeepSeekTrainer`: callbacks, evaluation, metrics, custom losses, saving, hub."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, EarlyStoppingCallback, Trainer, TrainerCallback
from transformers.loss.loss_utils import ForCausalLMLoss

from deepseek_optimizer import DeepSeekTrainer
from deepseek_optimizer.integration.bind.runtime import OptimizerWarning
from deepseek_optimizer.train.modules import embedding
from support.family_configs import llama
from support.models import random_model
from support.training import Rows, losses, make_trainer


class _Events(TrainerCallback):
    def __init__(self) -> None:
        self.seen: list[str] = []

    def __getattribute__(self, name):
        if name.startswith("on_"):
            object.__getattribute__(self, "seen").append(name)
        return object.__getattribute__(self, name)


def test_callbacks_receive_every_event(tmp_path):
    events = _Events()
    trainer = make_trainer(
        random_model(llama()), tmp_path, callbacks=[events], max_steps=2, eval_strategy="steps", eval_steps=1,
        save_strategy="steps", save_steps=1, gradient_accumulation_steps=2,
    )  # fmt: skip
    trainer.train()
    twice = {"step_begin", "substep_end", "pre_optimizer_step", "optimizer_step", "step_end", "evaluate", "save"}
    for name in twice | {"train_begin", "train_end"}:
        assert events.seen.count(f"on_{name}") == (2 if name in twice else 1), name


def test_early_stopping_and_best_model(tmp_path):
    trainer = make_trainer(
        random_model(llama()), tmp_path, callbacks=[EarlyStoppingCallback(1)], max_steps=12, learning_rate=1.0,
        eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1, load_best_model_at_end=True,
        save_total_limit=1, metric_for_best_model="loss", greater_is_better=False, eval_on_start=True,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.global_step < 12
    actual = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric, rel=1e-6)
    assert trainer.state.best_metric == min(actual[1:]) and trainer.state.best_model_checkpoint


@pytest.mark.parametrize(
    "fields", [{}, {"optimizer_state": "int8", "gradient_accumulation_steps": 2}, {"optim": "adamw_torch"}]
)
def test_resumed_equals_uninterrupted(tmp_path, fields):
    whole = make_trainer(random_model(llama(attention_dropout=0.2)), tmp_path / "a", max_steps=6, **fields)
    whole.train()
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, **fields}

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 3

    make_trainer(random_model(llama(attention_dropout=0.2)), tmp_path / "b", callbacks=[Stop()], **options).train()
    rest = make_trainer(random_model(llama(attention_dropout=0.2), seed=1), tmp_path / "b", **options)
    rest.train(resume_from_checkpoint=True)
    assert losses(rest)[-3:] == losses(whole)[-3:]
    for a, b in zip(rest.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_metrics_get_logits(tmp_path):
    def accuracy(prediction):
        assert prediction.predictions.shape == (8, 24, 211)
        return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}

    trainer = make_trainer(random_model(llama()), tmp_path, compute_metrics=accuracy, eval_strategy="steps", eval_steps=3)
    trainer.train()
    actual = trainer.evaluate()
    assert 0 <= actual["eval_accuracy"] <= 1 and math.isfinite(actual["eval_loss"])
    chosen = make_trainer(
        random_model(llama()), tmp_path, compute_metrics=lambda p: {"mean": float(p.predictions.mean())},
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
    )  # fmt: skip
    assert "eval_mean" in chosen.evaluate()


def test_predictions(tmp_path):
    model = random_model(llama()).eval()
    rows = Rows(4)
    expected = model(input_ids=torch.stack([row["input_ids"] for row in rows])).logits
    predicted = make_trainer(model, tmp_path).predict(rows)
    np.testing.assert_allclose(predicted.predictions, expected.detach().numpy(), atol=2e-4)
    assert math.isfinite(predicted.metrics["test_loss"])


def test_evaluation_computes_no_logits(tmp_path, monkeypatch):
    trainer = make_trainer(random_model(llama()), tmp_path)
    plain = Trainer(trainer.model, trainer.args, eval_dataset=Rows(8)).evaluate()["eval_loss"]
    monkeypatch.setattr("torch.nn.Linear.forward", lambda *_: pytest.fail("the head was run"))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(plain, rel=1e-5)


def test_several_evaluation_sets(tmp_path):
    actual = make_trainer(random_model(llama()), tmp_path, eval_dataset={"a": Rows(4), "b": Rows(4, 9)}).evaluate()
    assert {"eval_a_loss", "eval_b_loss"} <= actual.keys()


def test_a_custom_loss(tmp_path):
    def doubled(outputs, labels, num_items_in_batch=None):
        return 2 * ForCausalLMLoss(outputs.logits, labels, 211, num_items_in_batch=num_items_in_batch)

    with pytest.warns(OptimizerWarning, match="compute_loss_func needs the logits"):
        own = make_trainer(random_model(llama()), tmp_path, bf16=False, compute_loss_func=doubled)
        own.train()
    plain = make_trainer(random_model(llama()), tmp_path, bf16=False)
    plain.train()
    assert losses(own)[0] == pytest.approx(2 * losses(plain)[0], rel=1e-5)
    assert not own.report().fused_loss


def test_label_smoothing(tmp_path):
    from transformers import TrainingArguments

    with pytest.warns(OptimizerWarning, match="label_smoothing_factor needs the logits"):
        own = make_trainer(random_model(llama()), tmp_path, bf16=False, label_smoothing_factor=0.1)
        own.train()
    args = TrainingArguments(output_dir=str(tmp_path), label_smoothing_factor=0.1, max_steps=1, per_device_train_batch_size=2,
                             logging_steps=1, report_to="none", save_strategy="no", disable_tqdm=True)  # fmt: skip
    plain = Trainer(random_model(llama()), args, train_dataset=Rows())
    plain.train()
    assert losses(own)[0] == pytest.approx(losses(plain)[0], rel=1e-5)


def test_noise_on_embeddings(tmp_path):
    trainer = make_trainer(random_model(llama()), tmp_path, neftune_noise_alpha=5.0)
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0] and not trainer.model.get_input_embeddings()._forward_hooks


def test_a_subclass_with_a_custom_loss(tmp_path):
    class Half(DeepSeekTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            result = super().compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)
            return (result[0] / 2, result[1]) if return_outputs else result / 2

    runs = []
    for kind in (Half, DeepSeekTrainer):
        trainer = make_trainer(random_model(llama()), tmp_path, trainer=kind, max_steps=1)
        trainer.train()
        runs.append((losses(trainer)[0], trainer.evaluate()["eval_loss"]))
    assert runs[0][0] == pytest.approx(runs[1][0] / 2)


def test_a_saved_model_is_a_plain_transformers_model(tmp_path):
    trainer = make_trainer(random_model(llama()), tmp_path)
    trainer.train()
    trainer.save_model()
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert again.dtype == torch.bfloat16
    for a, b in zip(again.parameters(), trainer.model.parameters(), strict=True):
        assert torch.equal(a, b)
    ids = torch.arange(3, 12)[None]
    assert trainer.model.generate(ids, max_new_tokens=3, pad_token_id=0).shape == (1, 12)


@pytest.mark.parametrize("tied", [True, False])
def test_masters_are_saved_on_request(tmp_path, tied):
    trainer = make_trainer(
        random_model(llama(tie_word_embeddings=tied)), tmp_path, save_dtype="fp32", save_strategy="steps", save_steps=6
    )
    trainer.train()
    trainer.save_model()
    exact = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert exact.dtype == torch.float32
    for a, b in zip(exact.parameters(), trainer.model.parameters(), strict=True):
        assert torch.equal(a, trainer._own.master(b)) and not torch.equal(a, b.float())
    checkpoint = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-6", dtype="auto")
    assert checkpoint.dtype == torch.bfloat16


def test_hub(tmp_path, monkeypatch):
    pushed = []
    monkeypatch.setattr(Trainer, "init_hf_repo", lambda self, token=None: setattr(self, "hub_model_id", "me/model"))
    monkeypatch.setattr(Trainer, "push_to_hub", lambda self, **options: pushed.append(options["commit_message"]))
    monkeypatch.setattr(Trainer, "_finish_current_push", lambda self: None)
    trainer = make_trainer(random_model(llama()), tmp_path, push_to_hub=True, hub_strategy="end")
    trainer.train()
    trainer.save_model()
    assert pushed == ["Model save"]


def test_packing(tmp_path):
    """Rows of several texts that do not attend to each other: the loss equals that of the separate texts."""

    class Texts(Rows):
        def __getitem__(self, index):
            return {name: tensor[: 5 + index] for name, tensor in super().__getitem__(index).items()}

    model = random_model(llama(max_position_embeddings=64))
    texts = Texts(8)
    with torch.no_grad():
        sums = [(model(**{n: t[None] for n, t in text.items()}).loss, text["labels"][1:].ne(-100).sum()) for text in texts]
    expected = sum(loss * count for loss, count in sums) / sum(count for _, count in sums)
    trainer = make_trainer(model, tmp_path, train_dataset=texts, packing=True, bf16=False, max_steps=1)
    assert len(trainer.train_dataset) == 2 and trainer.report().memory.tokens == 126
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(float(expected), rel=1e-5)


def test_sequences_beyond_the_positions_are_reported(tmp_path, recwarn):
    model = random_model(llama(max_position_embeddings=16))
    with pytest.warns(OptimizerWarning, match="a sequence of 24 tokens is longer than the model's context of 16"):
        make_trainer(model, tmp_path, max_steps=1).train()
    recwarn.clear()
    several = [{**row, "position_ids": torch.arange(24) % 12} for row in Rows(2)]
    make_trainer(model, tmp_path, max_steps=1, train_dataset=several).train()
    assert not [warning for warning in recwarn if "is longer than the model's context" in str(warning.message)]


def test_model_card(tmp_path):
    trainer = make_trainer(random_model(llama()), tmp_path)
    trainer.train()
    trainer.create_model_card(model_name="tiny")
    assert "tiny" in (tmp_path / "README.md").read_text()


def test_batch_size_is_found(tmp_path, monkeypatch):
    sizes, real = [], embedding.embedding

    def full(ids, *rest):
        sizes.append(len(ids))
        if len(ids) > 6:
            raise RuntimeError("CUDA out of memory.")
        return real(ids, *rest)

    monkeypatch.setattr(embedding, "embedding", full)
    trainer = make_trainer(random_model(llama()), tmp_path, per_device_train_batch_size=8, auto_find_batch_size=True)
    trainer.train()
    assert sizes[0] == 8 and sizes[-1] <= 6 and len(losses(trainer)) == 6
