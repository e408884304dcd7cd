"""Rotary position embedding: frequencies of one model, as Transformers computes them.

Row t of head x turns by angles a_i = position_t * inv_freq_i: (x_i, x_j) -> (x_i cos a - x_j sin a, x_j cos a + x_i sin a),
where j = i + rot/2 (halves) or i + 1 (interleaved); cos and sin are multiplied by `scaling` (yarn). Only the first `rot`
numbers of a head turn. Source: Su et al. 2021; for the scaled kinds see `rope_scaling.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import ConfigError, UnsupportedModelError
from .fields import Fields, positive

Frequencies = npt.NDArray[np.float32]
KINDS = ("default", "linear", "dynamic", "yarn", "llama3")
# Entries that must be there (beside rope_theta), each a number above 0.
_REQUIRED = {"linear": ("factor",), "dynamic": ("factor",), "yarn": ("factor",),
             "llama3": ("factor", "low_freq_factor", "high_freq_factor")}  # fmt: skip


@dataclass(frozen=True, eq=False)
class RopeSpec:
    """kind: one of KINDS. rot: numbers of a head that turn. inv_freq: float32 [rot/2]. scaling: multiplies cos and sin.
    grow: for "dynamic", length of a sequence longer than `context` tokens -> inv_freq. context: the config's
    max_position_embeddings. room: tokens that a sequence may have: as many, and for "dynamic" `factor` times as many, since its
    formula takes the trained length from there. attention_scale: what latent attention's scores are multiplied by for it
    (Transformers' yarn_apply_mscale)."""

    kind: str
    rot: int
    inv_freq: Frequencies
    scaling: float = 1.0
    grow: Callable[[int], Frequencies] | None = None
    context: int = 0
    room: int = 0
    attention_scale: float = 1.0

    @property
    def is_dynamic(self) -> bool:
        """Whether the frequencies depend on the sequence's length."""
        return self.grow is not None

    def inv_freq_at(self, length: int) -> Frequencies:
        """float32 [rot/2] for a sequence of `length` tokens (its highest position + 1)."""
        return self.inv_freq if self.grow is None or length <= self.context else self.grow(length)


def read_rope(fields: Fields, head_dim: int, max_positions: int, name: str = "head_dim") -> RopeSpec:
    """The RoPE of a model of whose heads `head_dim` numbers turn, as field `name` says.

    Reads `rope_parameters`, or the older `rope_scaling` and `rope_theta`; never changes the config.
    """
    if head_dim % 2:
        raise ConfigError(f"config.{name}: RoPE needs an even number, got {head_dim}")
    parameters = _parameters(fields, max_positions)
    kind = parameters["rope_type"]
    try:
        inv_freq, scaling = _compute(parameters, head_dim, max_positions, None)
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(f"config.rope_parameters: {parameters!r} cannot be computed with: {error}") from error
    if 2 * len(inv_freq) != head_dim:
        raise UnsupportedModelError(
            f"config.rope_parameters['partial_rotary_factor']: {2 * len(inv_freq)} of {head_dim} numbers of a head would turn; "
            f"in this family all of {name} do"
        )
    if not (np.isfinite(inv_freq).all() and np.isfinite(scaling)):
        raise ConfigError(f"config.rope_parameters: {parameters!r} give frequencies that are not finite")
    grow = partial(_inv_freq, parameters, head_dim, max_positions) if kind == "dynamic" else None
    room = max_positions if grow is None else round(max_positions * max(1.0, parameters["factor"]))
    return RopeSpec(kind, head_dim, inv_freq, scaling, grow, max_positions, room, _attention_scale(parameters))


def _parameters(fields: Fields, max_positions: int) -> dict[str, Any]:
    """A checked copy of the parameters in the newest spelling."""
    given = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    if not isinstance(given, dict):
        raise ConfigError(f"config.rope_parameters: expected an object, got {given!r}")
    if any(isinstance(v, dict) for v in given.values()):
        raise UnsupportedModelError("config.rope_parameters differ from layer to layer, which is not supported")
    parameters = dict(given)
    kind = parameters["rope_type"] = parameters.pop("rope_type", parameters.pop("type", "default"))
    if kind not in KINDS:
        raise UnsupportedModelError(
            f"config.rope_parameters['rope_type'] {kind!r} is not supported. Known: {', '.join(KINDS)}."
        )
    if parameters.get("rope_theta") is None:
        theta = fields.get("rope_theta")
        parameters["rope_theta"] = fields.get("default_theta", 10000.0) if theta is None else theta
    if kind in ("yarn", "llama3"):
        original = fields.get("original_max_position_embeddings") or parameters.get("original_max_position_embeddings")
        parameters["original_max_position_embeddings"] = original or max_positions
    for name in ("rope_theta", "original_max_position_embeddings", *_REQUIRED.get(kind, ())):
        if name in parameters or name in _REQUIRED.get(kind, ()):
            positive(f"rope_parameters[{name!r}]", parameters.get(name))
    for name in ("mscale", "mscale_all_dim"):  # DeepSeek's own code has 0 for none
        if parameters.get(name) == 0 and not isinstance(parameters[name], bool):
            del parameters[name]
    for name in ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "partial_rotary_factor"):
        if parameters.get(name) is not None:
            positive(f"rope_parameters[{name!r}]", parameters[name])
    return parameters


def _attention_scale(parameters: dict[str, Any]) -> float:
    """The square of yarn's factor for all numbers of a head: it counts in queries and keys. Source: DeepSeek-V2's own code."""
    factor, all_dim = parameters.get("factor"), parameters.get("mscale_all_dim")
    if parameters["rope_type"] == "default" or not factor or not all_dim or factor <= 1:
        return 1.0
    return float((0.1 * all_dim * math.log(factor) + 1.0) ** 2)


def _compute(parameters: dict[str, Any], head_dim: int, max_positions: int, length: Any) -> tuple[Frequencies, float]:
    from .rope_scaling import frequencies  # torch: not before it is needed

    inv_freq, scaling = frequencies(parameters, head_dim, max_positions, length)
    return inv_freq.float().numpy(), float(scaling)


def _inv_freq(parameters: dict[str, Any], head_dim: int, max_positions: int, length: int) -> Frequencies:
    import torch

    # A tensor, as Transformers' forward passes. Theirs is of integers, and its products have torch's default dtype.
    reach = torch.tensor(length, dtype=torch.float32, device="cpu")
    return _compute(parameters, head_dim, max_positions, reach)[0]
