"""The ops of low-rank adapters: launches the kernels of a node on its values, as `ops.py` does."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ...graph.ir import Node
from .kernels import adapters
from .ops import Op, Run, Values


def _lora_down(run: Run, node: Node, inputs: Values, outputs: Values) -> None:
    if run.adapters is not None and run.at.adapters is not None:
        rows, table = run.at.adapters, run.adapters.table
        narrow = run.adapters.dtype != torch.float32
        adapters.shrink(inputs[0], rows.order, rows.fields, table, node.attrs["site"], narrow, outputs[0])


def _lora_up(run: Run, node: Node, inputs: Values, outputs: Values) -> None:
    (h, y), (z,) = inputs, outputs
    if z.data_ptr() != y.data_ptr():
        z.copy_(y)
    if run.adapters is not None and run.at.adapters is not None:
        rows, table = run.at.adapters, run.adapters.table
        adapters.expand(h, rows.order, rows.fields, table, node.attrs["site"], run.adapters.dtype != torch.float32, z)


ADAPTER_OPS: Mapping[str, Op] = {"lora_down": _lora_down, "lora_up": _lora_up}
