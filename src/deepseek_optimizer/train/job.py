"""A training run, from its configuration to the saved model: validation, plan, training, result."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    EarlyStoppingCallback,
    IntervalStrategy,
    PrinterCallback,
    TrainerCallback,
    set_seed,
)

from ..backends.cpu import oversubscription
from ..backends.cpu.environment import forced_threads
from ..checkpoint import Checkpoint, GgufCheckpoint, PackedCheckpoint, QuantizedCheckpoint, load_tokenizer, open_checkpoint
from ..checkpoint.atomic import atomic_file
from ..errors import ConfigError
from ..integration.configs import check_config
from ..integration.load.loader import sketch
from ..integration.load.mtp_layers import stored_mtp_layers
from ..integration.load.resolve import resolve
from ..models.families import FAMILIES
from ..quant import WEIGHED
from ..system.memory import free_memory
from . import lora
from .arguments import DeepSeekTrainingArguments
from .checkpoints.directory import checkpoints, locked
from .config import TrainConfig
from .curve import JSON_NAME, PNG_NAME, LossCurve
from .data import Collator, DataReport, PackedRows, TokenDataset, load_data
from .data.packing import row_for
from .defaults import defaults, intervals
from .disk import check_writable, plan_disk
from .fp8.backend import from_arguments
from .load_for_training import load_for_training
from .modules.draft_layer import sketch_draft_layer
from .ops.native import built
from .plan import TrainingPlan, steps_of
from .precision import DTYPES
from .prepare import prepare, trainable
from .quantization import RoundedWeights
from .report import plan_memory
from .restarts import decide
from .teacher import SELF, check_tokenizer, teacher_weights
from .trainer import DeepSeekTrainer

SETTINGS = "train.json"
_FIXED = ("model", "data", "lora", "precision")  # settings that must not change when a run is resumed
_FIXED_ARGUMENTS = ("quantize", "teacher", "teacher_weight")


@dataclass(frozen=True)
class RunSummary:
    """The result of a training run.

    Attributes:
        output: the output directory.
        kind: "model", "adapter", "merged model" or "packed model".
        loads: whether `dso chat` and `load_model` can load the output directly.
        eval_before, eval_after: evaluation loss before and after training; None: there is no evaluation data.
        accepted: with `draft_steps`, the mean number of drafts in the evaluation data up to the first wrong one.
        kl_before, kl_after: mean KL divergence from the teacher on the evaluation data, in nats per token; with `quantize`,
            that of the rounded weights. None: there is no teacher or no evaluation data.
        loss: mean training loss.
        steps: number of optimizer steps.
        tokens: number of input tokens.
        seconds: duration of this run.
        stopped_early: whether `patience` ended the run.
        curve: path of the plot of the loss.
    """

    output: str
    kind: str
    loads: bool
    eval_before: float | None
    eval_after: float | None
    accepted: float | None
    kl_before: float | None
    kl_after: float | None
    loss: float
    steps: int
    tokens: int
    seconds: float
    stopped_early: bool
    curve: str

    def to_dict(self) -> dict[str, Any]:
        """The summary as a dictionary, for JSON."""
        return asdict(self)


class TrainingJob:
    """A training run that is ready to start. Settings, tokenizer and data are validated without loading any weights.

    Args:
        config: the configuration.
        resume: resume from the newest intact checkpoint in `config.output`; start from the beginning if there is none.
            Processes that torchrun has restarted do so in any case.
        progress: called with the number of tokenized records and the number of all records.

    Raises:
        ConfigError: settings that contradict each other, the model or the contents of `output`, or an `output` that cannot be
            written to.
        CheckpointError: the model, or the run to resume, cannot be read.
        DataError: data that cannot be used.
        MissingPackageError: PEFT or matplotlib is needed and not installed.
    """

    def __init__(
        self, config: TrainConfig, *, resume: bool = False, progress: Callable[[int, int], None] | None = None
    ) -> None:
        self.config, self.output = config, Path(config.output)
        if config.lora is not None:
            lora.check_installed()
        self.args = self._arguments({})  # raises for contradictory settings before the data is read
        self.resumes = decide(
            self.output, resume, lambda wanted: (wanted and _can_resume(config, self.output)) or _new_run(self.output)
        )
        self.curve = LossCurve(self.output, self.resumes)
        if self.args.should_save:
            check_writable(self.output)
        if self.args.draft_steps and config.lora is not None:
            raise ConfigError("arguments.draft_steps trains a layer of its own, so it cannot be combined with lora")
        from_arguments(self.args)  # raises if FP8 hardware is required and missing
        self.source = resolve(config.model)
        with open_checkpoint(self.source) as checkpoint:
            fields = checkpoint.config()
            check_config(fields)
            self.frozen = _is_frozen(config, checkpoint, fields)
            self.tokenizer = load_tokenizer(checkpoint)
            self.context = int(fields["max_position_embeddings"])
            family = FAMILIES.get(fields["model_type"])
            self.packing = config.data.packing and (family is None or family.packs)
            if self.args.teacher not in (None, SELF):
                check_tokenizer(self.args.teacher, self.tokenizer)
            self._load_data(progress)
            counted = {} if self.packing else {"include_num_input_tokens_seen": "non_padding"}
            self.args = self._arguments({**intervals(config, steps_of(len(self.train_rows), self.args)), **counted})
            self.plan = self._plan(checkpoint)

    def _arguments(self, more: dict[str, Any]) -> DeepSeekTrainingArguments:
        given = {**defaults(self.config), **more, **self.config.arguments}
        return DeepSeekTrainingArguments(**given, output_dir=self.config.output)

    def _load_data(self, progress: Callable[[int, int], None] | None) -> None:
        data = self.config.data
        cache = None if self.config.cache is None else Path(self.config.cache)
        evaluation: TokenDataset | None = None

        def load(paths: Sequence[str]) -> tuple[TokenDataset, DataReport]:
            return load_data(list(paths), self.tokenizer, self.context, data.options, cache=cache, progress=progress)

        documents, self.report = load(data.train)
        if data.eval:
            evaluation, _ = load(data.eval)
        elif data.eval_fraction:
            documents, evaluation = documents.split(data.eval_fraction, int(self.args.data_seed or self.args.seed))
        longest = max(int(part.lengths.max()) for part in (documents, evaluation) if part is not None)
        self.row = data.max_length or row_for(longest, self.context)
        self.documents, self.evaluation = documents, evaluation
        self.train_rows = PackedRows(documents, self.row) if self.packing else documents
        self.eval_rows = evaluation if evaluation is None or not self.packing else PackedRows(evaluation, self.row)
        self.collator = Collator(self.tokenizer.pad_token_id or 0)
        self.longest = self.row if self.packing else longest

    def _plan(self, checkpoint: Checkpoint) -> TrainingPlan:
        config = self.config
        parameters = _unpacked_sketch(checkpoint).num_parameters()
        model: Any = self._sketch(checkpoint)
        adapter = None
        if config.lora is not None:
            self.targets = lora.targets_of(model, config.lora.targets)
            model = self._with_adapter(model)
            adapter = f"LoRA of rank {config.lora.r} on {', '.join(self.targets)}"
        if self.args.draft_steps:
            sketch_draft_layer(model, self.args.draft_vocabulary)
        tokens = min(self.longest, self.row) * self.args.train_batch_size
        dtype = DTYPES["bf16" if self.args.bf16 else "fp32"]
        rounded = 0 if self.args.quantize is None else RoundedWeights(model, self.args.quantize).count
        teacher = 0 if self.args.teacher is None else teacher_weights(self.args.teacher, parameters)
        prepared = prepare(model, activation_memory=self.args.activation_memory, fused_loss=self.args.fused_loss)
        memory = plan_memory(prepared, self.args, dtype, tokens, rounded, teacher * dtype.itemsize)
        steps = steps_of(len(self.train_rows), self.args)
        present = len(checkpoints(self.output)) if self.resumes else 0
        disk = plan_disk(self.output, self.args, memory, steps, present, adapter=config.lora is not None, merge=config.merge)
        rows, row = len(self.train_rows), self.row if self.packing else self.longest
        return TrainingPlan(
            model=config.model,
            family=str(model.config.model_type),
            weights=parameters,
            trained=sum(parameter.numel() for parameter in trainable(model)),
            adapter=adapter,
            records=self.report.records,
            sequences=len(self.documents),
            tokens=self.documents.tokens,
            trained_tokens=self.documents.trained_tokens,
            rows=rows,
            row=row,
            filled=self.documents.tokens / (rows * row),
            eval_sequences=0 if self.evaluation is None else len(self.evaluation),
            steps=steps,
            batch=self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size,
            memory=memory,
            free=free_memory().free,
            disk=disk,
            remarks=[
                *self.report.remarks(),
                *self._unpacked(),
                *self._quantization(),
                *self._omissions(checkpoint, model),
                *_crowded(),
            ],
        )

    def _unpacked(self) -> list[str]:
        """A remark if documents are not packed although the configuration says so."""
        if self.packing or not self.config.data.packing:
            return []
        return ["each document is a row of its own, since this family would join those of a packed row"]

    def _quantization(self) -> list[str]:
        """A remark on what is trained for a packed format."""
        format = self.args.quantize
        if format is None:
            return []
        start = " and start from calibrated ones" if self.args.calibrate and format in WEIGHED else ""
        return [f"the weights are rounded to {format} in each pass{start}; the result is packed"]

    def _omissions(self, checkpoint: Checkpoint, model: Any) -> list[str]:
        """Remarks on parts of the model that the result will not contain."""
        whole = self.config.lora is None or self.config.merge
        trained = self.args.mtp_loss_weight is not None or self.args.draft_steps
        if not whole or trained or not stored_mtp_layers(checkpoint, model.config):
            return []
        return [
            "the result has no MTP layers, since they are not trained"
            + ("" if self.config.lora else "; the argument mtp_loss_weight=0.3 trains and saves them")
        ]

    def _sketch(self, checkpoint: Checkpoint) -> Any:
        """The model on the meta device, without weights."""
        if self.frozen:
            return sketch(checkpoint, None, self._packed_fields())[0]
        return _unpacked_sketch(checkpoint)

    def _packed_fields(self) -> dict[str, Any]:
        return {} if self.config.precision is None else {"precision": self.config.precision}

    def _with_adapter(self, model: Any) -> Any:
        section = self.config.lora
        assert section is not None
        return lora.add_adapter(model, section.r, section.alpha, section.dropout, self.targets)

    def _load_model(self) -> Any:
        set_seed(self.args.seed)  # the weights of an adapter are initialized at random
        if self.frozen:
            from ..optimized_model import load_model

            model = load_model(self.source, vision="off", **self._packed_fields())
        else:
            dtype = DTYPES["bf16" if self.args.bf16 else "fp32"]
            model = load_for_training(self.source, dtype)
        return model if self.config.lora is None else self._with_adapter(model)

    def run(self, callbacks: Sequence[TrainerCallback] = ()) -> RunSummary:
        """Trains the model and saves the result.

        Args:
            callbacks: additional callbacks for Transformers' Trainer.

        Raises:
            NotEnoughMemoryError, TrainingError, SaveError: see `DeepSeekTrainer`.
            ConfigError: the disk has not enough free space.
            CheckpointError: another run is training into `output`, or weights of the model are missing.
        """
        self.plan.memory.check(0)
        if self.args.should_save:
            self.plan.disk.check()
        with locked(self.output) if self.args.should_save else contextlib.nullcontext():
            pass  # raises before the model loads if another run holds the lock; later, the trainer's `train` holds it
        model = self._load_model()
        base = model.get_base_model() if self.config.lora is not None else model
        use_cache, base.config.use_cache = base.config.use_cache, False  # with a cache, Transformers' masks join documents
        self.output.mkdir(parents=True, exist_ok=True)
        with atomic_file(self.output / SETTINGS) as file:
            file.write(self.config.model_dump_json(indent=1).encode())
        more: list[TrainerCallback] = [self.curve, _LastStep(), *callbacks]
        if self.config.patience is not None:
            more.append(EarlyStoppingCallback(self.config.patience))
        trainer = DeepSeekTrainer(
            model,
            self.args,
            data_collator=self.collator,
            train_dataset=self.train_rows,
            eval_dataset=self.eval_rows,
            processing_class=self.tokenizer,
            callbacks=more,
        )
        trainer.remove_callback(PrinterCallback)
        started = time.monotonic()
        if not self.resumes:
            trainer.fit_draft_layer()
            trainer.calibrate()
        before = self._first_evaluation(trainer)
        result = trainer.train(resume_from_checkpoint=self.resumes)
        after = self._last_evaluation(trainer)
        base.config.use_cache = use_cache
        kind = self._save(trainer, model)
        return RunSummary(
            output=str(self.output),
            kind=kind,
            loads=kind != "adapter",
            eval_before=before.get("eval_loss"),
            eval_after=after.get("eval_loss"),
            kl_before=before.get("eval_kl"),
            kl_after=after.get("eval_kl"),
            accepted=next((p["eval_accepted"] for p in reversed(self.curve.points) if "eval_accepted" in p), None),
            loss=float(result.training_loss),
            steps=int(trainer.state.global_step),
            tokens=int(trainer.state.num_input_tokens_seen),
            seconds=round(time.monotonic() - started, 3),
            stopped_early=self.config.patience is not None and trainer.state.global_step < trainer.state.max_steps,
            curve=str(self.output / PNG_NAME),
        )

    def _first_evaluation(self, trainer: DeepSeekTrainer) -> Mapping[str, float]:
        if self.eval_rows is None:
            return {}
        if self.resumes:
            return next((point for point in self.curve.points if "eval_loss" in point), {})
        return trainer.evaluate()

    def _last_evaluation(self, trainer: DeepSeekTrainer) -> Mapping[str, float]:
        if self.eval_rows is None:
            return {}
        best = trainer.state.best_metric
        if trainer.args.load_best_model_at_end and best is not None:  # the best model was loaded
            logs: list[Any] = trainer.state.log_history
            return next((log for log in logs if log.get("eval_loss") == best), {"eval_loss": float(best)})
        return trainer.evaluate()

    def _save(self, trainer: DeepSeekTrainer, model: Any) -> str:
        if self.config.lora is None or not self.config.merge:
            self._save_to(self.output, trainer)
            whole = "model" if self.args.quantize is None else "packed model"
            return whole if self.config.lora is None else "adapter"
        adapter = self.output / "adapter"
        self._save_to(adapter, trainer)
        trainer.accelerator.wait_for_everyone()
        trainer.model = lora.merged(model, str(self.source), str(adapter))
        self._save_to(self.output, trainer)
        return "merged model"

    def _save_to(self, directory: Path, trainer: DeepSeekTrainer) -> None:
        trainer.save_model(str(directory))
        (directory / "training_args.bin").unlink(missing_ok=True)  # a pickle; the settings are in `train.json`


def _crowded() -> list[str]:
    """A remark if DSO_THREADS requests more threads than there are processors."""
    threads = forced_threads()
    note = oversubscription(threads) if threads is not None and built() else None
    return [] if note is None else [note]


def _unpacked_sketch(checkpoint: Checkpoint) -> Any:
    fields = checkpoint.config()
    fields.pop("quantization_config", None)
    settings: Any = CONFIG_MAPPING[fields["model_type"]].from_dict(fields)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(settings)


class _LastStep(TrainerCallback):
    """Also evaluates and saves at the last step, whatever the intervals: it may be the best."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_evaluate = control.should_evaluate or args.eval_strategy != IntervalStrategy.NO
            control.should_save = control.should_save or args.save_strategy != IntervalStrategy.NO


def _new_run(output: Path) -> bool:
    """Checks that a new run may write to `output`; returns False, since nothing is resumed.

    Files left by a run that ended before its first checkpoint may be overwritten.
    """
    if output.is_dir() and not _other_files(output):
        return False
    if output.exists():
        what = "exists and is not empty" if output.is_dir() else "is a file"
        more = ", or continue the run with --resume" if checkpoints(output) else ""
        raise ConfigError(f"output: {output} {what}; choose another directory{more}")
    return False


def _other_files(output: Path) -> list[Path]:
    replaceable = (SETTINGS, JSON_NAME, PNG_NAME)
    return [path for path in output.iterdir() if not path.name.startswith(".") and path.name not in replaceable]


def _can_resume(config: TrainConfig, output: Path) -> bool:
    """Whether there is a checkpoint to resume from. Raises ConfigError if its run had other settings."""
    if not output.is_dir() or not checkpoints(output):
        return False
    with contextlib.suppress(OSError):  # a run of plain Trainer has no such file
        before = json.loads((output / SETTINGS).read_text(encoding="utf-8"))
        now = json.loads(config.model_dump_json())
        changed = [name for name in _FIXED if before.get(name) != now[name]]
        pairs = [(name, before.get("arguments", {}).get(name), now["arguments"].get(name)) for name in _FIXED_ARGUMENTS]
        changed += [f"arguments.{name}" for name, then, given in pairs if then != given]
        if changed:
            raise ConfigError(
                f"{', '.join(changed)}: differs from the run in {output}, which cannot be resumed with other settings; use "
                f"those in {output / SETTINGS}, or choose another output"
            )
    return True


def _is_frozen(config: TrainConfig, checkpoint: Checkpoint, fields: dict[str, Any]) -> bool:
    """Whether the model's own weights are packed, so that only an adapter can be trained. Raises ConfigError."""
    quantized = isinstance(checkpoint, (PackedCheckpoint, GgufCheckpoint)) or fields.get("quantization_config") is not None
    quantized = quantized or (isinstance(checkpoint, QuantizedCheckpoint) and checkpoint.method != "fp8")
    if quantized and config.arguments.get("draft_steps"):
        raise ConfigError(
            f"model: the weights of {config.model} are quantized; train the layer that drafts on the original model, then "
            "convert the result"
        )
    if quantized and config.lora is None:
        raise ConfigError(f"model: the weights of {config.model} are quantized; set lora to train an adapter")
    if quantized and config.merge:
        raise ConfigError(
            f"merge: an adapter cannot be merged into the quantized weights of {config.model}; name the original model and set "
            "precision"
        )
    return quantized or config.precision is not None
