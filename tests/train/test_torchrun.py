"""`dso train` under torchrun: a process that is killed once, also on another machine, and the run that goes on."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from deepseek_optimizer.errors import ConfigError
from deepseek_optimizer.train.config import make_config
from deepseek_optimizer.train.job import TrainingJob
from support.namespaces import ADDRESSES, two_namespaces

_PROCESS = """
import json, os, signal, sys
from transformers import TrainerCallback
from deepseek_optimizer.train.config import make_config
from deepseek_optimizer.train.job import TrainingJob

class KillOnce(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 3 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)

job = TrainingJob(make_config(json.loads(sys.argv[1]), ""))
print("resumes", job.resumes, flush=True)
job.run([KillOnce()])
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


def start(config: dict, node: int, nodes: int, port: int, prefix: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    """torchrun on one machine: of one, with two processes; of two, with one process each."""
    where = ["--nnodes", str(nodes), "--nproc-per-node", str(2 // nodes), "--max-restarts", "3", "--rdzv-backend", "c10d"]
    where += ["--rdzv-endpoint", f"{ADDRESSES[0] if nodes == 2 else '127.0.0.1'}:{port}", "--rdzv-id", "test"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    if nodes == 2:
        # torchrun compares the endpoint with the addresses of this host's name, which is that of both namespaces
        where += ["--local-addr", ADDRESSES[node], "--node-rank", str(node), "--rdzv-conf", f"is_host={node == 0}"]
        environment |= {"GLOO_SOCKET_IFNAME": "dso0", "TP_SOCKET_IFNAME": "dso0"}
    script = Path(config["output"]).with_name("process.py")
    script.write_text(_PROCESS)
    command = [*prefix, sys.executable, "-m", "torch.distributed.run", *where, str(script), json.dumps(config)]
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def check(settings, nodes: int, prefixes=((), ())) -> None:
    """The losses and weights of a run with a killed process are those of one process with the whole batch."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = int(server.getsockname()[1])
    config = settings("together", 2)
    machines = [start(config, node, nodes, port, prefixes[node]) for node in range(nodes)]
    try:
        outputs = [machine.communicate(timeout=500)[0] for machine in machines]
    finally:
        for machine in machines:
            machine.kill()
    assert all(machine.returncode == 0 for machine in machines), "\n".join(output[-4000:] for output in outputs)
    begun, resumed = (sum(output.count(f"resumes {what}") for output in outputs) for what in (False, True))
    assert begun == 2 and resumed >= 2, outputs
    TrainingJob(make_config(settings("alone", 4), "")).run()
    together, alone = (Path(settings(name, 1)["output"]) for name in ("together", "alone"))
    losses = [
        [p["loss"] for p in json.loads((out / "loss.json").read_text())["points"] if "loss" in p] for out in (together, alone)
    ]
    assert len(losses[1]) == 5
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=1e-4, atol=1e-5)
    weights, expected = (load_file(out / "model.safetensors") for out in (together, alone))
    for name, weight in expected.items():
        torch.testing.assert_close(weights[name], weight, rtol=0, atol=2e-5, msg=name)


def test_a_killed_process_and_the_run_goes_on(settings):
    check(settings, 1)


@pytest.mark.slow
def test_over_two_network_namespaces(settings):
    with two_namespaces() as prefixes:
        check(settings, 2, prefixes)


def test_only_a_restarted_run_goes_on_without_being_told(settings, monkeypatch):
    config = make_config(settings("out", 2), "")
    Path(config.output, "checkpoint-2").mkdir(parents=True)
    with pytest.raises(ConfigError, match="--resume"):
        TrainingJob(config)
    (Path(config.output) / ".torchrun").touch()  # an earlier run under torchrun ended here
    for restarts in ("0", "1"):  # torchrun restarts also what was refused
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", restarts)
        with pytest.raises(ConfigError, match="--resume"):
            TrainingJob(config)
    Path(config.output, "checkpoint-2").rmdir()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert not TrainingJob(config).resumes
    Path(config.output, "checkpoint-2").mkdir()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert TrainingJob(config).resumes
