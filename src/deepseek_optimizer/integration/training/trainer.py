"""Transformers' Trainer with public names for the private methods that this package's trainer replaces.

Trainer has no public extension points for writing and reading checkpoints, nor for clipping gradients. Only this class
overrides the private methods. If a release of Transformers no longer calls one of them, Trainer's own behavior applies.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig, Trainer
from transformers.training_args import OptimizerNames


def optimizer_names() -> tuple[str, ...]:
    """Values of `TrainingArguments.optim`."""
    return tuple(name.value for name in OptimizerNames)


class HookedTrainer(Trainer):
    """A Trainer with public methods to override. Trainer calls the private method below each, which calls the public one."""

    def run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Trains for one epoch."""
        super()._run_epoch(*args, **kwargs)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        self.run_epoch(*args, **kwargs)

    # ---- gradients ----

    def clip_gradients(self, model: Any) -> Any:
        """Clips gradients to `max_grad_norm`; returns their norm."""
        return super()._clip_grad_norm(model)

    def _clip_grad_norm(self, model: Any) -> Any:
        return self.clip_gradients(model)

    def gradient_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """The gradient norm to log. `grad_norm`: the result of `clip_gradients`; None: gradients are not clipped."""
        return super()._get_grad_norm(model, grad_norm=grad_norm)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        return self.gradient_norm(model, grad_norm)

    # ---- writing checkpoints ----

    def checkpoints_directory(self, trial: Any) -> str:
        """The directory that checkpoints are written to."""
        return super()._get_output_dir(trial)

    def _get_output_dir(self, trial: Any) -> str:
        return self.checkpoints_directory(trial)

    def write_checkpoint(self, model: Any, trial: Any) -> None:
        """Writes a checkpoint of the current step."""
        super()._save_checkpoint(model, trial)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.write_checkpoint(model, trial)

    def save_weights(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Writes the model's weights and configs. `state_dict`: the weights; None: the model's."""
        super()._save(output_dir, state_dict)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        self.save_weights(output_dir, state_dict)

    def save_optimizer_state(self, output_dir: str) -> None:
        """Writes the states of the optimizer and the scheduler."""
        super()._save_optimizer_and_scheduler(output_dir)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        self.save_optimizer_state(output_dir)

    def save_random_states(self, output_dir: str) -> None:
        """Writes the states of the random number generators of this process."""
        super()._save_rng_state(output_dir)

    def _save_rng_state(self, output_dir: str) -> None:
        self.save_random_states(output_dir)

    def push_checkpoint(self, checkpoint_folder: str) -> None:
        """Uploads a checkpoint to the hub."""
        super()._push_from_checkpoint(checkpoint_folder)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        self.push_checkpoint(checkpoint_folder)

    # ---- reading checkpoints ----

    def load_weights(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Loads a checkpoint's weights into `model`; None: into the trainer's model."""
        with _readable(Path(resume_from_checkpoint)) as folder:
            super()._load_from_checkpoint(str(folder), model)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.load_weights(resume_from_checkpoint, model)

    def load_best_weights(self) -> None:
        """Loads the weights of the best checkpoint."""
        super()._load_best_model()

    def _load_best_model(self) -> None:
        self.load_best_weights()

    def warn_of_other_weights(self, load_result: Any) -> None:
        """Warns of missing and unexpected weights in a checkpoint."""
        super()._issue_warnings_after_load(load_result)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        self.warn_of_other_weights(load_result)

    def load_optimizer_state(self, checkpoint: str | None) -> None:
        """Loads the states of the optimizer and the scheduler; None: does nothing."""
        super()._load_optimizer_and_scheduler(checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        self.load_optimizer_state(checkpoint)

    def load_random_states(self, checkpoint: str | None) -> None:
        """Loads the states of the random number generators of this process; None: does nothing."""
        super()._load_rng_state(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        self.load_random_states(checkpoint)


@contextmanager
def _readable(checkpoint: Path) -> Iterator[Path]:
    """A checkpoint's directory, or one of links to its files with a config.json that has only the version of Transformers.

    Trainer reads that version from the config, for a warning, as a config of the base class. This refuses values that the
    family's own class accepts, such as DeepSeek-V4's `mlp_layer_types`.
    """
    config = checkpoint / "config.json"
    try:
        if config.is_file():
            PreTrainedConfig.from_json_file(str(config))
    except StrictDataclassError:
        with tempfile.TemporaryDirectory() as folder:
            for path in checkpoint.iterdir():
                if path != config:
                    (Path(folder) / path.name).symlink_to(path.absolute())
            version = {"transformers_version": json.loads(config.read_text(encoding="utf-8")).get("transformers_version")}
            (Path(folder) / config.name).write_text(json.dumps(version), encoding="utf-8")
            yield Path(folder)
    else:
        yield checkpoint
