"""Names of tensors in published checkpoints that differ from the parameters' names in Transformers.

Transformers renames them when it loads (`conversion_mapping.py`); both forms are read here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from ..errors import CheckpointError
from .base import TensorInfo

Renames = tuple[tuple[str, str], ...]  # pattern -> replacement, applied in order

_NUMBERED: Final[Renames] = (
    (r"\.experts\.(\d+)\.w1\.", r".experts.\1.gate_proj."),
    (r"\.experts\.(\d+)\.w3\.", r".experts.\1.up_proj."),
    (r"\.experts\.(\d+)\.w2\.", r".experts.\1.down_proj."),
)
_MIXTRAL: Final[Renames] = ((r"\.block_sparse_moe\.", ".mlp."), *_NUMBERED)
_GRANITE: Final[Renames] = (
    (r"\.block_sparse_moe\.input_linear\.weight$", ".block_sparse_moe.experts.gate_up_proj"),
    (r"\.block_sparse_moe\.output_linear\.weight$", ".block_sparse_moe.experts.down_proj"),
    (r"\.block_sparse_moe\.router\.layer\.weight$", ".block_sparse_moe.router.weight"),
)
_KIMI: Final[Renames] = (
    *_MIXTRAL, (r"\.self_attn\.(A_log|dt_bias|f_[ab]_proj\.weight)$", r".self_attn.forget_gate.\1"),
)  # fmt: skip
_V4: Final[Renames] = (
    (r"^(?:model\.)?embed\.weight$", "model.embed_tokens.weight"), (r"^(?:model\.)?head\.weight$", "lm_head.weight"),
    (r"^(layers\.|norm\.|hc_head)", r"model.\1"), (r"(^model|\.\d+)\.hc_head_(fn|base|scale)$", r"\1.hc_head.hc_\2"),
    (r"^(model\.layers\.\d+)\.norm\.", r"\1.shared_head.norm."),
    (r"\.attn\.", ".self_attn."), (r"\.ffn\.", ".mlp."), (r"\.indexer\.compressor\.", ".compressor.indexer."),
    (r"\.self_attn\.indexer\.weights_proj\.", ".self_attn.compressor.indexer.scorer.weights_proj."),
    (r"\.self_attn\.indexer\.", ".self_attn.compressor.indexer."),
    (r"\.attn_norm\.", ".input_layernorm."), (r"\.ffn_norm\.", ".post_attention_layernorm."),
    (r"(?<!_hc)\.scale$", ".weight_scale_inv"), (r"\.hc_(attn|ffn)_(fn|base|scale)$", r".\1_hc.\2"),
    (r"\.attn_sink$", ".sinks"), (r"\.(self_attn|compressor|indexer)\.norm\.", r".\1.kv_norm."), (r"\.ape$", ".position_bias"),
    (r"\.w(q_a|q_b|kv|o_a|o_b)\.", r".\1_proj."), (r"\.wgate\.", ".gate_proj."), (r"\.q_norm\.", ".q_a_norm."),
    (r"\.gate\.bias$", ".gate.e_score_correction_bias"), (r"\.shared_experts\.w1\.", ".shared_experts.gate_proj."),
    (r"\.shared_experts\.w3\.", ".shared_experts.up_proj."), (r"\.shared_experts\.w2\.", ".shared_experts.down_proj."),
    *_NUMBERED,
)  # fmt: skip
_RENAMES: Final[Mapping[str, Renames]] = {
    "mixtral": _MIXTRAL, "minimax_m2": _MIXTRAL, "granitemoe": _GRANITE, "lfm2_moe": _NUMBERED, "kimi_linear": _KIMI,
    "deepseek_v4": _V4,
}  # fmt: skip
# model_type -> pattern of the beginning of tensors that belong to MTP layer \1.
_MTP: Final[Mapping[str, str]] = {"deepseek_v4": r"^(?:model\.)?mtp\.(\d+)\."}
# model_type -> (pattern of a parameter's stored parts, the parameter): parts are joined along the first axis, in this order.
_PARTS: Final[Mapping[str, tuple[tuple[str, ...], str]]] = {
    "kimi_linear": (tuple(rf"\.{p}_conv1d\.weight$" for p in "qkv"), ".conv1d.weight"),
}


def joined_parts(
    tensors: Mapping[str, TensorInfo], model_type: Any
) -> tuple[dict[str, TensorInfo], dict[str, list[TensorInfo]]]:
    """The tensors of a checkpoint with parameters instead of their stored parts, and the parts of these parameters.

    Args:
        tensors: by the names of `with_parameter_names`.
        model_type: the family.
    """
    patterns, target = _PARTS.get(model_type, ((), "")) if isinstance(model_type, str) else ((), "")
    whole, parts = dict(tensors), dict[str, list[TensorInfo]]()
    for pattern in patterns:
        for name in [name for name in whole if re.search(pattern, name)]:
            parts.setdefault(re.sub(pattern, target, name), []).append(whole.pop(name))
    for name, infos in parts.items():
        first = infos[0]
        if any((i.dtype, i.shape[1:]) != (first.dtype, first.shape[1:]) for i in infos) or len(infos) < len(patterns):
            raise CheckpointError("is not stored in parts of one kind; download it again", file=first.file, tensor=name)
        shape = (sum(i.shape[0] for i in infos), *first.shape[1:])
        whole[name] = replace(first, name=name, shape=shape, nbytes=sum(i.nbytes for i in infos))
    return whole, parts


def parameter_name(stored: str, model_type: Any) -> str:
    """The name that the model's parameter has, of a tensor in a published checkpoint."""
    for pattern, replacement in _RENAMES.get(model_type, ()) if isinstance(model_type, str) else ():
        stored = re.sub(pattern, replacement, stored)
    return stored


def mtp_as_layer(stored: str, config: Mapping[str, Any]) -> str:
    """The name of a stored tensor, with that of the layer in place of the beginning `mtp.N.` that some families give to tensors
    of MTP layer N. Those layers follow the model's own.

    Args:
        config: the content of config.json.
    """
    family, layers = config.get("model_type"), config.get("num_hidden_layers")
    pattern = _MTP.get(family) if isinstance(family, str) else None
    if pattern is None or not isinstance(layers, int):
        return stored
    return re.sub(pattern, lambda found: f"layers.{layers + int(found[1])}.", stored)


def with_parameter_names(tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> dict[str, TensorInfo]:
    """The tensors of a checkpoint by the names that the model's parameters have.

    Args:
        tensors: by the names that the files have.
        config: the content of config.json.

    Raises:
        CheckpointError: two tensors have the same name then.
    """
    renamed: dict[str, TensorInfo] = {}
    for stored, info in tensors.items():
        name = parameter_name(mtp_as_layer(stored, config), config.get("model_type"))
        if name in renamed:
            raise CheckpointError(
                f"is also stored as {renamed[name].name}; remove one of them", file=info.file, tensor=info.name
            )
        renamed[name] = info
    return renamed
