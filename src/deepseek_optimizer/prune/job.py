"""A run of `dso prune`: measures what may be left out, writes the pruned model, trains it to recover, and compares."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING

from ..calibration.built_in import built_in_stretches
from ..calibration.text import read_text, sample_text, stretches
from ..checkpoint import QuantizedCheckpoint, SafetensorsCheckpoint, atomic_directory, load_tokenizer, open_checkpoint
from ..checkpoint.directory import read_config
from ..errors import CheckpointError, ConfigError
from ..integration.configs import check_config
from ..integration.load.resolve import resolve
from ..optimized_model import load_model
from ..system.progress import show_progress
from ..system.threads import one_torch_thread
from ..train.config import TrainConfig
from ..train.job import SETTINGS, RunSummary, TrainingJob
from .depth import LeftOut
from .families import widths_of
from .measure import choose_layers, choose_units, counts_of
from .report import Row, rows_of
from .selection import Selection
from .write import pruned_config, write_pruned

LENGTH, COUNT = 512, 8  # tokens per stretch and stretches of the text that units are chosen on
SHORT, FEW = 128, 4  # the same of the text that layers are chosen on, which runs once for each trial
EVALUATED = 4  # stretches of LENGTH tokens that the models are compared on


@dataclass(frozen=True)
class PruneConfig:
    """What to prune.

    Attributes:
        model: a directory or a model name on the Hugging Face Hub, with float weights.
        output: the directory to create.
        fractions: "depth", "mlp", "heads" or "experts" -> the fraction of layers, channels, heads or experts to leave out.
        calibration: a text to choose on; None: the built-in one.
        text: a text to compare on; None: pages of Python's documentation.
        recovery: the training that recovers the pruned model, with its `output`; None: none. Its model and teacher are set.
        overwrite: replace `output` if it exists.
    """

    model: str
    output: str
    fractions: Mapping[str, float]
    calibration: str | None = None
    text: str | None = None
    recovery: Mapping[str, Any] | None = None
    overwrite: bool = False


@dataclass(frozen=True)
class PruneSummary:
    """The result.

    Attributes:
        output: the final model's directory.
        pruned: the directory of the model before recovery.
        left_out: the layers that were left out, in this order.
        kept: by kind, how many units stay in each layer.
        rows: the comparison.
        seconds: of training; None: there was none.
    """

    output: str
    pruned: str
    left_out: tuple[LeftOut, ...]
    kept: Mapping[str, int]
    rows: tuple[Row, ...]
    seconds: float | None

    def to_dict(self) -> dict[str, Any]:
        """The summary as a dictionary, for JSON."""
        return {
            "output": self.output,
            "pruned": self.pruned,
            "left_out": [[one.layer, one.kl] for one in self.left_out],
            "kept": dict(self.kept),
            "rows": [row.to_dict() for row in self.rows],
            "seconds": self.seconds,
        }


class PruneJob:
    """A run that is ready to start. Settings are checked without loading any weights.

    Raises:
        ConfigError: invalid settings, or a model whose weights are quantized.
        UnsupportedModelError: its family cannot be pruned, or not in this way.
        CheckpointError: the model cannot be read, or `output` exists.
    """

    def __init__(self, config: PruneConfig) -> None:
        self.config, self.source = config, resolve(config.model)
        if not config.fractions:
            raise ConfigError("nothing to prune; give the fraction of layers (depth), channels (mlp), heads or experts")
        self.output = Path(config.output)
        self.pruned = self.output.with_name(f"{self.output.name}-pruned") if config.recovery is not None else self.output
        for path in dict.fromkeys((self.output, self.pruned)):
            if path.exists() and not (config.overwrite and path == self.pruned):
                raise CheckpointError("exists already; choose another directory, or remove it", file=path)
        with open_checkpoint(self.source) as checkpoint:
            if not isinstance(checkpoint, SafetensorsCheckpoint) or isinstance(checkpoint, QuantizedCheckpoint):
                raise ConfigError(f"model: the weights of {config.model} are quantized; prune the original model")
            fields = checkpoint.config()
            widths_of(fields.get("model_type"))
            if read_config(self.source).get("model_type") != fields["model_type"]:
                raise ConfigError(f"model: {config.model} is multimodal; only language models can be pruned")
            self.settings = _settings(fields)
            self.counts = counts_of(self.settings, config.fractions)
            self.tokenizer = load_tokenizer(checkpoint)
        pruned_config(self.settings, self._sketch())
        self.recovery = None if config.recovery is None else _recovery(config, self.pruned)

    def _sketch(self) -> Selection:
        """Any selection of the right size, to check the config that follows from it."""
        layers = tuple(range(self.counts.get("depth", self.settings.num_hidden_layers)))
        kept = {kind: {0: tuple(range(count))} for kind, count in self.counts.items() if kind != "depth"}
        return Selection(layers, kept)

    def run(
        self,
        tell: Callable[[str], None] = lambda line: None,
        train: Callable[[TrainingJob], RunSummary] = TrainingJob.run,
    ) -> PruneSummary:
        """Prunes, recovers and compares.

        Args:
            tell: called with lines for the user.
            train: runs the training that recovers the model, and may show its progress.

        Raises:
            NotEnoughMemoryError, CheckpointError, ConfigError: as in `load_model` and `TrainingJob`.
        """
        original = load_model(self.source, precision="auto", calibration=None, vision="off")
        with torch.inference_mode(), one_torch_thread():
            left_out, selection = self._choose(original)
        with open_checkpoint(self.source) as checkpoint, atomic_directory(self.pruned, self.config.overwrite) as folder:
            write_pruned(checkpoint, self.settings, selection, folder)
            self.tokenizer.save_pretrained(folder)
        tell(f"pruned model: {self.pruned}")
        seconds = None
        others = [("pruned", self.pruned)]
        if self.recovery is not None:
            tell(f"training it; if that is interrupted, continue with: dso train {self.output / SETTINGS} --resume")
            seconds = train(TrainingJob(self.recovery)).seconds
            others.append(("recovered", self.output))
        models = [(name, load_model(path, precision="auto", calibration=None)) for name, path in others]
        with one_torch_thread():
            rows = rows_of(original, models, [self.source, *(path for _, path in others)], self._held_out())
        return PruneSummary(
            output=str(self.output),
            pruned=str(self.pruned),
            left_out=tuple(left_out),
            kept={kind: count for kind, count in self.counts.items() if kind != "depth"},
            rows=tuple(rows),
            seconds=seconds,
        )

    def _choose(self, model: Any) -> tuple[list[LeftOut], Selection]:
        layers = list(range(self.settings.num_hidden_layers))
        left_out: list[LeftOut] = []
        if "depth" in self.counts:
            with show_progress("Leaving out layers") as progress:
                left_out = choose_layers(model, self._texts(SHORT, FEW), self.counts["depth"], progress)
            layers = [i for i in layers if all(i != one.layer for one in left_out)]
        counts = {kind: count for kind, count in self.counts.items() if kind != "depth"}
        if not counts:
            return left_out, Selection(tuple(layers))
        with open_checkpoint(self.source) as checkpoint:
            return left_out, choose_units(model, checkpoint, self._texts(LENGTH, COUNT), layers, counts)

    def _texts(self, length: int, count: int) -> list[torch.Tensor]:
        """The text that is measured on to choose."""
        length = min(length, self.settings.max_position_embeddings)
        file = self.config.calibration
        if file is None:
            return built_in_stretches(self.tokenizer, length, count)
        return stretches(self.tokenizer, read_text(file), length, count, file)

    def _held_out(self) -> list[torch.Tensor]:
        """The text that the models are compared on."""
        length, file = min(LENGTH, self.settings.max_position_embeddings), self.config.text
        if file is None:
            return stretches(self.tokenizer, sample_text(), length, EVALUATED, "Python's documentation")
        return stretches(self.tokenizer, read_text(file), length, EVALUATED, file)


def _settings(fields: dict[str, Any]) -> Any:
    check_config(fields)
    return CONFIG_MAPPING[fields["model_type"]].from_dict(fields)


def _recovery(config: PruneConfig, pruned: Path) -> TrainConfig:
    """The training of the pruned model with the original as its teacher."""
    given = dict(config.recovery or {})
    arguments = {"teacher": config.model, **given.pop("arguments", {})}
    return TrainConfig.model_validate({**given, "model": str(pruned), "output": config.output, "arguments": arguments})
