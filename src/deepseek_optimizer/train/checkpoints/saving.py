"""Transformers' Trainer with atomic checkpoints, from which training resumes bit for bit.

Trainer writes a checkpoint file by file under its final name, and pickles some of the files. Here it writes to a temporary
directory, which gets a manifest (`manifest.py`), is flushed to the disk, and is renamed in one step; only then are old
checkpoints removed. The states of optimizer, scheduler and random generators are saved by overriding Trainer's methods for
them.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import distributed
from transformers import set_seed

from ...checkpoint.atomic import merged_directory, naming, publish
from ...checkpoint.shards import is_weights
from ...errors import CheckpointError, SaveError
from ...integration.training.modules import is_tied
from ...integration.training.trainer import HookedTrainer
from .converted import ConvertedWeights
from .directory import checkpoints, locked, newest_intact, remove_unfinished, rotate, step_of, verified
from .manifest import write_manifest
from .random_numbers import random_states, set_random_states
from .sharded import gathered, scattered, whole
from .sharded_weights import load_shards
from .state import read_state, sizes, write_state

OPTIMIZER, SCHEDULER, ARGUMENTS = "optimizer.safetensors", "scheduler.safetensors", "training_args.json"
_PICKLED_ARGUMENTS = "training_args.bin"
# In messages of the RuntimeErrors that torch.save raises if a write fails: its writer's, and the C++ stream's below it.
_WRITE_ERRORS = ("PytorchStreamWriter", "iostream error")


class AtomicCheckpoints(ConvertedWeights, HookedTrainer):
    """The part of `DeepSeekTrainer` that saves and loads checkpoints.

    `train(resume_from_checkpoint=True)` resumes from the newest intact checkpoint, and warns about damaged ones that it skips;
    a checkpoint passed by path must be intact. Only one run at a time can train into a directory.

    Raises:
        CheckpointError: a checkpoint is damaged, or another run is using the directory.
        SaveError: a checkpoint could not be written; earlier ones are unchanged.
    """

    model: Any
    args: Any
    optimizer: Any
    lr_scheduler: Any

    _temporary: Path | None = None  # the temporary directory of the checkpoint being written
    _push_later = False

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        with self._run_directory():
            return super().train(self._verified_checkpoint(resume_from_checkpoint), *args, **kwargs)

    @contextlib.contextmanager
    def _run_directory(self) -> Iterator[None]:
        """Holds the directory's lock in the saving process, and raises in all processes if that fails."""
        run = Path(self.args.output_dir)
        with contextlib.ExitStack() as stack:
            try:
                if self.args.should_save:
                    stack.enter_context(locked(run))
                    remove_unfinished(run)
            except (CheckpointError, OSError):
                self._from_main(0)
                raise
            if not self._from_main(1):
                raise CheckpointError("process 0 failed to start; see its error message", file=run)
            yield

    def _verified_checkpoint(self, requested: str | bool | None) -> str | None:
        """The path of the checkpoint to resume from, which process 0 has verified; None: start from the beginning."""
        if not requested:
            return None
        run = Path(self.args.output_dir)
        step, result = -1, None
        try:
            if self.args.process_index == 0:
                result = newest_intact(run) if requested is True else verified(Path(requested))
                step = step_of(result) or 0
        finally:
            step = self._from_main(step)
        if step < 0:
            raise CheckpointError("process 0 found no intact checkpoint; see its error message", file=run)
        return str(result or (run / f"checkpoint-{step}" if requested is True else requested))

    def _from_main(self, number: int) -> int:
        """Broadcasts an integer from process 0."""
        if self.args.world_size <= 1:
            return number
        box = torch.tensor([number], dtype=torch.int64, device=self.args.device)
        distributed.broadcast(box, src=0)
        return int(box.item())

    def _barrier(self) -> None:
        if self.args.world_size > 1:
            self.accelerator.wait_for_everyone()

    def run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Like Trainer's, but a run that was killed after its last step does not run another step when it is resumed."""
        if self.state.global_step >= self.state.max_steps:
            self.load_random_states(kwargs.get("resume_from_checkpoint"))
            self.control.should_training_stop = True
        else:
            super().run_epoch(*args, **kwargs)

    # ---- writing ----

    def checkpoints_directory(self, trial: Any) -> str:
        """Like Trainer's; while a checkpoint is written, its temporary directory."""
        return super().checkpoints_directory(trial) if self._temporary is None else str(self._temporary)

    def write_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        run = Path(self.checkpoints_directory(trial))
        target = run / f"checkpoint-{self.state.global_step}"
        best = self.state.best_model_checkpoint
        with self._saving(target), self._directory(run / f".{target.name}.tmp") as temporary:
            try:
                self._temporary = temporary
                super().write_checkpoint(model, trial)
                self._barrier()
            finally:
                self._temporary, self.state.best_model_checkpoint = None, best
            self._update_best(run)
            if self.args.should_save:
                self._finish(temporary / target.name)
                publish(temporary / target.name, target, overwrite=True)
            self._barrier()
        if self.args.should_save:
            rotate(run, self.args.save_total_limit, self.state.best_model_checkpoint)
        if self._push_later:
            self._push_later = False
            self.push_checkpoint(str(target))

    def _finish(self, directory: Path) -> None:
        """Completes a checkpoint: the arguments as JSON, the state with the path of the best checkpoint, and the manifest."""
        (directory / _PICKLED_ARGUMENTS).unlink(missing_ok=True)
        (directory / ARGUMENTS).write_text(self.args.to_json_string(), encoding="utf-8")
        self.state.save_to_json(str(directory / "trainer_state.json"))
        write_manifest(directory, self.state.global_step, self.args.world_size)

    def _update_best(self, run: Path) -> None:
        best = self.state.best_global_step
        if best and (best == self.state.global_step or (run / f"checkpoint-{best}").is_dir()):
            self.state.best_model_checkpoint = str(run / f"checkpoint-{best}")

    def push_checkpoint(self, checkpoint_folder: str) -> None:
        if self._temporary is not None:
            self._push_later = True  # after the checkpoint was renamed
        else:
            super().push_checkpoint(checkpoint_folder)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Like Trainer's, but atomic: an existing model is never partly overwritten. See `merged_directory`."""
        if self._temporary is not None:
            return self._write_model(str(output_dir))
        target = Path(output_dir or self.args.output_dir)
        fresh = merged_directory(target, is_weights) if self.args.should_save else contextlib.nullcontext(target)
        with self._saving(target), fresh as temporary:
            self._write_model(str(temporary))
            self._barrier()
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _write_model(self, directory: str) -> None:
        if not self.is_fsdp_enabled:
            return super().save_model(directory, _internal_call=True)
        state = {name: whole(tensor) for name, tensor in self.accelerator.get_state_dict(self.model).items()}
        if self.args.should_save:
            self.save_weights(directory, state)

    @contextlib.contextmanager
    def _directory(self, path: Path) -> Iterator[Path]:
        """A temporary directory for all processes, removed afterwards."""
        if self.args.should_save:
            shutil.rmtree(path, ignore_errors=True)
            path.mkdir(parents=True)
        self._barrier()
        try:
            yield path
        finally:
            if self.args.should_save:
                shutil.rmtree(path, ignore_errors=True)

    @contextlib.contextmanager
    def _saving(self, target: Path) -> Iterator[None]:
        """Checks the free disk space first, and turns disk errors into SaveError."""
        run = target.parent
        last = next((path for path in reversed(checkpoints(run)) if path != target), None)
        if self.args.should_save:
            run.mkdir(parents=True, exist_ok=True)
            needed, free = self._bytes_to_save(), shutil.disk_usage(run).free
            if free < needed:
                raise SaveError(target, f"it needs {needed / 1e9:.2f} GB, but the disk has {free / 1e9:.2f} GB free", last)
        try:
            with naming(target):
                yield
        except (OSError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not any(part in str(error) for part in _WRITE_ERRORS):
                raise
            raise SaveError(target, str(error), last) from error

    def _bytes_to_save(self) -> int:
        """Bytes of the weights and the optimizer state; with an adapter, only trained weights count."""
        weights = [p for p in self.model.parameters() if p.requires_grad or not hasattr(self.model, "peft_config")]
        optimizer = 0 if self.args.save_only_model or self.optimizer is None else sizes(self.optimizer.state_dict()["state"])
        return optimizer + sum(_local(p).nbytes for p in weights)

    # ---- states that Trainer would pickle ----

    def save_optimizer_state(self, output_dir: str) -> None:
        directory = Path(output_dir)
        state = gathered(self.optimizer.state_dict(), self.optimizer.param_groups)
        if self.args.should_save:
            write_state(directory / OPTIMIZER, state)
            write_state(directory / SCHEDULER, self.lr_scheduler.state_dict())

    def load_optimizer_state(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        directory = Path(checkpoint)
        for name in (OPTIMIZER, SCHEDULER):
            if not (directory / name).is_file():
                raise CheckpointError(
                    f"has no {name} (save_only_model=True?), so training cannot be resumed; start a new run from its weights",
                    file=directory,
                )
        self.optimizer.load_state_dict(scattered(read_state(directory / OPTIMIZER), self.optimizer))
        self.lr_scheduler.load_state_dict(read_state(directory / SCHEDULER))

    def save_random_states(self, output_dir: str) -> None:
        os.makedirs(output_dir, exist_ok=True)  # this process may be faster than process 0
        write_state(self._rng_file(output_dir), random_states())

    def load_random_states(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        file = self._rng_file(checkpoint)
        if not file.is_file():  # trained with fewer processes
            step = step_of(Path(checkpoint)) or 0
            set_seed(int(np.random.SeedSequence((self.args.seed, step, self.args.process_index)).generate_state(1)[0]))
            return
        set_random_states(read_state(file))

    def _rng_file(self, directory: str) -> Path:
        return Path(directory, f"rng_state_{self.args.process_index}.safetensors")

    def load_weights(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        # PEFT converts loaded adapter weights to float32; converting bf16 to float32 and back is exact.
        loaded = self.model if model is None else model
        if self.is_fsdp_enabled:
            return load_shards(Path(resume_from_checkpoint), loaded)
        dtypes = {name: parameter.dtype for name, parameter in loaded.named_parameters()}
        super().load_weights(resume_from_checkpoint, model)
        for name, parameter in loaded.named_parameters():
            if parameter.dtype != dtypes.get(name, parameter.dtype):
                parameter.data = parameter.data.to(dtypes[name])

    def warn_of_other_weights(self, load_result: Any) -> None:
        """Like Trainer's, but a tied weight does not count as missing."""
        missing = [name for name in load_result.missing_keys if not is_tied(self.model, name)]
        super().warn_of_other_weights(load_result._replace(missing_keys=missing))


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """This process's shard of a sharded tensor; any other tensor unchanged."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
