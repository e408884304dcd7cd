"""`HookedTrainer`: Trainer's private methods under public names."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import transformers
from transformers import PreTrainedConfig, Trainer

from deepseek_optimizer.integration.training.trainer import HookedTrainer, optimizer_names
from support.family_configs import deepseek_v4

PRIVATE = sorted(name for name in vars(HookedTrainer) if name.startswith("_") and not name.startswith("__"))
PUBLIC = sorted(name for name, value in vars(HookedTrainer).items() if inspect.isfunction(value) and name[0] != "_")


@pytest.mark.parametrize("name", PRIVATE)
def test_trainer_has_the_method(name):
    assert inspect.isfunction(getattr(Trainer, name)), f"{name}: Trainer does not call it any more, so it has no effect"


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_are_not_taken(name):
    assert not hasattr(Trainer, name)


def test_private_methods_call_public_ones_that_call_trainer(monkeypatch, tmp_path):
    """Trainer thus calls a subclass that overrides the public method, and its `super()` does the same as Trainer."""
    trainer = object.__new__(HookedTrainer)
    reached = []
    for name in PRIVATE:
        monkeypatch.setattr(Trainer, name, lambda self, *args, _name=name, **kwargs: reached.append((_name, args, kwargs)))
    for name in PRIVATE:
        wanted = [p for p in inspect.signature(getattr(HookedTrainer, name)).parameters.values() if p.name != "self"]
        positional = [p for p in wanted if p.kind is p.POSITIONAL_OR_KEYWORD]
        args = [str(tmp_path) if p.name == "resume_from_checkpoint" else object() for p in positional]
        getattr(trainer, name)(*args)
        actual, given, named = reached.pop()
        assert actual == name and [*given, *named.values()] == args
    assert len(PUBLIC) == len(PRIVATE)


def test_trainer_reads_the_version_of_a_config_that_only_its_family_accepts(monkeypatch, tmp_path):
    """So that it warns of checkpoints of other releases."""
    deepseek_v4().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    read = []

    def load(self, folder, model=None):
        assert (Path(folder) / "model.safetensors").read_bytes() == b"weights"
        read.append(PreTrainedConfig.from_json_file(f"{folder}/config.json").transformers_version)

    monkeypatch.setattr(Trainer, "_load_from_checkpoint", load)
    object.__new__(HookedTrainer).load_weights(str(tmp_path))
    assert read == [transformers.__version__]


def test_names_of_optimizers():
    assert {"adamw_torch", "sgd"} <= set(optimizer_names())
