"""`DeepSeekTrainer`: Transformers' Trainer, whose steps are done by this package's modules, loss and optimizer.

It changes a model for the time of training or evaluation only (`prepare.py`), and goes through methods that Trainer has for it.
Where a later release of Transformers no longer calls one of them, steps get slower and stay right.
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
from transformers import Trainer, TrainerCallback

from ..errors import ConfigError, TrainingError
from ..integration.bind.runtime import OptimizerWarning
from ..system.threads import one_torch_thread
from .accumulation import Accumulators
from .arguments import DeepSeekTrainingArguments
from .balancing import ExpertBalancing
from .checkpoints.directory import checkpoints
from .checkpoints.saving import AtomicCheckpoints
from .data.packing import pack_for_trainer
from .fp8.backend import Fp8Products, of_arguments
from .modules.mtp import add_trained_layers
from .modules.mtp_loss import MtpObjective
from .non_finite import NonFiniteSteps
from .ops.memory import memory
from .ops.native import built
from .optimizer import DeepSeekAdamW
from .precision import DTYPES, set_training_dtype, weights_in
from .prepare import Prepared, prepare, trainable
from .processes import shard_on_cpus
from .report import TrainingReport, plan_memory

_LOOKED_AT: Final = 64  # examples whose lengths memory is planned by


class DeepSeekTrainer(AtomicCheckpoints):
    """Trains as `transformers.Trainer`, with its arguments, callbacks, evaluation, logging, adapters and hub.

    Args:
        model, args, ...: as Trainer's; `args` are `DeepSeekTrainingArguments`.

    Attributes:
        mtp: the loss of MTP layers where they are trained; its `weight` may change as training goes on. Else None.
        balancing: what moves the biases of experts; its `rate` may change as training goes on.

    Raises, from `train`:
        BackendError: `fp8_backend="hardware"` where there is none; when it is made.
        NotEnoughMemoryError: the weights, the optimizer and a batch would not fit; before any of it is made.
        TrainingError: a loss or a gradient is not finite (`on_nan`).
        CheckpointError, SaveError: see `AtomicCheckpoints`.
    """

    model: Any
    args: DeepSeekTrainingArguments

    def __init__(self, model: Any = None, args: Any = None, *rest: Any, **options: Any) -> None:
        args = DeepSeekTrainingArguments(output_dir="tmp_trainer") if args is None else args
        if not isinstance(args, DeepSeekTrainingArguments):
            raise ConfigError(
                f"args must be DeepSeekTrainingArguments, got {type(args).__name__}; they take the same fields, and those of "
                "this trainer"
            )
        self._prepared: Prepared | None = None
        self._accumulators: Accumulators | None = None
        self._grad_norm = torch.zeros((), dtype=torch.float32, device="cpu")
        self._non_finite = NonFiniteSteps(args.on_nan, self._error)
        self._said: set[str] = set()
        self._fp8: Fp8Products | None = of_arguments(args)
        super().__init__(model, args, *rest, **options)
        self.mtp: MtpObjective | None = None
        self._mtp_notes: list[str] = []
        if args.mtp_loss_weight is not None:
            if self._unfused() is not None or not args.fused_loss:
                raise ConfigError(f"mtp_loss_weight={args.mtp_loss_weight} needs the fused loss: leave fused_loss=True, "
                                  "label_smoothing_factor=0 and compute_loss_func=None, or mtp_loss_weight=None")  # fmt: skip
            self.mtp, self._mtp_notes = MtpObjective(args.mtp_loss_weight), add_trained_layers(self.model)
        if args.packing:
            pack_for_trainer(self)
        self.balancing = ExpertBalancing(args.moe_balance_rate, args.moe_sequence_loss_weight)
        self._logged_steps = 0
        self.add_callback(_AfterStep(self))
        if args.moe_balance_rate or args.moe_sequence_loss_weight:
            self.add_callback(self.balancing)

    def create_accelerator_and_postprocess(self) -> None:
        """As Trainer's; `fsdp` shards on CPUs too."""
        super().create_accelerator_and_postprocess()
        shard_on_cpus(self)

    # ---- the model, prepared and given back ----

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's. The model is Transformers' own again afterwards, in the dtype that it was trained in."""
        try:
            with self._threads():
                return super().train(*args, **kwargs)
        finally:
            self._give_back()

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's, which `evaluate` and `predict` go through."""
        if self._prepared is not None:
            return super().evaluation_loop(*args, **kwargs)
        self._prepared = self._prepare()
        try:
            with self._threads():
                return super().evaluation_loop(*args, **kwargs)
        finally:
            self._give_back()

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """As Trainer's. The model is made ready here: it is the one that will be trained, and nothing has wrapped it yet."""
        if self._prepared is None and self.optimizer is None:
            self._prepared = self._prepare()
            dtype = self._dtype()
            if dtype is not None:
                plan_memory(self._prepared, self.args, dtype, self._batch_tokens()).check(_bytes_of(self.model))
                set_training_dtype(self.model, dtype)
        elif self._prepared is None:
            self._prepared = self._prepare()  # the optimizer is the caller's, and has the parameters as they are
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        if self._accumulators is None and self.args.gradient_accumulation_steps > 1 and self._own is not None:
            if self.args.world_size > 1:
                self._say("gradients of several processes are accumulated in the weights' dtype, not in fp32")
            else:
                self._accumulators = Accumulators(trainable(self.model))
        return optimizer

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: Any, model: Any = None) -> tuple[Any, Any]:
        """As Trainer's; knows "adamw_deepseek" too."""
        if not getattr(args, "own_optimizer", False):
            return Trainer.get_optimizer_cls_and_kwargs(args, model)
        return DeepSeekAdamW, {
            "lr": args.learning_rate, "betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon,
            "state": args.optimizer_state, "master_weights": args.master_weights, "max_norm": args.max_grad_norm or None,
            "free_gradients": True, "dither": True, "seed": args.seed,
        }  # fmt: skip

    def report(self) -> TrainingReport:
        """What runs natively, what does not, and the memory that training takes. May be asked for before `train`."""
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
            native=prepared.ours,
            others=prepared.theirs,
            attention=prepared.attention,
            optimizer=str(getattr(args.optim, "value", args.optim)),
            trained=sum(p.numel() for p in trainable(model)),
            weights=model.num_parameters(),
            fused_loss=prepared.fused_loss and self._unfused() is None,
            memory=plan_memory(prepared, args, dtype, self._batch_tokens()),
            notes=[*prepared.notes, *self._mtp_notes, *filter(None, [self._unfused()])],
        )

    def _prepare(self) -> Prepared:
        args = self.args
        prepared = prepare(
            self.model, activation_memory=args.activation_memory, fused_loss=args.fused_loss, mtp=self.mtp, fp8=self._fp8
        )
        if self._fp8 is not None:
            prepared.notes.append(self._fp8.note)
            if not self._fp8.on_hardware:
                self._say(self._fp8.note)
        if (reason := self._unfused()) is not None:
            self._say(reason)
        return prepared

    def _give_back(self) -> None:
        if self._accumulators is not None:
            self._accumulators.remove()
        if self._prepared is not None:
            self._prepared.undo()
        self._accumulators = self._prepared = None
        memory().trim()

    def _dtype(self) -> torch.dtype | None:
        """What weights are trained in; None: as they were loaded, for Transformers' optimizers have no masters."""
        if not self.args.own_optimizer or self.optimizer_cls_and_kwargs is not None:
            return None
        return DTYPES["bf16" if self.args.bf16 else "fp32"]

    @contextlib.contextmanager
    def _threads(self) -> Iterator[None]:
        with one_torch_thread() if built() and self.args.device.type == "cpu" else contextlib.nullcontext():
            yield

    def _batch_tokens(self) -> int | None:
        """Tokens of a batch at the lengths of some examples; None where that cannot be seen without reading a stream."""
        try:
            data: Any = self.train_dataset
            count = len(data)
            lengths = [len(data[i]["input_ids"]) for i in range(0, count, max(1, count // _LOOKED_AT))]
        except (TypeError, KeyError, IndexError):
            return None
        return max(lengths, default=0) * self.args.train_batch_size or None

    # ---- a step ----

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's; what the forward keeps for the backward is as `activation_memory` says."""
        prepared = self._prepared
        self._see_length(inputs)
        with prepared.kept if prepared is not None and torch.is_grad_enabled() else contextlib.nullcontext():
            result = super().compute_loss(model, inputs, *args, **kwargs)
        if self.model.training:
            self._non_finite.see_loss(result[0] if isinstance(result, tuple) else result)
        return result

    def _see_length(self, inputs: Any) -> None:
        """Says where a sequence has positions that the model was not made for; several in a row bring their own."""
        ids, limit = inputs.get("input_ids"), getattr(self.model.config, "max_position_embeddings", None)
        if ids is not None and limit is not None and ids.shape[-1] > limit and inputs.get("position_ids") is None:
            self._say(
                f"a sequence of {ids.shape[-1]:,} tokens is longer than the {limit:,} that the model has positions for "
                "(max_position_embeddings); cut it, or extend the model's context first"
            )

    def prediction_step(self, model: Any, inputs: Any, prediction_loss_only: bool, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's; without logits where only the loss is asked for."""
        if prediction_loss_only and self._prepared is not None and self._prepared.fused_loss:
            inputs = {**inputs, "skip_logits": True}
        return super().prediction_step(model, inputs, prediction_loss_only, *args, **kwargs)

    def _unfused(self) -> str | None:
        """Why losses are made of whole logits although they need not be."""
        if not self.args.fused_loss:
            return None
        if self.compute_loss_func is not None:
            return "compute_loss_func takes logits, so they stand in memory as a whole"
        if self.args.label_smoothing_factor:
            return "label_smoothing_factor is made of logits, so they stand in memory as a whole"
        return None

    def clip_gradients(self, model: Any) -> Any:
        """The optimizer clips in its own pass; the norm is a tensor that `_stepped` fills in before Trainer logs it."""
        if self._own is None:
            return super().clip_gradients(model)
        self._grad_norm = torch.zeros((), dtype=torch.float32, device="cpu")
        return self._grad_norm

    def gradient_norm(self, model: Any, grad_norm: Any = None) -> Any:
        if self._own is None:
            grad_norm = super().gradient_norm(model, grad_norm=grad_norm)
            self._non_finite.see_norm(grad_norm)
        elif grad_norm is None:  # max_grad_norm is 0
            grad_norm = self.clip_gradients(model)
        if self._non_finite.bad:
            self._drop_gradients(model)
        return grad_norm

    def _drop_gradients(self, model: Any) -> None:
        model.zero_grad(set_to_none=True)
        if self._accumulators is not None:
            self._accumulators.drop()

    def _stepped(self) -> None:
        """After the optimizer's step: what it found, and whether training may go on."""
        own, bad = self._own, self._non_finite.bad
        if own is not None:
            self._grad_norm.fill_(math.nan if bad else own.grad_norm)
        if self._accumulators is not None and bad:
            self._accumulators.give()
        if self._accumulators is not None and own is not None and not own.free_gradients:
            own.zero_grad()  # Trainer lets go of `grad` alone
        refused = own is not None and own.skipped
        self._logged_steps += 1
        if bad or refused:
            self.balancing.drop()
        self._non_finite.after_step(refused)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As Trainer's, with the number of steps left out so far if there are any, the loss of MTP layers, and how busy experts
        are."""
        if "loss" in logs:
            logs |= {"skipped_steps": self._non_finite.skipped} if self._non_finite.skipped else {}
            steps, self._logged_steps = self._logged_steps, 0
            if self.mtp is not None and (mean := self.mtp.mean(steps)) is not None:
                logs["mtp_loss"] = round(mean, 4)
            logs |= self.balancing.statistics()
        super().log(logs, *args, **kwargs)

    @property
    def _own(self) -> DeepSeekAdamW | None:
        """The optimizer if it is ours, without accelerate's wrapper."""
        inner = getattr(self.optimizer, "optimizer", self.optimizer)
        return inner if isinstance(inner, DeepSeekAdamW) else None

    def _error(self, cause: str) -> TrainingError:
        return TrainingError(
            self.state.global_step + 1, cause, next(reversed(checkpoints(Path(str(self.args.output_dir)))), None)
        )

    def _say(self, note: str) -> None:
        """Warns once."""
        if note not in self._said:
            self._said.add(note)
            warnings.warn(note, OptimizerWarning, stacklevel=3)

    # ---- saving ----

    def save_weights(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """As Trainer's, in `save_dtype`. Checkpoints, which come here too, stay in the dtype of training."""
        if self.args.save_dtype is None or state_dict is not None or self._unnamed is not None:
            return super().save_weights(output_dir, state_dict)
        dtype = DTYPES[self.args.save_dtype]
        super().save_weights(output_dir, weights_in(self.accelerator.unwrap_model(self.model), dtype, self._own))
        if self.args.should_save and not hasattr(self.model, "peft_config"):  # the config names the model's own dtype
            config = copy.deepcopy(self.model.config)
            config.dtype = dtype
            config.save_pretrained(output_dir or self.args.output_dir)


class _AfterStep(TrainerCallback):
    """Tells a trainer that its optimizer has stepped."""

    def __init__(self, trainer: DeepSeekTrainer) -> None:
        self._trainer = trainer

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self._trainer._stepped()


def _bytes_of(model: torch.nn.Module) -> int:
    return sum(p.nbytes for p in {id(p): p for p in model.parameters()}.values())
