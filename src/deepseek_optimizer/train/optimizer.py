"""`DeepSeekAdamW`: AdamW with little memory, in one pass over weights, gradients and moments.

A bf16 weight takes 2 bytes, plus 2 bytes for the rest of its fp32 master weight ("split", lossless) or none ("stochastic"),
plus 4, 2 or 8 bytes for its two moments ("bf16", "int8", "fp32"). Plain fp32 AdamW takes 12 bytes, and 4 for the gradient.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable
from typing import Any, Final, get_args

import torch
from torch.optim import Optimizer

from ..errors import ConfigError
from .ops.adamw import Master, Rates, Update, adamw, join, squares
from .ops.moments import MomentFormat, Moments
from .ops.random_bits import keys as random_keys
from .shards import local, total_squares

logger = logging.getLogger(__name__)

_SMALLEST_CODED: Final = 4096  # elements; 8 bits save nothing on smaller tensors and hurt norms and biases (Dettmers 2022)
_MOMENT_NAMES: Final = {"m": "exp_avg", "v": "exp_avg_sq", "m_scale": "exp_avg_scale", "v_scale": "exp_avg_sq_scale"}


class DeepSeekAdamW(Optimizer):
    """AdamW with decoupled weight decay. Schedulers, groups, closures and state_dict work as with any torch optimizer.

    Args:
        params: parameters in bf16 or fp32, or groups of them. fp32 parameters are their own master weights.
        lr, betas, eps, weight_decay: as in `torch.optim.AdamW`.
        state: format of the two moments: "bf16" (2 bytes each per weight, rounded stochastically), "int8" (1 byte each, in
            blocks of 256; tensors with fewer than 4,096 elements stay in fp32) or "fp32".
        master_weights: for bf16 parameters. "split": store the 16 low bits of each fp32 master weight, so that training is
            bitwise equal to training fp32 weights; "stochastic": store nothing and round each update stochastically.
        max_norm: scale the gradients so that their norm over all parameters is at most this; None: do not scale them.
        free_gradients: set each `grad` to None in `step`, so that gradients take no memory until the next backward pass.
        dither: with "split", initialize each master weight at random within the interval that rounds to its bf16 weight,
            rather than at the weight itself. Weights loaded from bf16 would otherwise all lie in the middle of that interval,
            where the first updates, each far below half a bf16 step, would not change the model's weights.
        seed: seed of stochastic rounding; an update depends on (seed, step, parameter, element) only.

    Attributes set by each `step`:
        grad_norm: norm of all gradients before scaling.
        skipped: whether a gradient was not finite. In that case nothing was changed, no step was counted, and a warning was
            logged.
        skipped_steps: number of skipped steps since the optimizer was created.

    If a parameter has a `main_grad`, an fp32 tensor of accumulated gradients, its gradient is `main_grad` plus `grad`.

    Raises:
        ConfigError: an invalid argument, a parameter of another dtype, or a sparse gradient.
    """

    def __init__(
        self,
        params: Any,
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        state: MomentFormat = "bf16",
        master_weights: str = "split",
        max_norm: float | None = None,
        free_gradients: bool = False,
        dither: bool = False,
        seed: int = 0,
    ) -> None:
        if max_norm is not None and not max_norm > 0:
            raise ConfigError(f"max_norm must be above 0, or None for no limit, got {max_norm!r}")
        self.max_norm, self.free_gradients, self.dither = max_norm, free_gradients, dither
        self.grad_norm, self.skipped, self.skipped_steps = 0.0, False, 0
        own = {"state": state, "master_weights": master_weights, "seed": seed}
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, **own})

    def __getstate__(self) -> dict[str, Any]:
        own = ("max_norm", "free_gradients", "dither", "grad_norm", "skipped", "skipped_steps")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Like `torch.optim.Optimizer.add_param_group`. Raises ConfigError."""
        super().add_param_group(param_group)
        try:
            _check_group(self.param_groups[-1])
        except ConfigError:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates every parameter that has a gradient. Returns the result of `closure`, if given.

        Raises:
            ConfigError: a gradient is sparse or of a dtype other than bf16 and fp32.
            BackendError: the native library failed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        entries = list(self._gradients())
        self.grad_norm, not_finite = _norm(entries)
        self.skipped = not_finite is not None or not math.isfinite(self.grad_norm)
        if self.skipped:
            self.skipped_steps += 1
            logger.warning("step skipped: the gradient of %s is not finite; no weight was changed", not_finite)
        else:
            scale = 1.0 if self.max_norm is None else min(1.0, self.max_norm / (self.grad_norm + 1e-6))
            adamw([self._update(parameter, gradient, group, index, scale) for parameter, gradient, group, index, _ in entries])
        if self.free_gradients:
            self.zero_grad()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Like `torch.optim.Optimizer.zero_grad`; also zeroes each `main_grad`."""
        super().zero_grad(set_to_none)
        for parameter, _, _ in self._named():
            accumulated = getattr(parameter, "main_grad", None)
            if accumulated is not None:
                accumulated.zero_()

    def master(self, parameter: torch.Tensor) -> torch.Tensor:
        """The exact fp32 master weights of a parameter; for a sharded parameter, those of this process's shard."""
        low = self.state.get(parameter, {}).get("master_low")
        weights = local(parameter.detach())
        return weights.float().clone() if low is None else join(weights, local(low))

    def state_bytes(self) -> int:
        """Bytes of moments and master weights, which the first `step` allocates."""
        meta = torch.device("meta")
        states = (_fresh(local(parameter), parameter, group, meta) for parameter, group, _ in self._named())
        return sum(t.numel() * t.element_size() for state in states for name, t in state.items() if name != "step")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Like `torch.optim.Optimizer.load_state_dict`, but tensors keep their dtypes, so that resuming is exact bit for bit.

        Raises:
            ConfigError: the state has another format (the message names the argument to set) or other shapes.
        """
        for ours, theirs in zip(self.param_groups, state_dict["param_groups"], strict=False):
            if "master_weights" not in theirs:
                raise ConfigError("the saved state belongs to another optimizer than DeepSeekAdamW; start with a new state")
            for name in ("state", "master_weights"):
                if theirs[name] != ours[name]:
                    raise ConfigError(
                        f"the saved optimizer has {name}={theirs[name]!r}, this one {name}={ours[name]!r}; "
                        f"set {name}={theirs[name]!r}, or start with a new optimizer state"
                    )
        super().load_state_dict({**state_dict, "state": {}})  # it would cast the state
        indices = (n for group in state_dict["param_groups"] for n in group["params"])
        for index, (parameter, group, name) in zip(indices, self._named(), strict=True):
            saved = state_dict["state"].get(index, {})
            if saved:
                _check_saved(saved, _fresh(local(parameter), parameter, group, torch.device("meta")), name)
                self.state[parameter] = {key: value.detach().to(parameter.device, copy=True) for key, value in saved.items()}

    def _named(self) -> Iterable[tuple[torch.nn.Parameter, dict[str, Any], str]]:
        """Each (parameter, its group, its name), in the order of parameter indices."""
        index = 0
        for group in self.param_groups:
            names = group.get("param_names")
            for place, parameter in enumerate(group["params"]):
                yield parameter, group, names[place] if names else f"parameter {index}"
                index += 1

    def _gradients(self) -> Iterable[tuple[torch.Tensor, torch.Tensor, dict[str, Any], int, str]]:
        """Each (parameter, gradient, group, parameter index, name) whose parameter has a gradient."""
        for index, (parameter, group, name) in enumerate(self._named()):
            gradient = _gradient(parameter, name)
            if gradient is not None:
                yield parameter, gradient, group, index, name

    def _update(
        self, parameter: torch.Tensor, gradient: torch.Tensor, group: dict[str, Any], index: int, scale: float
    ) -> Update:
        state, master = self.state[parameter], _master(parameter, group)
        if not state:
            state.update(_fresh(local(parameter), parameter, group, parameter.device))
            if self.dither and "master_low" in state:
                _dither(local(state["master_low"]), local(parameter), group["seed"] + index)
        state["step"] += 1
        step, low = int(state["step"]), state.get("master_low")
        moments = Moments(**{name: local(state[key]) for name, key in _MOMENT_NAMES.items() if key in state})
        rates = Rates.at(
            step, lr=float(group["lr"]), betas=group["betas"], eps=group["eps"], weight_decay=group["weight_decay"],
            gradient_scale=scale,
        )  # fmt: skip
        low = None if low is None else local(low)
        return Update(local(parameter), local(gradient), moments, rates, master, low, random_keys(group["seed"], step, index))


def _fresh(
    weights: torch.Tensor, parameter: torch.Tensor, group: dict[str, Any], device: torch.device
) -> dict[str, torch.Tensor]:
    """The state of a parameter before its first step; `weights` is this process's shard of it."""
    moments = Moments.zeros(weights.shape, _moment_format(parameter, group), device)
    state = {_MOMENT_NAMES[name]: t for name, t in vars(moments).items() if t is not None}
    if _master(parameter, group) == "split":
        state["master_low"] = torch.zeros(weights.shape, dtype=torch.int16, device=device)
    return {"step": torch.zeros((), dtype=torch.int64, device="cpu"), **state}


def _dither(low: torch.Tensor, weights: torch.Tensor, seed: int) -> None:
    """Fills `low` with the low bits of a random fp32 number that rounds to the weight. Zero weights stay exactly zero."""
    generator = torch.Generator(low.device).manual_seed(seed)
    low.random_(-(1 << 15) + 1, 1 << 15, generator=generator)
    low.masked_fill_(weights == 0, 0)


def _check_saved(saved: dict[str, Any], fresh: dict[str, torch.Tensor], name: str) -> None:
    """ConfigError if shapes or dtypes differ; the native step would access memory outside such tensors."""

    def describe(state: dict[str, Any]) -> dict[str, str]:
        return {key: f"{getattr(t, 'dtype', type(t))} {list(getattr(t, 'shape', ()))}" for key, t in state.items()}

    theirs, ours = describe(saved), describe(fresh)
    if theirs != ours:
        raise ConfigError(
            f"the saved optimizer state of {name} is {theirs} instead of {ours}: it belongs to another model or to other "
            "parameters; start with a new optimizer state"
        )


def _check_group(group: dict[str, Any]) -> None:
    for name, low in (("lr", 0.0), ("eps", 0.0), ("weight_decay", 0.0)):
        if not (math.isfinite(group[name]) and group[name] >= low):
            raise ConfigError(f"{name} must be a number of at least {low:g}, got {group[name]!r}")
    if len(group["betas"]) != 2 or not all(0 <= beta < 1 for beta in group["betas"]):
        raise ConfigError(f"betas must be two numbers in [0, 1), got {group['betas']!r}")
    for name, allowed in (("state", get_args(MomentFormat)), ("master_weights", ("split", "stochastic"))):
        if group[name] not in allowed:
            raise ConfigError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {group[name]!r}")
    for parameter in group["params"]:
        if parameter.dtype not in (torch.float32, torch.bfloat16):
            raise ConfigError(
                f"parameters must be bf16 or fp32, but one of shape {tuple(parameter.shape)} is {parameter.dtype}; "
                "convert the model with .bfloat16() or .float()"
            )


def _gradient(parameter: torch.Tensor, name: str) -> torch.Tensor | None:
    gradient, accumulated = parameter.grad, getattr(parameter, "main_grad", None)
    if gradient is not None and (gradient.is_sparse or gradient.dtype not in (torch.float32, torch.bfloat16)):
        kind = "sparse" if gradient.is_sparse else str(gradient.dtype)
        raise ConfigError(f"the gradient of {name} is {kind}; it must be dense, in bf16 or fp32")
    if accumulated is None:
        return gradient
    if accumulated.dtype != torch.float32 or accumulated.shape != parameter.shape:
        raise ConfigError(
            f"main_grad of {name} is {accumulated.dtype} {list(accumulated.shape)}; it must be fp32 {list(parameter.shape)}"
        )
    if gradient is not None:
        accumulated.add_(gradient)
        parameter.grad = None
    return accumulated


def _norm(entries: list[Any]) -> tuple[float, str | None]:
    """The norm of all gradients, and the name of the first parameter whose gradient is not finite.

    Args:
        entries: what `DeepSeekAdamW._gradients` yields.
    """
    gradients = [gradient for _, gradient, *_ in entries]
    sums, counts = total_squares(gradients, *squares([local(g) for g in gradients]))
    names = [name for *_, name in entries]
    return math.sqrt(math.fsum(sums)) if all(map(math.isfinite, sums)) else math.inf, next(
        (name for name, count in zip(names, counts, strict=True) if count), None
    )


def _master(parameter: torch.Tensor, group: dict[str, Any]) -> Master:
    return "none" if parameter.dtype == torch.float32 else group["master_weights"]


def _moment_format(parameter: torch.Tensor, group: dict[str, Any]) -> MomentFormat:
    kind: MomentFormat = group["state"]
    return "fp32" if kind == "int8" and parameter.numel() < _SMALLEST_CODED else kind
