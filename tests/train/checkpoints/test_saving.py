"""Checkpoints are complete or absent, contain no pickle, and a resumed run equals an uninterrupted one bit for bit."""

from __future__ import annotations

import json
import logging
import os
import random
import resource
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

from deepseek_optimizer.errors import CheckpointError, SaveError
from deepseek_optimizer.train.checkpoints import directory, manifest, saving
from deepseek_optimizer.train.checkpoints.manifest import MANIFEST, verify
from support.train_runs import StopAt, differences, fingerprint, tiny_llama, tiny_trainer


class Draws(TrainerCallback):
    """Draws from every random generator in every step, like data collators and augmentation."""

    def __init__(self) -> None:
        self.seen: dict[int, tuple[float, float, float]] = {}

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        self.seen[state.global_step] = (random.random(), float(np.random.rand()), float(torch.rand(())))


def lora(seed: int = 0):
    peft = pytest.importorskip("peft")
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.1, task_type="CAUSAL_LM")
    model = peft.get_peft_model(tiny_llama(torch.bfloat16), config)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()  # so that it shows if PEFT loads adapters as float32
    return model


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


@pytest.mark.parametrize(
    ("fields", "make"),
    [
        ({"gradient_accumulation_steps": 2}, tiny_llama),
        ({"max_steps": 14, "save_steps": 5, "lr_scheduler_type": "cosine"}, tiny_llama),  # into the second epoch
        ({"max_steps": 7, "save_steps": 3}, lambda: tiny_llama(torch.bfloat16)),
        ({}, lora),
    ],
    ids=["accumulation", "epochs", "bf16", "lora"],
)
def test_resumed_equals_uninterrupted(tmp_path: Path, fields, make) -> None:
    whole = Draws()
    straight = tiny_trainer(tmp_path / "straight", make(), callbacks=[whole], **fields)
    straight.train()
    expected, saved = fingerprint(straight), straight.args.save_steps

    for step in sorted({saved, straight.args.max_steps // saved * saved}):
        draws, folder = Draws(), tmp_path / str(step)
        tiny_trainer(folder, make(), callbacks=[Draws(), StopAt(step)], **fields).train()
        random.seed(9), np.random.seed(9), torch.manual_seed(9)
        again = tiny_trainer(folder, make(), callbacks=[draws], **fields)
        again.train(resume_from_checkpoint=True)
        assert differences(expected, fingerprint(again)) == []
        assert draws.seen == {at: drawn for at, drawn in whole.seen.items() if at >= step}


def test_a_checkpoint_contains_no_pickle_and_lists_its_files(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, max_steps=2)
    trainer.train()
    assert names(tmp_path) == ["checkpoint-2"]
    checkpoint = tmp_path / "checkpoint-2"
    assert not [name for name in names(checkpoint) if name.endswith((".bin", ".pt", ".pth"))]
    listed = json.loads((checkpoint / MANIFEST).read_text())["files"]
    assert sorted([*listed, MANIFEST]) == names(checkpoint)
    assert {"model.safetensors", "optimizer.safetensors", "scheduler.safetensors", "rng_state_0.safetensors"} <= set(listed)
    assert json.loads((checkpoint / "training_args.json").read_text())["max_steps"] == 2
    verify(checkpoint)


def test_nothing_is_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_trainer(tmp_path, max_steps=2).train()
    monkeypatch.setattr(torch, "load", lambda *a, **k: pytest.fail("torch.load was called"))
    tiny_trainer(tmp_path, max_steps=4).train(resume_from_checkpoint=True)


def test_old_checkpoints_are_removed_after_the_new_one_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(saving, "rotate", lambda run, *rest: (seen.append(names(run)), directory.rotate(run, *rest)))
    tiny_trainer(tmp_path, max_steps=6, save_total_limit=1).train()
    standing = [[name for name in listing if name.startswith("checkpoint")] for listing in seen]
    assert standing == [["checkpoint-2"], ["checkpoint-2", "checkpoint-4"], ["checkpoint-4", "checkpoint-6"]]
    assert names(tmp_path) == ["checkpoint-6"]


def test_the_best_checkpoint_stays_under_its_final_path(tmp_path: Path) -> None:
    fields = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "save_total_limit": 1}
    fields |= {"max_steps": 6, "greater_is_better": True, "metric_for_best_model": "loss"}
    trainer = tiny_trainer(tmp_path, **fields)
    trainer.train()  # "best" is the largest loss here, which is the first
    best = tmp_path / f"checkpoint-{trainer.state.best_global_step}"
    assert trainer.state.best_model_checkpoint == str(best) and best.is_dir()
    state = json.loads((best / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(best)


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize(
    "file", ["model.safetensors", "optimizer.safetensors", "rng_state_0.safetensors", "trainer_state.json"]
)
def test_a_flipped_bit_is_detected_and_the_previous_one_is_used(tmp_path: Path, file: str, caplog) -> None:
    straight = tiny_trainer(tmp_path / "straight", max_steps=4)
    straight.train()
    tiny_trainer(tmp_path / "run", max_steps=4).train()
    flip(tmp_path / "run" / "checkpoint-4" / file)

    with pytest.raises(CheckpointError, match=f"{file}: is damaged.*checkpoint-2'") as error:
        tiny_trainer(tmp_path / "run", max_steps=4).train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    assert error.value.file == str(tmp_path / "run" / "checkpoint-4" / file)

    again = tiny_trainer(tmp_path / "run", max_steps=4)
    with caplog.at_level(logging.WARNING, logger=directory.__name__):
        again.train(resume_from_checkpoint=True)
    assert file in caplog.text and "resuming from the previous checkpoint" in caplog.text and "checkpoint-2" in caplog.text
    assert differences(fingerprint(straight), fingerprint(again)) == []
    verify(tmp_path / "run" / "checkpoint-4")  # the damaged one was replaced


def test_missing_added_or_foreign_files_are_rejected(tmp_path: Path) -> None:
    tiny_trainer(tmp_path, max_steps=2).train()
    checkpoint = tmp_path / "checkpoint-2"
    (checkpoint / "extra.json").write_text("{}")
    with pytest.raises(CheckpointError, match="extra.json.*not listed"):
        verify(checkpoint)
    (checkpoint / "extra.json").unlink()
    kept = (checkpoint / "config.json").read_bytes()
    (checkpoint / "config.json").unlink()
    with pytest.raises(CheckpointError, match="config.json.*missing"):
        verify(checkpoint)
    (checkpoint / "config.json").write_bytes(kept)
    verify(checkpoint)
    (checkpoint / "evil.bin").write_bytes(b"x")
    (checkpoint / MANIFEST).unlink()
    manifest.write_manifest(checkpoint, 2, 1)
    with pytest.raises(CheckpointError, match="evil.bin.*pickled"):
        verify(checkpoint)
    (checkpoint / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match="pickled state of another trainer"):
        verify(checkpoint)
    with pytest.raises(CheckpointError, match="has no intact checkpoint"):
        tiny_trainer(tmp_path).train(resume_from_checkpoint=True)
    with pytest.raises(CheckpointError, match="has no checkpoint"):
        tiny_trainer(tmp_path / "new").train(resume_from_checkpoint=True)


def test_a_model_alone_cannot_be_resumed_silently(tmp_path: Path) -> None:
    tiny_trainer(tmp_path, max_steps=2, save_only_model=True).train()
    with pytest.raises(CheckpointError, match="save_only_model"):
        tiny_trainer(tmp_path, max_steps=4).train(resume_from_checkpoint=True)


def test_a_second_run_in_the_directory_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directory, "LOCK_WAIT", 0.05)

    class Second(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs) -> None:
            with pytest.raises(CheckpointError, match="another run is training into this directory"):
                tiny_trainer(tmp_path).train()

    tiny_trainer(tmp_path, max_steps=1, callbacks=[Second()]).train()
    tiny_trainer(tmp_path, max_steps=1).train()  # the lock was released


def test_a_full_disk_leaves_the_last_checkpoint_and_nothing_else(tmp_path: Path) -> None:
    """Writes beyond a size fail, as on a full disk; in a child, since the limit applies to the process."""
    tiny_trainer(tmp_path, max_steps=2).train()
    weights = (tmp_path / "checkpoint-2" / "model.safetensors").stat().st_size
    for limit in (100, weights // 2, weights + 1000):  # the config, the weights, the optimizer
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            sys.stdout = sys.stderr = open(os.devnull, "w")  # pytest's capture is a file too
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            try:
                tiny_trainer(tmp_path, max_steps=4).train(resume_from_checkpoint=True)
                os.write(write, b"no error")
            except BaseException as error:
                os.write(write, f"{type(error).__name__} {error}".encode())
            os._exit(0)
        os.close(write)
        os.waitpid(child, 0)
        message = os.read(read, 4096).decode()
        assert (
            message.startswith("SaveError")
            and "checkpoint-4 was not saved" in message
            and "checkpoint is" in message
            and "checkpoint-2;" in message
        )
        assert names(tmp_path) == ["checkpoint-2"]
        verify(tmp_path / "checkpoint-2")


def test_free_space_is_checked_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(SaveError, match="the disk has 0.00 GB free.*there is no earlier checkpoint"):
        tiny_trainer(tmp_path, max_steps=2).train()
    assert not [name for name in names(tmp_path) if "checkpoint" in name]


def test_an_interrupted_save_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_trainer(tmp_path, max_steps=2).train()

    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(saving, "write_manifest", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tiny_trainer(tmp_path, max_steps=4).train(resume_from_checkpoint=True)
    assert names(tmp_path) == ["checkpoint-2"]


def test_a_saved_model_loads_and_leaves_no_other_files(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path / "run", max_steps=1, save_strategy="no")
    trainer.train()
    trainer.save_model(str(tmp_path / "out"))
    assert not [name for name in names(tmp_path / "out") if name.startswith(".")]
    loaded = type(trainer.model).from_pretrained(tmp_path / "out")
    assert differences(trainer.model.state_dict(), loaded.state_dict()) == []
