"""Training on Ray: two workers train as one process does, and go on after one of them was killed."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from deepseek_optimizer.errors import ConfigError
from deepseek_optimizer.ray import trainer
from deepseek_optimizer.train.config import make_config
from deepseek_optimizer.train.job import TrainingJob

ray = pytest.importorskip("ray")
pytest.importorskip("ray.train.torch")

KILLED = """
import os, signal
from pathlib import Path
from transformers import TrainerCallback
from deepseek_optimizer.ray import training

class KillOnce(training._Report):
    def on_step_begin(self, args, state, control, **kwargs):
        mark = Path(os.environ["KILL_MARK"])
        if state.global_step == 3 and os.environ["RANK"] == "1" and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)

def install():
    training._Report = KillOnce
"""


@pytest.fixture
def settings(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    chats = [[{"role": "user", "content": f"count {i}"}, {"role": "assistant", "content": "one two"}] for i in range(12)]
    data = tmp_path / "chats.jsonl"
    data.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))

    def make(output: str, rows: int) -> dict:
        arguments = {"max_steps": 5, "save_steps": 2, "save_strategy": "steps", "logging_steps": 1, "bf16": False,
                     "optimizer_state": "fp32", "per_device_train_batch_size": rows, "gradient_accumulation_steps": 1,
                     "use_cpu": True}  # fmt: skip
        return {
            "model": str(tiny_model), "output": str(tmp_path / output), "data": {"train": [str(data)], "packing": False},
            "arguments": arguments,
        }  # fmt: skip

    return make


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """Ray on this machine, whose workers find the sources, and end once."""
    (tmp_path / "kill_once.py").write_text(KILLED)
    path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    variables = {"PYTHONPATH": path, "KILL_MARK": str(tmp_path / "killed"), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    setup = {"env_vars": variables, "worker_process_setup_hook": "kill_once.install"}
    monkeypatch.setenv("RAY_worker_niceness", "0")  # else other tests on this machine delay the workers by minutes
    ray.init("local", num_cpus=3, include_dashboard=False, runtime_env=setup, object_store_memory=100 << 20)
    try:
        yield
    finally:
        ray.shutdown()


def test_two_workers_of_which_one_is_killed_train_as_one_process(settings, cluster, tmp_path):
    result = trainer(settings("together", 2), max_failures=1, storage_path=str(tmp_path / "ray")).fit()
    assert (tmp_path / "killed").exists()
    TrainingJob(make_config(settings("alone", 4))).run()
    together, alone = tmp_path / "together", tmp_path / "alone"
    points = [json.loads((out / "loss.json").read_text())["points"] for out in (together, alone)]
    losses = [torch.tensor([point["loss"] for point in each if "loss" in point]) for each in points]
    assert len(losses[1]) == 5 == result.return_value["steps"]
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-5)
    weights, expected = (load_file(out / "model.safetensors") for out in (together, alone))
    for name, weight in expected.items():
        torch.testing.assert_close(weights[name], weight, rtol=0, atol=2e-5, msg=name)
    with pytest.raises(ConfigError, match="resume=True"):
        trainer(settings("together", 2))


def test_wrong_numbers_are_refused(settings):
    with pytest.raises(ConfigError, match="num_workers"):
        trainer(settings("out", 2), num_workers=0)


def test_paths_are_absolute(settings, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fields = settings("out", 2)
    made = trainer({**fields, "output": "out", "data": "chats.jsonl"})
    sent = made.train_loop_config["settings"]
    assert sent["output"] == str(tmp_path / "out") and sent["data"]["train"] == [str(tmp_path / "chats.jsonl")]
    assert Path(sent["model"]).is_absolute()
