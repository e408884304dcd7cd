"""`DeepSeekTrainingArguments`: all of Transformers' `TrainingArguments`, and what this package's trainer adds."""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass, field
from typing import Any, Final, Literal, get_args

from transformers import TrainingArguments as PlainArguments

from ..errors import ConfigError
from ..integration.training.trainer import optimizer_names

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
_FLAGS: Final = ("bf16", "fp8_enabled", "fp8_e4m3", "packing", "fused_loss")
_NUMBERS: Final = ("learning_rate", "num_train_epochs", "weight_decay", "moe_balance_rate", "moe_sequence_loss_weight")


@dataclass(repr=False)
class DeepSeekTrainingArguments(PlainArguments):
    """All of `transformers.TrainingArguments`, with these fields new or with another default.

    Args:
        optim: "adamw_deepseek" (`train.optimizer.DeepSeekAdamW`) or any name that Transformers has. What concerns precision
            (`bf16`, `optimizer_state`, `master_weights`) belongs to "adamw_deepseek"; with another optimizer the weights keep
            the dtype that they were loaded in.
        bf16: weights, gradients and products in bf16, beside which the optimizer keeps what an exact fp32 weight needs. It
            is not autocast. False: all in fp32.
        optimizer_state: how the two moments of Adam are kept: 2, 1 or 4 bytes each a weight.
        master_weights: "split" keeps the low 16 bits of each fp32 weight (2 bytes a weight); "stochastic" keeps none and
            rounds updates up or down by chance, right on average.
        activation_memory: what the forward keeps for the backward. "full" everything; "selective" not what is cheap to make
            again (outputs of norms, products of gates); "recompute" only the inputs of the decoder's layers.
        fused_loss: the loss and its gradient are made by pieces of rows in one go with the head, so that logits never stand
            in memory as a whole. Not where a loss function of the caller's own, label smoothing or metrics need them.
        packing: several documents share a row, without seeing each other.
        fp8_enabled: products of linear layers in FP8, as DeepSeek-V3's report (section 3.3) has them.
        fp8_e4m3: E4M3 for all operands; False: E5M2 for gradients.
        fp8_backend: "hardware" on FP8 tensor cores, "emulate" the numerics alone, "auto" whichever this machine can.
        on_nan: what happens where a loss or a gradient is not finite. "stop" ends training with an error that names the
            step and the last checkpoint; "skip" leaves the step out, and stops after several in a row.
        save_dtype: of the saved model's weights: "bf16" or "fp32" (the master weights); None: what it is trained in.
        moe_balance_rate: step by which the bias of an overloaded expert falls and that of an idle one rises (DeepSeek-V3's
            balancing without an auxiliary loss; report, section 2.1.2); 0: never.
        moe_sequence_loss_weight: alpha of the report's loss against experts that one text overloads; it had 0.0001. 0: none.
        mtp_loss_weight: weight of the loss of multi-token prediction layers (report, section 2.2); None: not trained.

    Raises:
        ConfigError: a field's value is not one of those it can have, or two fields contradict each other; both are named.
    """

    bf16: bool = field(default=True, metadata={"help": "Weights in bf16 beside exact fp32 masters; not autocast."})
    optim: str = field(default=ADAMW_DEEPSEEK, metadata={"help": "adamw_deepseek, or any optimizer that Transformers has."})
    optimizer_state: OptimizerState = field(default="bf16", metadata={"help": "How Adam's moments are kept."})
    master_weights: MasterWeights = field(default="split", metadata={"help": "How updates below bf16's steps are not lost."})
    activation_memory: ActivationMemory = field(default="selective", metadata={"help": "What is kept for the backward."})
    fused_loss: bool = field(default=True, metadata={"help": "Head and loss by pieces: logits never stand as a whole."})
    packing: bool = field(default=False, metadata={"help": "Several documents in a row, without seeing each other."})
    fp8_enabled: bool = field(default=False, metadata={"help": "Products of linear layers in FP8 (DeepSeek-V3, 3.3)."})
    fp8_e4m3: bool = field(default=True, metadata={"help": "E4M3 for all operands; False: E5M2 for gradients."})
    fp8_backend: Fp8Backend = field(default="auto", metadata={"help": "FP8 tensor cores, or their numerics emulated."})
    on_nan: OnNan = field(default="stop", metadata={"help": "What happens where a loss or gradient is not finite."})
    save_dtype: SaveDtype | None = field(default=None, metadata={"help": "Of the saved weights; None: as trained."})
    moe_balance_rate: float = field(default=0.001, metadata={"help": "Step of the experts' balancing biases; 0: none."})
    moe_sequence_loss_weight: float = field(default=0.0, metadata={"help": "Weight of experts' balance within a text."})
    mtp_loss_weight: float | None = field(default=None, metadata={"help": "Weight of the multi-token prediction loss."})

    def __post_init__(self) -> None:
        self._check_values()
        self._check_agreement()
        optim, bf16 = self.optim, self.bf16
        # Transformers knows neither the name nor this meaning of bf16, and on a CPU would refuse it without use_cpu.
        self.optim, self.bf16 = "adamw_torch" if optim == ADAMW_DEEPSEEK else optim, False
        try:
            super().__post_init__()
        finally:
            self.bf16 = bf16
            self.optim = ADAMW_DEEPSEEK if optim == ADAMW_DEEPSEEK else self.optim

    def set_optimizer(self, name: Any = ADAMW_DEEPSEEK, *args: Any, **kwargs: Any) -> Any:
        """As Transformers'; takes this package's optimizer too."""
        super().set_optimizer("adamw_torch" if name == ADAMW_DEEPSEEK else name, *args, **kwargs)
        self.optim = name
        return self

    @property
    def own_optimizer(self) -> bool:
        """Whether `optim` is this package's."""
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
        if self.num_train_epochs == 0 and self.max_steps <= 0:
            raise ConfigError("num_train_epochs=0 trains nothing; give it more than 0, or max_steps")
        for name in ("per_device_train_batch_size", "gradient_accumulation_steps"):
            if (value := getattr(self, name)) < 1:
                raise ConfigError(f"{name} must be 1 or more, got {value!r}")

    def _check_agreement(self) -> None:
        """Fields that contradict each other; here, so that nothing is loaded before it is said."""
        if self.fp16:
            raise ConfigError("fp16=True cannot be had: training runs in bf16=True, whose range needs no loss scaling, or fp32")
        if self.fp8_enabled and not self.bf16:
            raise ConfigError("fp8_enabled=True needs bf16=True: what is not in FP8 stays in bf16, beside fp32 masters")
        if self.fp8_enabled and self.optim != ADAMW_DEEPSEEK:
            raise ConfigError(
                f'fp8_enabled=True needs optim="{ADAMW_DEEPSEEK}", which keeps master weights; got {self.optim!r}'
            )
        if self.optim_args and self.optim == ADAMW_DEEPSEEK:
            raise ConfigError(f'optim_args={self.optim_args!r} are for other optimizers than optim="{ADAMW_DEEPSEEK}", whose '
                              "fields are optimizer_state and master_weights")  # fmt: skip
        if self.save_dtype == "fp32" and self.bf16 and self.master_weights == "stochastic":
            raise ConfigError('save_dtype="fp32" needs master_weights="split": "stochastic" keeps no fp32 weights to save')
        if self.torch_compile or self.torch_compile_backend is not None or self.torch_compile_mode is not None:
            raise ConfigError(f'torch_compile cannot be combined with activation_memory="{self.activation_memory}": trained '
                              "modules run native kernels, which it does not see; leave torch_compile=False")  # fmt: skip
        if self.use_liger_kernel:
            raise ConfigError(f"use_liger_kernel=True cannot be combined with fused_loss={self.fused_loss}: both replace the "
                              "same modules; leave use_liger_kernel=False")  # fmt: skip
        if self.fsdp and self.optimizer_state == "int8" and self.optim == ADAMW_DEEPSEEK:
            raise ConfigError('optimizer_state="int8" cannot be combined with fsdp: its scales belong to blocks of a shard, '
                              'and could not be saved whole; take optimizer_state="bf16"')  # fmt: skip
        if self.deepspeed:
            raise ConfigError(f'deepspeed cannot be combined with optim="{self.optim}" and bf16={self.bf16}, for DeepSpeed has '
                              "its own; train with fsdp, or with Transformers' Trainer")  # fmt: skip
        if getattr(self, "activation_checkpointing", None) or self.gradient_checkpointing:
            if self.activation_memory == "full":
                raise ConfigError('gradient_checkpointing=True contradicts activation_memory="full"; give one of them')
            self.activation_memory = "recompute"


def _one_of(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in allowed:
        near = difflib.get_close_matches(str(value), allowed, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ConfigError(f"{name} has no value {value!r}; {hint}It must be one of {', '.join(map(repr, allowed))}")


def _number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
        raise ConfigError(f"{name} must be a finite number from 0 on, got {value!r}")
