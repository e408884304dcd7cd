"""Transformers' Trainer with checkpoints that are written whole or not at all, and resumed to the bit.

Trainer writes a checkpoint file by file under its final name, and pickles part of it. Here it writes into a directory without a
name beside it; that is listed (`manifest.py`), flushed to the disk, and takes its name in one rename. Old checkpoints go after
that. Optimizer, scheduler and random numbers go through the hooks that Trainer has for them.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import distributed
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

from ...checkpoint.atomic import merged_directory, naming, publish
from ...checkpoint.shards import is_weights
from ...errors import CheckpointError, ConfigError, SaveError
from ...integration.training.modules import is_tied
from ...integration.training.trainer import HookedTrainer
from .directory import checkpoints, locked, newest_whole, remove_unfinished, rotate, step_of, verified
from .experts import MergedExperts
from .manifest import write_manifest
from .random_numbers import random_states, set_random_states
from .sharded import gathered, scattered, whole
from .state import read_state, sizes, write_state

OPTIMIZER, SCHEDULER, ARGUMENTS = "optimizer.safetensors", "scheduler.safetensors", "training_args.json"
_PICKLED_ARGUMENTS = "training_args.bin"


class AtomicCheckpoints(MergedExperts, HookedTrainer):
    """What `DeepSeekTrainer` does about checkpoints.

    `train(resume_from_checkpoint=True)` goes on from the newest checkpoint that is whole, and says which damaged ones it passed
    over; a checkpoint that is named must be whole. One run at a time trains into a directory.

    Raises, from `train` and whatever saves:
        CheckpointError: a checkpoint is damaged, or another run has the directory.
        SaveError: a checkpoint could not be written; those before it are as they were.
    """

    model: Any
    args: Any
    optimizer: Any
    lr_scheduler: Any

    _unnamed: Path | None = None  # the directory that a checkpoint is being written into
    _push_later = False

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        with self._run_directory():
            return super().train(self._whole_checkpoint(resume_from_checkpoint), *args, **kwargs)

    @contextlib.contextmanager
    def _run_directory(self) -> Iterator[None]:
        """Holds the lock in the process that saves; the others learn whether it has it."""
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
                raise CheckpointError("process 0 could not begin: its message says why", file=run)
            yield

    def _whole_checkpoint(self, asked: str | bool | None) -> str | None:
        """The path of a checkpoint that was read through and is whole. Process 0 reads, for all."""
        if not asked:
            return None
        run = Path(self.args.output_dir)
        step, found = -1, None
        try:
            if self.args.process_index == 0:
                found = newest_whole(run) if asked is True else verified(Path(asked))
                step = step_of(found) or 0
        finally:
            step = self._from_main(step)
        if step < 0:
            raise CheckpointError("process 0 found no whole checkpoint: its message says more", file=run)
        return str(found or (run / f"checkpoint-{step}" if asked is True else asked))

    def _from_main(self, number: int) -> int:
        """Process 0's number, in every process."""
        if self.args.world_size <= 1:
            return number
        box = torch.tensor([number], dtype=torch.int64, device=self.args.device)
        distributed.broadcast(box, src=0)
        return int(box.item())

    def _barrier(self) -> None:
        if self.args.world_size > 1:
            self.accelerator.wait_for_everyone()

    def run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Trainer looks whether it is done after a step only: a run that was killed after its last one would make one more."""
        if self.state.global_step >= self.state.max_steps:
            self.load_random_states(kwargs.get("resume_from_checkpoint"))
            self.control.should_training_stop = True
        else:
            super().run_epoch(*args, **kwargs)

    # ---- writing ----

    def checkpoints_directory(self, trial: Any) -> str:
        """While a checkpoint is written, the directory without a name: all that Trainer writes goes there."""
        return super().checkpoints_directory(trial) if self._unnamed is None else str(self._unnamed)

    def write_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        run = Path(self.checkpoints_directory(trial))
        target = run / f"checkpoint-{self.state.global_step}"
        best = self.state.best_model_checkpoint
        with self._saving(target), self._directory(run / f".{target.name}.tmp") as unnamed:
            try:
                self._unnamed = unnamed
                super().write_checkpoint(model, trial)
                self._barrier()
            finally:
                self._unnamed, self.state.best_model_checkpoint = None, best
            self._note_best(run)
            if self.args.should_save:
                self._finish(unnamed / target.name)
                publish(unnamed / target.name, target, overwrite=True)
            self._barrier()
        if self.args.should_save:
            rotate(run, self.args.save_total_limit, self.state.best_model_checkpoint)
        if self._push_later:
            self._push_later = False
            self.push_checkpoint(str(target))

    def _finish(self, directory: Path) -> None:
        """The last that a checkpoint gets: the state with the path of the best one, arguments without pickle, the list."""
        (directory / _PICKLED_ARGUMENTS).unlink(missing_ok=True)
        (directory / ARGUMENTS).write_text(self.args.to_json_string(), encoding="utf-8")
        self.state.save_to_json(str(directory / "trainer_state.json"))
        write_manifest(directory, self.state.global_step, self.args.world_size)

    def _note_best(self, run: Path) -> None:
        best = self.state.best_global_step
        if best and (best == self.state.global_step or (run / f"checkpoint-{best}").is_dir()):
            self.state.best_model_checkpoint = str(run / f"checkpoint-{best}")

    def push_checkpoint(self, checkpoint_folder: str) -> None:
        if self._unnamed is not None:
            self._push_later = True  # not before it has its name
        else:
            super().push_checkpoint(checkpoint_folder)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Trainer's, but all files change at once: a model that lay there is never half overwritten. See `merged_directory`."""
        if self._unnamed is not None:
            return self._write_model(str(output_dir))
        target = Path(output_dir or self.args.output_dir)
        fresh = merged_directory(target, is_weights) if self.args.should_save else contextlib.nullcontext(target)
        with self._saving(target), fresh as unnamed:
            self._write_model(str(unnamed))
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
        """A fresh directory that all processes know; it is gone afterwards."""
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
        """Looks for room first, and says of errors of the disk what they leave."""
        run = target.parent
        last = next((path for path in reversed(checkpoints(run)) if path != target), None)
        if self.args.should_save:
            run.mkdir(parents=True, exist_ok=True)
            needed, free = self._bytes_to_save(), shutil.disk_usage(run).free
            if free < needed:
                raise SaveError(target, f"it takes {needed / 1e9:.2f} GB, and {free / 1e9:.2f} GB of the disk are free", last)
        try:
            with naming(target):
                yield
        except (OSError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "PytorchStreamWriter" not in str(error):
                raise
            raise SaveError(target, str(error), last) from error

    def _bytes_to_save(self) -> int:
        """Of weights and optimizer; with adapters, the weights that train."""
        weights = [p for p in self.model.parameters() if p.requires_grad or not hasattr(self.model, "peft_config")]
        optimizer = 0 if self.args.save_only_model or self.optimizer is None else sizes(self.optimizer.state_dict()["state"])
        return optimizer + sum(_local(p).nbytes for p in weights)

    # ---- what Trainer pickles ----

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
                    f"has no {name} (save_only_model=True?), so training can't go on from it; begin a new run from its weights",
                    file=directory,
                )
        self.optimizer.load_state_dict(scattered(read_state(directory / OPTIMIZER), self.optimizer))
        self.lr_scheduler.load_state_dict(read_state(directory / SCHEDULER))

    def save_random_states(self, output_dir: str) -> None:
        os.makedirs(output_dir, exist_ok=True)  # a process may be here before process 0 made it
        write_state(self._rng_file(output_dir), random_states())

    def load_random_states(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        file = self._rng_file(checkpoint)
        if not file.is_file():
            raise CheckpointError(
                f"has no {file.name}: it was trained by fewer processes than the {self.args.world_size} there are; take as "
                "many as then",
                file=Path(checkpoint),
            )
        set_random_states(read_state(file))

    def _rng_file(self, directory: str) -> Path:
        return Path(directory, f"rng_state_{self.args.process_index}.safetensors")

    def load_weights(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        # PEFT makes the weights of an adapter that it loads float32, whatever they were; bf16 goes there and back exactly.
        loaded = self.model if model is None else model
        if self.is_fsdp_enabled:
            return self._load_shards(Path(resume_from_checkpoint), loaded)
        dtypes = {name: parameter.dtype for name, parameter in loaded.named_parameters()}
        super().load_weights(resume_from_checkpoint, model)
        for name, parameter in loaded.named_parameters():
            if parameter.dtype != dtypes.get(name, parameter.dtype):
                parameter.data = parameter.data.to(dtypes[name])

    def warn_of_other_weights(self, load_result: Any) -> None:
        """As Trainer's; a tied weight is not missing, for it is another one of the checkpoint."""
        missing = [name for name in load_result.missing_keys if not is_tied(self.model, name)]
        super().warn_of_other_weights(load_result._replace(missing_keys=missing))

    @staticmethod
    def _load_shards(directory: Path, model: torch.nn.Module) -> None:
        """Each process reads the whole weights, and keeps its shards."""
        if hasattr(model, "peft_config"):
            raise ConfigError(
                "resume_from_checkpoint cannot be had for adapters with fsdp: they are small, so train them without fsdp (each "
                "process then has the model)"
            )
        state: dict[str, Any] = {}
        for file in sorted(directory.glob("*.safetensors")):
            if file.name.startswith("model"):
                state |= load_file(file)
        found = set_model_state_dict(model, state, options=StateDictOptions(full_state_dict=True, strict=False))
        absent = [name for name in found.missing_keys if not is_tied(model, name)]
        if absent or found.unexpected_keys:
            raise CheckpointError(
                f"is not of this model: {len(absent)} of its tensors are missing, {len(found.unexpected_keys)} are unknown",
                file=directory, tensor=next(iter([*absent, *found.unexpected_keys])),
            )  # fmt: skip


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """This process's part of a sharded tensor."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
