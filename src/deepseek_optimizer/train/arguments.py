"""`DeepSeekTrainingArguments`: Transformers' `TrainingArguments` and the fields of this package's trainer."""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass, field
from typing import Any, Final, Literal, get_args

from transformers import TrainingArguments as PlainArguments

from ..errors import ConfigError
from ..integration.training.trainer import optimizer_names
from . import process_group
from .quantization import check_format

ADAMW_DEEPSEEK: Final = "adamw_deepseek"

ActivationMemory = Literal["full", "selective", "recompute"]
OptimizerState = Literal["bf16", "int8", "fp32"]
MasterWeights = Literal["split", "stochastic"]
OnNan = Literal["stop", "skip"]
Fp8Backend = Literal["auto", "hardware", "emulate"]
SaveDtype = Literal["bf16", "fp32"]

_CHOICES: Final[dict[str, Any]] = {
    "activation_memory": ActivationMemory, "optimizer_state": OptimizerState, "master_weights": MasterWeights,
    "on_nan": OnNan, "fp8_backend": Fp8Backend,
}  # fmt: skip
MAX_DRAFTS: Final = 16  # in a row
_FLAGS: Final = ("bf16", "fp8_enabled", "fp8_e4m3", "packing", "fused_loss", "calibrate")
_NUMBERS: Final = ("learning_rate", "num_train_epochs", "weight_decay", "moe_balance_rate", "moe_sequence_loss_weight")


@dataclass(repr=False)
class DeepSeekTrainingArguments(PlainArguments):
    """`transformers.TrainingArguments` with these fields added, or with a different default.

    Args:
        optim: "adamw_deepseek" (`train.optimizer.DeepSeekAdamW`) or any optimizer name of Transformers. `bf16`,
            `optimizer_state` and `master_weights` apply to "adamw_deepseek" only; with another optimizer the weights keep the
            dtype in which they were loaded.
        bf16: weights, gradients and matrix products in bf16, with fp32 master weights in the optimizer; not autocast.
            False: everything in fp32.
        optimizer_state: format of Adam's two moments: "bf16" (2 bytes per weight each), "int8" (1) or "fp32" (4).
        master_weights: "split" stores the low 16 bits of each fp32 weight (2 bytes per weight); "stochastic" stores nothing
            and rounds updates stochastically.
        activation_memory: activations saved for the backward pass. "full": all; "selective": all but those that are cheap to
            recompute (outputs of norms, gated products); "recompute": only the inputs of the decoder layers.
        fused_loss: compute the head, the loss and its gradient together, chunk by chunk, so that the full logits are never
            in memory. Has no effect where a custom loss function, label smoothing or metrics need the logits.
        packing: pack several documents into a row; they do not attend to each other.
        fp8_enabled: compute the products of linear layers in FP8 (DeepSeek-V3 report, section 3.3).
        fp8_e4m3: E4M3 for all operands; False: E5M2 for gradients.
        fp8_backend: "hardware": FP8 tensor cores; "emulate": the same numerics in software; "auto": hardware if it is
            available.
        on_nan: what to do if a loss or gradient is not finite. "stop": end training with an error that names the step and the
            last checkpoint; "skip": skip the step, and stop after several in a row.
        save_dtype: dtype of the saved weights: "bf16" or "fp32" (the master weights); None: the dtype of training.
        moe_balance_rate: amount by which each step lowers the bias of an overloaded expert and raises that of an underloaded
            one (auxiliary-loss-free balancing; DeepSeek-V3 report, section 2.1.2); 0: off.
        moe_sequence_loss_weight: weight (alpha) of the sequence-wise balance loss of DeepSeek-V3, which used 0.0001; 0: off.
        mtp_loss_weight: weight of the loss of the multi-token prediction layers (DeepSeek-V3 report, section 2.2); None: they
            are not trained.
        draft_steps: train nothing but a multi-token prediction layer, which is added where the model has none, to draft this
            number of tokens in a row for the model as it is (`dso draft`); 0: off.
        draft_vocabulary: with `draft_steps`, the number of tokens that the layer can draft, the most frequent ones of the
            training data: its head has rows for these only. 0, or at least the model's number: all tokens. None: 8,192 for a
            new layer of a model with four times as many.
        quantize: a weight format. The forward pass uses the weights as this format rounds them (quantization-aware training),
            and `save_model` writes a packed checkpoint; None: no rounding.
        calibrate: with `quantize`, start from weights that are rounded with error compensation on 8,192 tokens of the training
            data; False: from the weights as they are. It has no effect on formats that are not calibrated.
        teacher: a model whose next-token distributions are learned: "self", the model before training, which needs `quantize`;
            or the directory or name of another model with the same vocabulary. It takes the memory of its weights. None: the
            loss is the cross entropy of the labels.
        teacher_weight: weight w of the loss w * KL(teacher || model) + (1 - w) * cross entropy.

    Raises:
        ConfigError: a value is not allowed, or two fields contradict each other. Names the fields.
    """

    bf16: bool = field(default=True, metadata={"help": "Weights in bf16 with fp32 master weights; not autocast."})
    optim: str = field(default=ADAMW_DEEPSEEK, metadata={"help": "adamw_deepseek, or any optimizer of Transformers."})
    optimizer_state: OptimizerState = field(default="bf16", metadata={"help": "Format of Adam's moments."})
    master_weights: MasterWeights = field(default="split", metadata={"help": "How bf16 weights keep small updates."})
    activation_memory: ActivationMemory = field(default="selective", metadata={"help": "Activations saved for backward."})
    fused_loss: bool = field(default=True, metadata={"help": "Compute head and loss in chunks, without the full logits."})
    packing: bool = field(default=False, metadata={"help": "Pack several documents into a row."})
    fp8_enabled: bool = field(default=False, metadata={"help": "Linear layers in FP8 (DeepSeek-V3 report, 3.3)."})
    fp8_e4m3: bool = field(default=True, metadata={"help": "E4M3 for all operands; False: E5M2 for gradients."})
    fp8_backend: Fp8Backend = field(default="auto", metadata={"help": "FP8 on tensor cores, or emulated."})
    on_nan: OnNan = field(default="stop", metadata={"help": "What to do if a loss or gradient is not finite."})
    save_dtype: SaveDtype | None = field(default=None, metadata={"help": "Dtype of saved weights; None: as trained."})
    moe_balance_rate: float = field(default=0.001, metadata={"help": "Step of the expert-balancing biases; 0: off."})
    moe_sequence_loss_weight: float = field(default=0.0, metadata={"help": "Weight of the sequence-wise balance loss."})
    mtp_loss_weight: float | None = field(default=None, metadata={"help": "Weight of the multi-token prediction loss."})
    draft_steps: int = field(default=0, metadata={"help": "Train only a layer that drafts this number of tokens; 0: off."})
    draft_vocabulary: int | None = field(default=None, metadata={"help": "Number of tokens that can be drafted; 0: all."})
    quantize: str | None = field(default=None, metadata={"help": "Format that the weights are trained for; None: no rounding."})
    calibrate: bool = field(default=True, metadata={"help": "With quantize: start from error-compensated rounding."})
    teacher: str | None = field(default=None, metadata={"help": 'Model whose distributions are learned, or "self".'})
    teacher_weight: float = field(default=1.0, metadata={"help": "Weight of the divergence from the teacher, 0 to 1."})

    def __post_init__(self) -> None:
        self._check_values()
        self._check_agreement()
        process_group.create(self.ddp_backend, self.ddp_timeout, on_cpu=self.use_cpu)
        optim, bf16 = self.optim, self.bf16
        # Transformers rejects this optimizer name, takes bf16 for autocast, and rejects that on a CPU without use_cpu.
        self.optim, self.bf16 = "adamw_torch" if optim == ADAMW_DEEPSEEK else optim, False
        try:
            super().__post_init__()
        finally:
            self.bf16 = bf16
            self.optim = ADAMW_DEEPSEEK if optim == ADAMW_DEEPSEEK else self.optim

    def set_optimizer(self, name: Any = ADAMW_DEEPSEEK, *args: Any, **kwargs: Any) -> Any:
        """Like Transformers', but also accepts "adamw_deepseek"."""
        super().set_optimizer("adamw_torch" if name == ADAMW_DEEPSEEK else name, *args, **kwargs)
        self.optim = name
        return self

    @property
    def own_optimizer(self) -> bool:
        """Whether `optim` is this package's optimizer."""
        return self.optim == ADAMW_DEEPSEEK

    def _check_values(self) -> None:
        for name, allowed in _CHOICES.items():
            _one_of(name, getattr(self, name), get_args(allowed))
        if self.save_dtype is not None:
            _one_of("save_dtype", self.save_dtype, get_args(SaveDtype))
        for name in _FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be True or False, got {getattr(self, name)!r}")
        _one_of("optim", str(getattr(self.optim, "value", self.optim)), (ADAMW_DEEPSEEK, *optimizer_names()))
        for name in _NUMBERS:
            _number(name, getattr(self, name))
        if self.mtp_loss_weight is not None:
            _number("mtp_loss_weight", self.mtp_loss_weight)
        if (
            isinstance(self.draft_steps, bool)
            or not isinstance(self.draft_steps, int)
            or not 0 <= self.draft_steps <= MAX_DRAFTS
        ):
            raise ConfigError(f"draft_steps must be an integer from 0 to {MAX_DRAFTS}, got {self.draft_steps!r}")
        tokens = self.draft_vocabulary
        if tokens is not None and (isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 0):
            raise ConfigError(f"draft_vocabulary must be a number of tokens, 0 for all, or None, got {tokens!r}")
        _number("teacher_weight", self.teacher_weight)
        if not 0 < self.teacher_weight <= 1:
            raise ConfigError(f"teacher_weight must be above 0 and at most 1, got {self.teacher_weight!r}")
        if self.quantize is not None:
            check_format(self.quantize)
        if self.num_train_epochs == 0 and self.max_steps <= 0:
            raise ConfigError("num_train_epochs=0 trains nothing; set a value above 0, or max_steps")
        for name in ("per_device_train_batch_size", "gradient_accumulation_steps"):
            if (value := getattr(self, name)) < 1:
                raise ConfigError(f"{name} must be 1 or more, got {value!r}")

    def _check_agreement(self) -> None:
        """ConfigError for fields that contradict each other, before anything is loaded."""
        if self.fp16:
            raise ConfigError("fp16=True is not supported; use bf16=True, which needs no loss scaling, or bf16=False for fp32")
        if self.draft_steps and self.mtp_loss_weight is not None:
            raise ConfigError(
                f"draft_steps={self.draft_steps} trains multi-token prediction layers for the model as it is, and "
                f"mtp_loss_weight={self.mtp_loss_weight} together with it; set only one of them"
            )
        if self.draft_vocabulary and not self.draft_steps:
            raise ConfigError(f"draft_vocabulary={self.draft_vocabulary} needs draft_steps, the number of drafts in a row")
        for name in ("quantize", "teacher"):
            if self.draft_steps and (value := getattr(self, name)) is not None:
                raise ConfigError(
                    f"draft_steps={self.draft_steps} leaves the model as it is, and {name}={value!r} trains it; set only one"
                )
        if self.fp8_enabled and not self.bf16:
            raise ConfigError("fp8_enabled=True needs bf16=True: everything else is in bf16, with fp32 master weights")
        if self.fp8_enabled and self.optim != ADAMW_DEEPSEEK:
            raise ConfigError(f'fp8_enabled=True needs optim="{ADAMW_DEEPSEEK}", which has master weights; got {self.optim!r}')
        if self.optim_args and self.optim == ADAMW_DEEPSEEK:
            raise ConfigError(f'optim_args={self.optim_args!r} has no effect with optim="{ADAMW_DEEPSEEK}"; use the fields '
                              "optimizer_state and master_weights")  # fmt: skip
        if self.save_dtype == "fp32" and self.bf16 and self.master_weights == "stochastic":
            raise ConfigError('save_dtype="fp32" needs master_weights="split": "stochastic" stores no fp32 weights')
        self._check_quantization()
        if self.torch_compile or self.torch_compile_backend is not None or self.torch_compile_mode is not None:
            raise ConfigError(f'torch_compile cannot be combined with activation_memory="{self.activation_memory}": training '
                              "runs native kernels, which torch.compile cannot trace; leave torch_compile=False")  # fmt: skip
        if self.use_liger_kernel:
            raise ConfigError(f"use_liger_kernel=True cannot be combined with fused_loss={self.fused_loss}: both replace the "
                              "same modules; leave use_liger_kernel=False")  # fmt: skip
        if self.deepspeed:
            raise ConfigError(f'deepspeed cannot be combined with optim="{self.optim}" and bf16={self.bf16}, since DeepSpeed '
                              "brings its own; use fsdp, or Transformers' Trainer")  # fmt: skip
        if getattr(self, "activation_checkpointing", None) or self.gradient_checkpointing:
            if self.activation_memory == "full":
                raise ConfigError('gradient_checkpointing=True contradicts activation_memory="full"; set only one of them')
            self.activation_memory = "recompute"

    def _check_quantization(self) -> None:
        for name in ("quantize", "teacher"):
            for other, off in (("fp8_enabled", False), ("mtp_loss_weight", None), ("fsdp", None)):
                if getattr(self, name) is not None and getattr(self, other) not in (off, "", []):
                    raise ConfigError(f"{name}={getattr(self, name)!r} cannot be combined with {other}; leave {other} out")
        if self.quantize is not None and self.save_dtype is not None:
            raise ConfigError(f"save_dtype={self.save_dtype!r} has no effect with quantize={self.quantize!r}, whose result is "
                              "packed; leave save_dtype out")  # fmt: skip
        if self.teacher == "self" and self.quantize is None:
            raise ConfigError('teacher="self" trains the rounded model to equal the original, so it needs quantize; set '
                              "quantize, or name another model as teacher")  # fmt: skip
        if self.teacher is not None and (not self.fused_loss or self.label_smoothing_factor):
            raise ConfigError(f"teacher={self.teacher!r} needs fused_loss=True and label_smoothing_factor=0, since the "
                              "divergence is computed in chunks of tokens")  # fmt: skip


def _one_of(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in allowed:
        near = difflib.get_close_matches(str(value), allowed, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ConfigError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}{hint}")


def _number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
        raise ConfigError(f"{name} must be a finite number of at least 0, got {value!r}")
