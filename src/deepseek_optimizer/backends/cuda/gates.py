"""How the results of gate and up are joined. Kernels are compiled for one `Gate`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Gate:
    """One way.

    Attributes:
        kind: "silu" or "gelu", the function of the gate; "clamped", SwiGLU with limits; "" where there is no gate.
        limit, alpha, raised: of "clamped", see op `experts_gate_up`.
    """

    kind: str
    limit: float = 0.0
    alpha: float = 1.0
    raised: bool = False


NO_GATE, SILU, GELU = Gate(""), Gate("silu"), Gate("gelu")
OF_OPS = {"swiglu": SILU, "geglu": GELU}


def limited(limit: float) -> Gate:
    """That of op `clamped_swiglu`."""
    return Gate("clamped", float(limit))


def gate_of(attrs: Mapping[str, Any]) -> Gate:
    """That of a node `gate_up` or `experts_gate_up` by its attributes."""
    if attrs.get("limit", 0.0) > 0:
        return Gate("clamped", float(attrs["limit"]), float(attrs["alpha"]), bool(attrs.get("raised", True)))
    return {"silu": SILU, "gelu": GELU}[attrs.get("activation", "silu")]
