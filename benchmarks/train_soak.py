"""Training that is killed again and again: `make soak`.

    python -m benchmarks.train_soak [--rounds 200] [--seed 0]

A tiny model is trained with a checkpoint after every step, and killed (SIGKILL) at a random moment: after a random time, or at
a random call that flushes, renames or removes something. After each kill every checkpoint that has a name must be whole, and
the newest may not be older than the newest before; the next round goes on from it. A run that gets through must end with the
same bytes as one that was never killed: weights, optimizer, scheduler, random numbers. Ends with status 1 on any failure.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import select
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

from deepseek_optimizer.errors import CheckpointError
from deepseek_optimizer.train.arguments import DeepSeekTrainingArguments
from deepseek_optimizer.train.checkpoints import manifest, saving, state
from deepseek_optimizer.train.checkpoints.directory import checkpoints, step_of
from deepseek_optimizer.train.trainer import DeepSeekTrainer

STEPS = 8  # of a run
CALLS = 100  # by which a process dies, if it dies at a call and is not done before
PATIENCE = 60.0  # seconds after which a run hangs
COMPARED = ("model.safetensors", "optimizer.safetensors", "scheduler.safetensors", "rng_state_0.safetensors")
# What writes, flushes, renames and removes: a process may die before any call of these.
FATAL: tuple[tuple[Any, str], ...] = (
    (os, "fsync"), (os, "rename"), (os, "replace"), (os, "makedirs"), (os, "unlink"), (shutil, "rmtree"), (state, "_write"),
    (saving, "write_state"), (saving, "write_manifest"), (manifest, "write_json"), (saving, "publish"), (saving, "rotate"),
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    torch.set_num_threads(1)  # children are forked, and torch's threads don't come along
    with tempfile.TemporaryDirectory() as folder:
        counts, failures = soak(Path(folder), a.rounds, a.seed)
    print(", ".join(f"{count} {what}" for what, count in counts.items()))
    for failure in failures:
        print(f"FAILED {failure}")
    print("failed" if failures else "passed")
    raise SystemExit(bool(failures))


def soak(folder: Path, rounds: int, seed: int) -> tuple[Counter[str], list[str]]:
    """Kills as often as asked; what happened, and what should not have."""
    draw, counts, failures = random.Random(seed), Counter[str](), list[str]()
    straight, began = folder / "straight", time.monotonic()
    if _child(lambda: _train(straight), PATIENCE) != 0:
        return counts, ["the run that is not killed failed"]
    whole = time.monotonic() - began
    expected = _digests(straight / f"checkpoint-{STEPS}")
    number, newest = 0, -1
    while counts["killed"] < rounds and not failures:
        run = folder / f"run-{number}"
        call = draw.randrange(CALLS) if draw.random() < 0.5 else None
        seconds = PATIENCE if call is not None else draw.random() * whole
        status = _child(lambda call=call, run=run: _train(run, call), seconds)  # type: ignore[misc]
        if status == 0:
            counts["finished"] += 1
            if _digests(run / f"checkpoint-{STEPS}") != expected:
                failures.append(f"{run.name}: the end differs from that of a run that was not killed")
            shutil.rmtree(run)
            number, newest = number + 1, -1
            continue
        if status != -signal.SIGKILL:
            failures.append(f"{run.name}: a run ended with status {status} instead of being killed")
            continue
        counts["killed"] += 1
        counts["killed while saving"] += any(path.name.endswith("tmp") for path in run.iterdir()) if run.is_dir() else 0
        failures += _damages(run)
        last = max((step_of(path) or 0 for path in checkpoints(run)), default=-1)
        if last < newest:
            failures.append(f"{run.name}: checkpoint-{newest} was there, and checkpoint-{last} is the newest now")
        newest = last
    return counts, failures


def _damages(run: Path) -> list[str]:
    found = []
    for path in checkpoints(run):
        try:
            manifest.verify(path)
        except CheckpointError as error:
            found.append(str(error))
    return found


def _digests(checkpoint: Path) -> dict[str, str]:
    files = json.loads((checkpoint / manifest.MANIFEST).read_text())["files"]
    return {name: files[name]["sha256"] for name in COMPARED}


def _train(run: Path, call: int | None = None) -> None:
    """Trains to the end, from where the last one got to; dies at a call, if one is given."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": 64,
    }
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=1, attention_dropout=0.1))
    tokens = torch.randint(64, (40, 8), generator=torch.Generator().manual_seed(0))
    arguments = DeepSeekTrainingArguments(
        output_dir=str(run), max_steps=STEPS, save_steps=1, save_total_limit=2, per_device_train_batch_size=2,
        gradient_accumulation_steps=2, learning_rate=1e-2, report_to=[], disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip
    trainer = DeepSeekTrainer(model, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in tokens])
    if call is not None:
        _die_at(call)
    trainer.train(resume_from_checkpoint=bool(checkpoints(run)))


def _die_at(n: int) -> None:
    """Kills this process at call `n` of FATAL, all counted together. For a forked child: nothing is put back."""
    left = [n]

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
            return function(*args, **kwargs)

        return call

    for module, name in FATAL:
        setattr(module, name, counted(getattr(module, name)))


def _child(work: Callable[[], None], seconds: float) -> int:
    """Does work in a forked process, and kills it after some seconds; its status, negative for a signal."""
    sys.stdout.flush()
    process = os.fork()
    if process == 0:
        status = 1
        try:
            sys.stdout = sys.stderr = open(os.devnull, "w")
            transformers.utils.logging.disable_progress_bar()
            work()
            status = 0
        finally:
            os._exit(status)
    watch = os.pidfd_open(process)
    try:
        if not select.select([watch], [], [], seconds)[0]:
            os.kill(process, signal.SIGKILL)
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    finally:
        os.close(watch)


if __name__ == "__main__":
    main()
