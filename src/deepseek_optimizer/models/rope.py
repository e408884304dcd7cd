"""Rotary position embedding: the frequencies of a model, computed as in Transformers.

Row t of head x is rotated by the angles a_i = position_t * inv_freq_i: (x_i, x_j) -> (x_i cos a - x_j sin a, x_j cos a +
x_i sin a), where j = i + rot/2 (halves) or i + 1 (interleaved); cos and sin are multiplied by `scaling` (yarn). Only the first
`rot` elements of a head are rotated. Source: Su et al. 2021; for the scaled kinds see `rope_scaling.py`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import ConfigError, UnsupportedModelError, shown
from .fields import Fields, positive

Frequencies = npt.NDArray[np.float32]
KINDS = ("default", "linear", "dynamic", "yarn", "llama3", "longrope", "proportional")
# Required entries (besides rope_theta), each a number above 0.
_REQUIRED = {"linear": ("factor",), "dynamic": ("factor",), "yarn": ("factor",),
             "llama3": ("factor", "low_freq_factor", "high_freq_factor")}  # fmt: skip


@dataclass(frozen=True, eq=False)
class RopeSpec:
    """The rotary position embedding of a model.

    Attributes:
        kind: one of KINDS.
        rot: number of rotated elements of a head.
        inv_freq: float32 [rot/2].
        scaling: factor of cos and sin.
        grow: for "dynamic" and "longrope", computes inv_freq for a sequence of more than `context` tokens, given its length;
            else None.
        context: the config's max_position_embeddings; for "longrope" the trained length.
        room: maximum length of a sequence: `context`, or for "dynamic" `factor` times as much, because its formula takes the
            trained length from max_position_embeddings.
        attention_scale: factor of latent attention's scores (Transformers' yarn_apply_mscale).
        axes: for each frequency the axis whose position it takes, where pictures have positions in time (0), height (1) and
            width (2); (): there is one position.
    """

    kind: str
    rot: int
    inv_freq: Frequencies
    scaling: float = 1.0
    grow: Callable[[int], Frequencies] | None = None
    context: int = 0
    room: int = 0
    attention_scale: float = 1.0
    axes: tuple[int, ...] = ()

    @property
    def is_dynamic(self) -> bool:
        """Whether the frequencies depend on the sequence's length."""
        return self.grow is not None

    def inv_freq_at(self, length: int) -> Frequencies:
        """inv_freq for a sequence of `length` tokens (its highest position + 1), float32 [rot/2]."""
        return self.inv_freq if self.grow is None or length <= self.context else self.grow(length)


@dataclass(frozen=True)
class PositionScale:
    """The factor of the queries at position p, 1 + beta * log(1 + floor((p + offset) / length)); see op `position_scale`."""

    beta: float
    length: int
    offset: int = 0


def read_position_scale(fields: Fields, max_positions: int) -> PositionScale:
    """The factor of the queries in the newer families of Mistral, which is part of `rope_parameters`.

    Raises:
        UnsupportedModelError, ConfigError: a parameter is missing, or has a value that is not supported, or not valid.
    """
    parameters = _parameters(fields, max_positions, "", "rope_theta", True)
    beta = positive("rope_parameters['llama_4_scaling_beta']", parameters.get("llama_4_scaling_beta"))
    length = parameters.get("original_max_position_embeddings")
    if isinstance(length, bool) or not isinstance(length, int) or length < 1:
        name = "config.rope_parameters['original_max_position_embeddings']"
        raise ConfigError(f"{name}: expected a number of tokens, got {shown(length)}")
    return PositionScale(beta, length)


def read_rope(
    fields: Fields,
    head_dim: int,
    max_positions: int,
    name: str = "head_dim",
    *,
    layer_type: str = "",
    theta: str = "rope_theta",
    partial: float | None = None,
    scaled: bool = True,
    alpha: bool = False,
) -> RopeSpec:
    """Reads `rope_parameters`, or the older `rope_scaling` and `rope_theta`, from a config, which is not changed.

    Args:
        fields: the config.
        head_dim: number of elements of a head; without `partial`, all are rotated.
        max_positions: the config's max_position_embeddings.
        name: the config field that contains `head_dim`.
        layer_type: entry of `rope_parameters`, in families whose types of layers have parameters of their own.
        theta: older name of this layer type's `rope_theta`.
        scaled: whether parameters that are not by layer type apply to this one.
        alpha: whether kind "dynamic" with an `alpha` is the default with rope_theta * alpha^(head_dim / (head_dim - 2)).
        partial: the share of a head that is rotated if the config does not have `partial_rotary_factor`; None: the family
            always rotates whole heads.

    Raises:
        UnsupportedModelError, ConfigError: a field has a value that is not supported, or not valid.
    """
    if head_dim % 2 and partial is None:
        raise ConfigError(f"config.{name}: RoPE needs an even number, got {head_dim}")
    parameters = _parameters(fields, max_positions, layer_type, theta, scaled)
    if alpha and parameters["rope_type"] == "dynamic" and parameters.get("alpha"):
        factor = positive("rope_parameters['alpha']", parameters["alpha"]) ** (head_dim / (head_dim - 2))
        parameters |= {"rope_type": "default", "rope_theta": parameters["rope_theta"] * factor}
    kind, rot = parameters["rope_type"], head_dim
    if partial is not None:
        if parameters.get("partial_rotary_factor") is None:
            given = fields.get("partial_rotary_factor")
            parameters["partial_rotary_factor"] = positive("partial_rotary_factor", partial if given is None else given)
        rot = int(head_dim * parameters["partial_rotary_factor"])
        if not 0 < rot <= head_dim or rot % 2:
            raise ConfigError(
                f"config.partial_rotary_factor: RoPE needs an even number of elements up to {head_dim}, but the factor "
                f"{parameters['partial_rotary_factor']} gives {rot}"
            )
    if kind == "longrope" and len(parameters["short_factor"]) != rot // 2:
        count = len(parameters["short_factor"])
        raise ConfigError(f"config.rope_parameters['short_factor']: expected {rot // 2} numbers, got {count}")
    try:
        inv_freq, scaling = _compute(parameters, rot if kind == "default" else head_dim, max_positions, None)
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(f"config.rope_parameters: frequencies cannot be computed from {parameters!r}: {error}") from error
    if 2 * len(inv_freq) != rot:
        raise UnsupportedModelError(
            f"config.rope_parameters['partial_rotary_factor']: {2 * len(inv_freq)} of {head_dim} elements of a head would be "
            f"rotated; this family rotates all of {name}"
        )
    if not (np.isfinite(inv_freq).all() and np.isfinite(scaling)):
        raise ConfigError(f"config.rope_parameters: {parameters!r} gives frequencies that are not finite")
    grow = functools.partial(_inv_freq, parameters, head_dim, max_positions) if kind in ("dynamic", "longrope") else None
    room = round(max_positions * max(1.0, parameters["factor"])) if kind == "dynamic" else max_positions
    context = parameters["original_max_position_embeddings"] if kind == "longrope" else max_positions
    return RopeSpec(kind, rot, inv_freq, scaling, grow, context, room, _attention_scale(parameters))


def _parameters(fields: Fields, max_positions: int, layer_type: str, theta_name: str, scaled: bool) -> dict[str, Any]:
    """A checked copy of the parameters under their current names."""
    given = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    if not isinstance(given, dict):
        raise ConfigError(f"config.rope_parameters: expected an object, got {given!r}")
    if layer_type and isinstance(given.get(layer_type), dict):
        given = given[layer_type]
    elif layer_type and not scaled:
        given = {}
    if any(isinstance(v, dict) for v in given.values()):
        raise UnsupportedModelError("config.rope_parameters: different parameters per layer are not supported in this family")
    parameters = dict(given)
    kind = parameters["rope_type"] = parameters.pop("rope_type", parameters.pop("type", "default"))
    if kind not in KINDS:
        raise UnsupportedModelError(
            f"config.rope_parameters['rope_type'] {kind!r} is not supported. Supported: {', '.join(KINDS)}."
        )
    if parameters.get("rope_theta") is None:
        theta = fields.get(theta_name)
        parameters["rope_theta"] = fields.get("default_theta", 10000.0) if theta is None else theta
    if kind in ("yarn", "llama3", "longrope"):
        original = fields.get("original_max_position_embeddings") or parameters.get("original_max_position_embeddings")
        parameters["original_max_position_embeddings"] = original or max_positions
    for name in ("rope_theta", "original_max_position_embeddings", *_REQUIRED.get(kind, ())):
        if name in parameters or name in _REQUIRED.get(kind, ()):
            positive(f"rope_parameters[{name!r}]", parameters.get(name))
    if kind == "longrope":
        _check_factors(parameters)
    for name in ("mscale", "mscale_all_dim"):  # in DeepSeek's own code, 0 stands for none
        if parameters.get(name) == 0 and not isinstance(parameters[name], bool):
            del parameters[name]
    if kind == "proportional" and not parameters.get("partial_rotary_factor", 1.0) <= 1:
        raise ConfigError(f"config.rope_parameters['partial_rotary_factor']: expected at most 1, got {shown(parameters)}")
    for name in ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "partial_rotary_factor"):
        if parameters.get(name) is not None:
            positive(f"rope_parameters[{name!r}]", parameters[name])
    return parameters


def _check_factors(parameters: dict[str, Any]) -> None:
    """Raises ConfigError unless both lists of longrope have the same number of numbers above 0."""
    short = parameters.get("short_factor")
    for name in ("short_factor", "long_factor"):
        factors = parameters.get(name)
        if not isinstance(factors, (list, tuple)) or not factors or len(factors) != len(short or ()):
            raise ConfigError(
                f"config.rope_parameters[{name!r}]: expected as many numbers as in short_factor, got {shown(factors)}"
            )
        for factor in factors:
            positive(f"rope_parameters[{name!r}]", factor)


def _attention_scale(parameters: dict[str, Any]) -> float:
    """The square of yarn's factor for all elements of a head, which applies to queries and keys. Source: DeepSeek-V2's code."""
    factor, all_dim = parameters.get("factor"), parameters.get("mscale_all_dim")
    if parameters["rope_type"] == "default" or not factor or not all_dim or factor <= 1:
        return 1.0
    return float((0.1 * all_dim * math.log(factor) + 1.0) ** 2)


def _compute(parameters: dict[str, Any], head_dim: int, max_positions: int, length: Any) -> tuple[Frequencies, float]:
    from .rope_scaling import frequencies  # imports torch, which is slow

    inv_freq, scaling = frequencies(parameters, head_dim, max_positions, length)
    return inv_freq.float().numpy(), float(scaling)


def _inv_freq(parameters: dict[str, Any], head_dim: int, max_positions: int, length: int) -> Frequencies:
    import torch

    # A tensor, as in Transformers' forward, which passes integers whose products have torch's default dtype.
    reach = torch.tensor(length, dtype=torch.float32, device="cpu")
    return _compute(parameters, head_dim, max_positions, reach)[0]
