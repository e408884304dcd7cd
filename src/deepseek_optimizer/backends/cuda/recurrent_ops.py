"""The ops with recurrent states: launches the kernels of a node on its values, as `ops.py` does."""

from __future__ import annotations

from collections.abc import Mapping

from ...graph.ir import Node
from .kernels import recurrent
from .ops import Op, Run, Values
from .states import DeviceStates
from .step import Runs


def _short_conv(run: Run, node: Node, inputs: Values, outputs: Values) -> None:
    a, (states, runs) = node.attrs, _states(run)
    recurrent.short_conv(
        inputs[0], states.data, states.offsets[a["state"]], runs, run.weights.vectors[node.weights[0]],
        run.weights.vector(a["bias"]), a["activation"] == "silu", outputs[0],
    )  # fmt: skip


def _delta_rule(run: Run, node: Node, inputs: Values, outputs: Values) -> None:
    (x, alpha, beta), a, (states, runs) = inputs, node.attrs, _states(run)
    a_log, dt_bias = (run.weights.vectors[name] for name in node.weights)
    recurrent.delta_rule(
        x, alpha, beta, a_log, dt_bias, states.data, states.offsets[a["state"]], runs, outputs[0], heads=a["heads"],
        k_heads=a["k_heads"], k_dim=a["k_dim"], v_dim=a["v_dim"], channels=a["channels"],
    )  # fmt: skip


def _states(run: Run) -> tuple[DeviceStates, Runs]:
    states, runs = run.cache.states, run.at.runs
    assert isinstance(states, DeviceStates) and runs is not None  # of graphs with states
    return states, runs


RECURRENT_OPS: Mapping[str, Op] = {"delta_rule": _delta_rule, "short_conv": _short_conv}
