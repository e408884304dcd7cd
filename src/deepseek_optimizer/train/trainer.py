"""`DeepSeekTrainer`: Transformers' Trainer with this package's modules, loss and optimizer.

The model is modified during training and evaluation only (`prepare.py`). Apart from that, the trainer overrides methods of
Trainer; if a later release of Transformers no longer calls one of them, steps become slower but stay correct.
"""

from __future__ import annotations

import contextlib
import copy
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import torch
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainerCallback

from ..errors import ConfigError, TrainingError
from ..integration.bind.runtime import OptimizerWarning
from ..quant import WEIGHED
from ..system.progress import show_progress
from ..system.threads import one_torch_thread
from . import group
from .accumulation import Accumulators, sum_in_fp32
from .arguments import DeepSeekTrainingArguments
from .balancing import ExpertBalancing
from .checkpoints.directory import checkpoints
from .checkpoints.saving import AtomicCheckpoints
from .checkpoints.state import read_state, write_state
from .data.packing import pack_for_trainer
from .fp8.backend import Fp8Products, from_arguments
from .fsdp import reduce_in_fp32, shard_exact_weights, shard_on_cpus
from .modules.distillation import Distillation
from .modules.draft_fit import fit_draft_layer
from .modules.draft_layer import add_draft_layer
from .modules.draft_loss import DraftObjective
from .modules.mtp import add_trained_layers
from .modules.mtp_loss import MtpObjective
from .modules.stored_states import StoredStates
from .non_finite import NonFiniteSteps
from .ops.memory import memory
from .ops.native import built
from .optimizer import DeepSeekAdamW
from .precision import DTYPES, set_training_dtype, weights_in
from .prepare import Prepared, prepare, trainable
from .quantization import RoundedWeights, calibration_texts
from .report import MemoryPlan, TrainingReport, batch_tokens, plan_memory
from .teacher import check_heads, make_teacher

ROUNDING: Final = "rounding.safetensors"  # of a checkpoint: `RoundedWeights.state`


class DeepSeekTrainer(AtomicCheckpoints):
    """A drop-in replacement for `transformers.Trainer`, with its callbacks, evaluation, logging, adapters and hub upload.

    Args:
        model, rest, options: as for Trainer.
        args: a `DeepSeekTrainingArguments`; None: the defaults.

    Attributes:
        mtp: the loss of the MTP layers if they are trained, else None; its `weight` may be changed during training. With
            `draft_steps`, the loss of drafts.
        balancing: the load balancing of experts; its `rate` may be changed during training.
        distillation: the loss of a distillation if there is a teacher, else None.

    Raises:
        ConfigError: on construction, a field of `args` does not fit the model or the other arguments.
        BackendError: on construction, if `fp8_backend="hardware"` is not available.
        NotEnoughMemoryError: from `train`, before allocating, if weights, optimizer and a batch do not fit into memory.
        TrainingError: from `train`, if a loss or gradient is not finite (see `on_nan`).
        CheckpointError, SaveError: see `AtomicCheckpoints`.
    """

    model: Any
    args: DeepSeekTrainingArguments

    def __init__(self, model: Any = None, args: Any = None, *rest: Any, **options: Any) -> None:
        args = DeepSeekTrainingArguments(output_dir="tmp_trainer") if args is None else args
        if not isinstance(args, DeepSeekTrainingArguments):
            raise ConfigError(
                f"args must be DeepSeekTrainingArguments, got {type(args).__name__}; it accepts all fields of TrainingArguments"
            )
        self._prepared: Prepared | None = None
        self._accumulators: Accumulators | None = None
        self._hooked: Any = None  # the wrapped model that averages gradients in fp32
        self._grad_norm = torch.zeros((), dtype=torch.float32, device="cpu")
        self._non_finite = NonFiniteSteps(args.on_nan, self._error)
        self._warned: set[str] = set()
        self._fp8: Fp8Products | None = from_arguments(args)
        super().__init__(model, args, *rest, **options)
        self.mtp: MtpObjective | DraftObjective | None = None
        self._mtp_notes: list[str] = []
        self._fits_draft_layer = False
        if args.mtp_loss_weight is not None:
            self._check_fused(f"mtp_loss_weight={args.mtp_loss_weight}")
            self.mtp, self._mtp_notes = MtpObjective(args.mtp_loss_weight), add_trained_layers(self.model)
        if args.draft_steps:
            self._check_fused(f"draft_steps={args.draft_steps}")
            self._mtp_notes, self._fits_draft_layer = add_draft_layer(self.model, args.draft_vocabulary, self.train_dataset)
            self.mtp = DraftObjective(args.draft_steps, self._stored_states())
        if args.packing:
            pack_for_trainer(self)
        self.rounded = self._rounded_weights()
        self._calibrates = self.rounded is not None and args.calibrate and args.quantize in WEIGHED
        self.distillation = self._distillation()
        self.balancing = ExpertBalancing(args.moe_balance_rate, args.moe_sequence_loss_weight)
        self._logged_steps = 0
        self.add_callback(_AroundStep(self))
        if args.moe_balance_rate or args.moe_sequence_loss_weight:
            self.add_callback(self.balancing)

    def create_accelerator_and_postprocess(self) -> None:
        """Like Trainer's, but `fsdp` also works on CPUs, and its gradients are averaged in fp32."""
        super().create_accelerator_and_postprocess()
        shard_on_cpus(self)
        reduce_in_fp32(self)

    # ---- preparing and restoring the model ----

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Like Trainer's. Afterwards the model has its original classes again, and the dtype of training."""
        if not (args[0] if args else kwargs.get("resume_from_checkpoint")):
            self.fit_draft_layer()
            self.calibrate()
        try:
            with self._threads():
                return super().train(*args, **kwargs)
        finally:
            self._restore()

    def fit_draft_layer(self) -> None:
        """With `draft_steps`, sets the weights of a layer that is new, from the training data; `train` does so too. See
        `modules.draft_fit`."""
        if self._fits_draft_layer:
            self._fits_draft_layer = False
            if fit_draft_layer(self.model, self.get_train_dataloader()):
                self._mtp_notes = ["MTP layer 0: starts as a copy of the last layer, fitted to its inputs"]

    def calibrate(self) -> None:
        """With `quantize`, sets the weights to those of error-compensated rounding on the training data; `train` does so
        too. See `RoundedWeights.calibrate`."""
        if self._calibrates and self.rounded is not None:
            self._calibrates = False
            texts = calibration_texts(self.train_dataset, self.model.config)
            with show_progress("Calibrating on the training data") as progress:
                outcome = self.rounded.calibrate(self.model, texts, progress)
            if outcome.starved:
                self._warn_once(
                    f"{outcome.starved} of {outcome.compensated + outcome.starved} matrices got too few tokens of the training "
                    "data to be rounded with error compensation"
                )

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Like Trainer's; called by `evaluate` and `predict`."""
        if self._prepared is not None:
            return self._evaluated(*args, **kwargs)
        self._prepared = self._prepare()
        try:
            with self._threads():
                return self._evaluated(*args, **kwargs)
        finally:
            self._restore()

    def _evaluated(self, *args: Any, **kwargs: Any) -> Any:
        result: Any = super().evaluation_loop(*args, **kwargs)
        if self.distillation is not None and (mean := self.distillation.mean()) is not None:
            result.metrics[f"{kwargs.get('metric_key_prefix', 'eval')}_kl"] = mean
        return result

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Like Trainer's. Also prepares the model, which is final at this point but not yet wrapped."""
        if self._prepared is None and self.optimizer is None:
            self._prepared = self._prepare()
            dtype = self._dtype()
            if dtype is not None:
                self._memory(self._prepared, dtype).check(_bytes_of(self.model) + self._teacher_bytes())
                set_training_dtype(self.model, dtype)
                shard_exact_weights(self)
        elif self._prepared is None:
            self._prepared = self._prepare()  # the caller's optimizer holds the parameters, so their dtype stays
        return super().create_optimizer(model)

    def _sum_in_fp32(self) -> None:
        """Before the first step, when weights are sharded if they are to be: sums their gradients in fp32 from now on."""
        weights = trainable(self.model)
        if self._own is None or all(weight.dtype == torch.float32 for weight in weights):
            return
        if self.args.gradient_accumulation_steps > 1:
            self._accumulators = self._accumulators or Accumulators(weights)
        elif isinstance(self.model_wrapped, DistributedDataParallel) and self._hooked is not self.model_wrapped:
            self._hooked = self.model_wrapped
            self.model_wrapped.register_comm_hook(None, sum_in_fp32)

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: Any, model: Any = None) -> tuple[Any, Any]:
        """Like Trainer's, but also supports "adamw_deepseek"."""
        if not getattr(args, "own_optimizer", False):
            return Trainer.get_optimizer_cls_and_kwargs(args, model)
        return DeepSeekAdamW, {
            "lr": args.learning_rate, "betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon,
            "state": args.optimizer_state, "master_weights": args.master_weights, "max_norm": args.max_grad_norm or None,
            "free_gradients": True, "dither": True, "seed": args.seed,
        }  # fmt: skip

    def report(self) -> TrainingReport:
        """Returns a report of what runs natively and what does not, and of the memory that training needs.

        May be called before `train`.
        """
        prepared = self._prepared or self._prepare()
        try:
            return self._report(prepared)
        finally:
            if prepared is not self._prepared:
                prepared.undo()

    def _report(self, prepared: Prepared) -> TrainingReport:
        model, args = prepared.model, self.args
        dtype = self._dtype() or model.dtype
        return TrainingReport(
            native=prepared.native,
            others=prepared.others,
            attention=prepared.attention,
            optimizer=str(getattr(args.optim, "value", args.optim)),
            trained=sum(p.numel() for p in trainable(model)),
            weights=model.num_parameters(),
            fused_loss=prepared.fused_loss and self._why_unfused() is None,
            memory=self._memory(prepared, dtype),
            notes=[*prepared.notes, *self._mtp_notes, *filter(None, [self._why_unfused()])],
        )

    def _prepare(self) -> Prepared:
        args = self.args
        prepared = prepare(
            self.model,
            activation_memory=args.activation_memory,
            fused_loss=args.fused_loss,
            mtp=self.mtp,
            fp8=self._fp8,
            distillation=self.distillation,
        )
        if self.distillation is not None:
            check_heads(prepared, f"teacher={args.teacher!r}")
        if self._fp8 is not None:
            prepared.notes.append(self._fp8.note)
            if not self._fp8.on_hardware:
                self._warn_once(self._fp8.note)
        if (reason := self._why_unfused()) is not None:
            self._warn_once(reason)
        return prepared

    def _rounded_weights(self) -> RoundedWeights | None:
        if self.args.quantize is None:
            return None
        if hasattr(self.model, "peft_config"):
            raise ConfigError(f"quantize={self.args.quantize!r} trains all weights, but the model has an adapter; leave the "
                              "adapter out, or train it on a model loaded with precision")  # fmt: skip
        return RoundedWeights(self.model, self.args.quantize)

    def _distillation(self) -> Distillation | None:
        """The loss of the teacher, which is copied now: later, a checkpoint may be loaded into the model."""
        if self.args.teacher is None:
            return None
        for name in ("compute_loss_func", "compute_metrics"):
            if getattr(self, name) is not None:
                raise ConfigError(f"teacher={self.args.teacher!r} cannot be combined with {name}, which needs the logits; "
                                  f"leave {name} out")  # fmt: skip
        teacher = make_teacher(self.args.teacher, self.model, self._dtype() or self.model.dtype)
        self.model_accepts_loss_kwargs = False  # the loss is the mean over a batch's tokens, not over labels
        return Distillation(teacher, self.args.teacher_weight, getattr(self.data_collator, "pad_token_id", None))

    def _stored_states(self) -> StoredStates | None:
        """The file for the hidden states of a frozen model, if there may be several epochs. None with FSDP, under which all
        processes must run the model together."""
        if self.args.fsdp or (self.args.max_steps <= 0 and self.args.num_train_epochs <= 1):
            return None
        folder = Path(str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        return StoredStates(folder)

    def _teacher_bytes(self) -> int:
        return 0 if self.distillation is None else _bytes_of(self.distillation.teacher)

    def _memory(self, prepared: Prepared, dtype: torch.dtype) -> MemoryPlan:
        rounded = 0 if self.rounded is None else self.rounded.count
        return plan_memory(
            prepared,
            self.args,
            dtype,
            batch_tokens(self.train_dataset, self.args.train_batch_size),
            rounded,
            self._teacher_bytes(),
        )

    def _use_original_weights(self) -> None:
        """For code that reads or writes the weights before rounding; the next pass rounds them again."""
        if self.rounded is not None:
            self.rounded.restore()

    def _restore(self) -> None:
        self._use_original_weights()
        if self._accumulators is not None:
            self._accumulators.remove()
        if self._prepared is not None:
            self._prepared.undo()
        self._accumulators = self._prepared = None
        memory().trim()

    def _dtype(self) -> torch.dtype | None:
        """The dtype in which weights are trained; None: as loaded, since Transformers' optimizers have no master weights."""
        if not self.args.own_optimizer or self.optimizer_cls_and_kwargs is not None:
            return None
        return DTYPES["bf16" if self.args.bf16 else "fp32"]

    @contextlib.contextmanager
    def _threads(self) -> Iterator[None]:
        with one_torch_thread() if built() and self.args.device.type == "cpu" else contextlib.nullcontext():
            yield

    # ---- a step ----

    def training_step(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        """Like Trainer's, but sums of gradients over several passes are in fp32."""
        with contextlib.nullcontext() if self._accumulators is None else self._accumulators.around_pass(model):
            return super().training_step(model, *args, **kwargs)

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Like Trainer's; saves activations for the backward pass according to `activation_memory`."""
        prepared = self._prepared
        self._check_length(inputs)
        if self.rounded is not None:
            self.rounded.round()
        with prepared.saved if prepared is not None and torch.is_grad_enabled() else contextlib.nullcontext():
            result = super().compute_loss(model, inputs, *args, **kwargs)
        if self.model.training:
            self._non_finite.check_loss(result[0] if isinstance(result, tuple) else result)
        return result

    def _check_length(self, inputs: Any) -> None:
        """Warns if a sequence is longer than the model's context. Packed rows have position_ids, which restart."""
        ids, limit = inputs.get("input_ids"), getattr(self.model.config, "max_position_embeddings", None)
        if ids is not None and limit is not None and ids.shape[-1] > limit and inputs.get("position_ids") is None:
            self._warn_once(
                f"a sequence of {ids.shape[-1]:,} tokens is longer than the model's context of {limit:,} tokens "
                "(max_position_embeddings); truncate it, or extend the context first"
            )

    def prediction_step(self, model: Any, inputs: Any, prediction_loss_only: bool, *args: Any, **kwargs: Any) -> Any:
        """Like Trainer's, but does not compute logits if only the loss is requested."""
        if prediction_loss_only and self._prepared is not None and self._prepared.fused_loss:
            inputs = {**inputs, "skip_logits": True}
        return super().prediction_step(model, inputs, prediction_loss_only, *args, **kwargs)

    def _check_fused(self, setting: str) -> None:
        """Raises ConfigError, which names the setting that needs it, if the loss is not fused."""
        if self._why_unfused() is not None or not self.args.fused_loss:
            raise ConfigError(
                f"{setting} needs the fused loss: leave fused_loss=True, label_smoothing_factor=0 and compute_loss_func=None"
            )

    def _why_unfused(self) -> str | None:
        """Why the loss is not fused although `fused_loss` is set; None: it is fused, or need not be."""
        if not self.args.fused_loss:
            return None
        if self.compute_loss_func is not None:
            return "compute_loss_func needs the logits, so the loss is not fused with the head"
        if self.args.label_smoothing_factor:
            return "label_smoothing_factor needs the logits, so the loss is not fused with the head"
        return None

    def clip_gradients(self, model: Any) -> Any:
        """The optimizer clips the gradients itself; `_after_optimizer_step` fills the returned tensor with the norm."""
        if self._own is None:
            return super().clip_gradients(model)
        self._grad_norm = torch.zeros((), dtype=torch.float32, device="cpu")
        return self._grad_norm

    def gradient_norm(self, model: Any, grad_norm: Any = None) -> Any:
        if self._accumulators is not None:
            self._accumulators.reduce()
        if self._own is None:
            grad_norm = super().gradient_norm(model, grad_norm=grad_norm)
            self._non_finite.check_norm(grad_norm)
        elif grad_norm is None:  # max_grad_norm is 0
            grad_norm = self.clip_gradients(model)
        self._non_finite.bad = group.total(self._non_finite.bad)[0] > 0  # a loss is that of a process, the step is everyone's
        if self._non_finite.bad:
            self._drop_gradients(model)
        return grad_norm

    def _drop_gradients(self, model: Any) -> None:
        model.zero_grad(set_to_none=True)
        if self._accumulators is not None:
            self._accumulators.drop()

    def _after_optimizer_step(self) -> None:
        """Evaluates the optimizer's step: records the gradient norm, and decides whether training continues."""
        own, bad = self._own, self._non_finite.bad
        if own is not None:
            self._grad_norm.fill_(math.nan if bad else own.grad_norm)
        if self._accumulators is not None and bad:
            self._accumulators.attach()
        if self._accumulators is not None and own is not None and not own.free_gradients:
            own.zero_grad()  # Trainer clears only `grad`
        refused = own is not None and own.skipped
        self._logged_steps += 1
        if bad or refused:
            self.balancing.drop()
        self._non_finite.after_step(refused)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Like Trainer's; also logs the number of skipped steps if there are any, the loss of MTP layers, and the load of
        experts."""
        if "loss" in logs:
            logs |= {"skipped_steps": self._non_finite.skipped} if self._non_finite.skipped else {}
            steps, self._logged_steps = self._logged_steps, 0
            if self.mtp is not None and (mean := self.mtp.mean(steps)) is not None:
                shares = 1 if self.args.average_tokens_across_devices else self.args.world_size
                logs["mtp_loss"] = round(group.total(mean)[0] / shares, 4)
            logs |= self.balancing.statistics()
        if "eval_loss" in logs and isinstance(self.mtp, DraftObjective) and (accepted := self.mtp.accepted()) is not None:
            logs["eval_accepted"] = round(accepted, 4)
        super().log(logs, *args, **kwargs)

    @property
    def _own(self) -> DeepSeekAdamW | None:
        """The optimizer without accelerate's wrapper, if it is `DeepSeekAdamW`; else None."""
        inner = getattr(self.optimizer, "optimizer", self.optimizer)
        return inner if isinstance(inner, DeepSeekAdamW) else None

    def _error(self, cause: str) -> TrainingError:
        return TrainingError(
            self.state.global_step + 1, cause, next(reversed(checkpoints(Path(str(self.args.output_dir)))), None)
        )

    def _warn_once(self, note: str) -> None:
        """Issues each warning once per trainer."""
        if note not in self._warned:
            self._warned.add(note)
            warnings.warn(note, OptimizerWarning, stacklevel=3)

    # ---- saving ----

    def save_weights(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Like Trainer's, but saves in `save_dtype`, or packed with `quantize`. Checkpoints keep the dtype of training, and the
        weights before rounding."""
        self._use_original_weights()
        if self.rounded is not None and self._temporary is not None and self.args.should_save:
            directory = Path(str(output_dir))
            directory.mkdir(parents=True, exist_ok=True)
            write_state(directory / ROUNDING, self.rounded.state())
        if self.rounded is not None and self._temporary is None:
            directory = Path(output_dir or str(self.args.output_dir))
            directory.mkdir(parents=True, exist_ok=True)
            self.rounded.write(self.model, directory)
            if self.processing_class is not None:
                self.processing_class.save_pretrained(directory)
            return
        if self.args.save_dtype is None or state_dict is not None or self._temporary is not None:
            return super().save_weights(output_dir, state_dict)
        dtype = DTYPES[self.args.save_dtype]
        super().save_weights(output_dir, weights_in(self.accelerator.unwrap_model(self.model), dtype, self._own))
        if self.args.should_save and not hasattr(self.model, "peft_config"):  # update the dtype in the config
            config = copy.deepcopy(self.model.config)
            config.dtype = dtype
            config.save_pretrained(output_dir or self.args.output_dir)

    def load_weights(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self._use_original_weights()
        if self.rounded is not None and (file := Path(resume_from_checkpoint) / ROUNDING).is_file():
            self.rounded.load_state(read_state(file))
        super().load_weights(resume_from_checkpoint, model)

    def load_best_weights(self) -> None:
        self._use_original_weights()
        super().load_best_weights()


class _AroundStep(TrainerCallback):
    """Calls the trainer at the begin, and before and after each optimizer step."""

    def __init__(self, trainer: DeepSeekTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._trainer._sum_in_fp32()

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self._trainer._use_original_weights()

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self._trainer._after_optimizer_step()


def _bytes_of(model: torch.nn.Module) -> int:
    return sum(p.nbytes for p in {id(p): p for p in model.parameters()}.values())
