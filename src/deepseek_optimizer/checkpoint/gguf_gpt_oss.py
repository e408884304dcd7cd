"""GGUF's `gpt-oss`.

llama.cpp's converter stores gate and up of the experts as tensors of their own, and so their biases, which alternate in
Transformers' parameter. The file does not say that YaRN's bounds are not rounded to whole dimensions, as in every gpt-oss.
Source: llama.cpp's conversion/gpt_oss.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError
from .gguf_metadata import Metadata
from .gguf_parameters import Decode, Parameter, ReadRows

NAMES: Mapping[str, str] = {
    "post_attention_norm": "post_attention_layernorm",
    "attn_sinks.weight": "self_attn.sinks",
    "ffn_gate_inp": "mlp.router",
    "ffn_gate_exps.bias": "mlp.experts.gate_proj_bias",
    "ffn_up_exps.bias": "mlp.experts.up_proj_bias",
    "ffn_down_exps.bias": "mlp.experts.down_proj_bias",
}


def exact_yarn(meta: Metadata, rope: dict[str, Any]) -> dict[str, Any]:
    """The config's `rope_parameters`, given the common ones."""
    return {"rope_parameters": rope | {"truncate": False} if rope["rope_type"] == "yarn" else rope}


class AlternatingBiases(Parameter):
    """Biases [E, 2 I] that alternate. Sources: those of gate and of up, [E, I] each."""

    def misshapen(self) -> bool:
        return False  # checked by `join_biases`

    def floats(self, begin: int, end: int, read: ReadRows, decode: Decode) -> torch.Tensor:
        """Rows [begin, end), float [end - begin, 2 I]."""
        gate, up = (decode(source, read(source, begin, end)) for source in self.sources)
        return torch.stack((gate, up), -1).flatten(1)


def join_biases(parameters: dict[str, Parameter], config: Mapping[str, Any], path: Path) -> None:
    """Joins the biases of gate and up.

    Raises:
        CheckpointError: one is missing, or their shapes or types differ.
    """
    for name in [name for name in parameters if name.endswith(".experts.gate_proj_bias")]:
        other = name.replace("gate_proj", "up_proj")
        if other not in parameters:
            raise CheckpointError(f"is present without {other}", file=path, tensor=name)
        sources = parameters.pop(name).sources + parameters.pop(other).sources
        gate, up = sources
        if len(gate.shape) != 2 or (gate.shape, gate.type) != (up.shape, up.type):
            raise CheckpointError(
                f"is {gate.type.name} {gate.shape}, but that of up is {up.type.name} {up.shape}; both must be alike matrices",
                file=path,
                tensor=gate.name,
            )
        joined = AlternatingBiases(sources, (gate.shape[0], 2 * gate.shape[1]))
        parameters[name.replace("gate_proj", "gate_up_proj")] = joined
