"""Multi-token prediction layers in checkpoints: `model.layers.{num_hidden_layers + depth}.*`, complete or absent."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange, WeightRenaming

from ...checkpoint import Checkpoint
from ...errors import CheckpointError
from ...graph.analysis import stack_shapes, weight_shapes
from ...models import build_mtp_graph, draft_vocab_size, mtp_layers
from ..bind.graphs import DRAFT_TOKENS, HEAD, SHARED


class DecoderLayers(nn.ModuleList):
    """A model's layers, of which iteration yields those before its MTP layers only: Transformers' forward of DeepSeek-V4 runs
    all that it gets, while those of other families stop at `num_hidden_layers`.

    Args:
        modules: the layers.
        count: number of those before the MTP layers; None: there are no MTP layers.
    """

    def __init__(self, modules: Iterable[nn.Module] | None = None, count: int | None = None) -> None:
        super().__init__(modules)
        self.count = count

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(list(self._modules.values())[: self.count])


def stored_mtp_layers(checkpoint: Checkpoint, config: Any) -> list[list[str]]:
    """The tensor names of each MTP layer in a checkpoint, by depth. Names and shapes are checked; no tensor is read.

    Checkpoints written by Transformers contain none, even if their config announces some. A layer requires those before it.

    Args:
        checkpoint: the checkpoint.
        config: a Transformers config object, or the content of a config.json.

    Raises:
        CheckpointError: a layer is incomplete, or a tensor's shape does not match the config; the message names the tensor.
    """
    layers: int = (config if isinstance(config, dict) else config.to_dict())["num_hidden_layers"]
    prefixes = [f"model.layers.{layers + depth}." for depth in range(mtp_layers(config))]
    have = [depth for depth, prefix in enumerate(prefixes) if any(name.startswith(prefix) for name in checkpoint.tensors)]
    return [_layer(checkpoint, config, depth, prefixes[depth]) for depth in range(max(have, default=-1) + 1)]


def _layer(checkpoint: Checkpoint, config: Any, depth: int, prefix: str) -> list[str]:
    with torch.device("cpu"):  # from_pretrained calls this inside a context that makes every tensor a meta tensor
        graph = build_mtp_graph(config, depth)
    shapes = weight_shapes(graph) | stack_shapes(graph)
    shared = {f"{prefix}{leaf}" for leaf in SHARED}
    if (size := draft_vocab_size(config)) is not None:
        shapes[f"{prefix}{DRAFT_TOKENS}"] = (size,)
        shared.remove(f"{prefix}{HEAD}")
    tensors = []
    for name, shape in shapes.items():
        for tensor, expected in checkpoint.stored(name, shape).items():
            if tensor not in checkpoint.tensors:
                if tensor in shared or not tensor.startswith(prefix):
                    continue
                raise CheckpointError(
                    f"lacks {tensor}, but contains others of MTP layer {depth}; download it again, or set "
                    "num_nextn_predict_layers to 0 and remove that layer's tensors",
                    file=checkpoint.path,
                    tensor=tensor,
                )
            if checkpoint.shape(tensor) != expected:
                raise CheckpointError(
                    f"has shape {checkpoint.shape(tensor)}, but the config requires {expected}",
                    file=checkpoint.info(tensor).file,
                    tensor=tensor,
                )
            tensors.append(tensor)
    return tensors


def own_tensors(checkpoint: Checkpoint, config: Any) -> list[frozenset[str]]:
    """For each MTP layer in the checkpoint, the weights of `SHARED` that differ from the model's, so that the layer needs its
    own. Published checkpoints repeat the model's embedding and head in the layer; these are loaded once.

    Raises:
        CheckpointError: as in `stored_mtp_layers`.
    """
    layers = stored_mtp_layers(checkpoint, config)
    count: int = config.num_hidden_layers
    tied = {"lm_head.weight": "model.embed_tokens.weight"} if "lm_head.weight" not in checkpoint.tensors else {}
    return [
        frozenset(
            leaf
            for leaf, name in SHARED.items()
            if f"model.layers.{count + depth}.{leaf}" in tensors
            and not same_tensor(checkpoint, f"model.layers.{count + depth}.{leaf}", tied.get(name, name))
        )
        for depth, tensors in enumerate(layers)
    ]


def same_tensor(checkpoint: Checkpoint, one: str, other: str) -> bool:
    """Whether two stored tensors are equal, compared by panels of rows."""
    a, b = checkpoint.info(one), checkpoint.info(other)
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    rows = a.shape[0] if a.shape else 0
    step = max(1, (1 << 21) // max(1, a.nbytes // max(rows, 1)))
    ends = ((begin, min(begin + step, rows)) for begin in range(0, rows, step))
    return all(torch.equal(checkpoint.read_rows(one, *at), checkpoint.read_rows(other, *at)) for at in ends)


def add_mtp_layers(model: Any, own: list[frozenset[str]], dtype: torch.dtype | None = None) -> None:
    """Appends empty MTP layers to a model on the meta device, after its decoder layers, with the names used in checkpoints.
    Transformers' forward does not run them.

    Args:
        model: the model, on the meta device.
        own: one set for each layer, from `own_tensors`.
        dtype: dtype of the parameters; None: torch's default.
    """
    if not own:
        return
    config, layers = model.config, model.model.layers
    first = type(layers[0])
    norm = type(layers[0].input_layernorm)
    count, streams = config.num_hidden_layers, getattr(model.model, "hc_head", None)
    extended = copy.deepcopy(config)
    if hasattr(config, "first_k_dense_replace"):  # all MTP layers have experts
        extended.first_k_dense_replace = 0
    kind_of = {"mlp_layer_types": "sparse", "layer_types": "full_attention"}
    if streams is not None:
        layers = model.model.layers = DecoderLayers(layers, count)
        kind_of = {"mlp_layer_types": "moe", "layer_types": "sliding_attention"}
    for name, kind in kind_of.items():
        if (kinds := getattr(config, name, None)) is not None:
            setattr(extended, name, [*kinds, *[kind] * len(own)])
    with torch.device("meta"):
        for depth, leaves in enumerate(own):
            layer: Any = first(extended, count + depth)
            hidden = config.hidden_size
            layer.enorm, layer.hnorm = (norm(hidden, eps=config.rms_norm_eps) for _ in range(2))
            if streams is None:
                layer.eh_proj = nn.Linear(2 * hidden, hidden, bias=False)
            else:
                layer.e_proj, layer.h_proj = (nn.Linear(hidden, hidden, bias=False) for _ in range(2))
                layer.hc_head = type(streams)(config)
            layer.shared_head = nn.Module()
            layer.shared_head.norm = norm(hidden, eps=config.rms_norm_eps)
            if "embed_tokens.weight" in leaves:
                layer.embed_tokens = nn.Embedding(config.vocab_size, hidden)
            if HEAD in leaves:
                add_head(layer, hidden, config.vocab_size, draft_vocab_size(config))
            layers.append(layer if dtype is None else layer.to(dtype))


def add_head(layer: Any, hidden: int, vocab_size: int, draft_vocab_size: int | None) -> None:
    """Adds an own head to an MTP layer, and the tokens of its draft vocabulary if it has one."""
    layer.shared_head.head = nn.Linear(hidden, draft_vocab_size or vocab_size, bias=False)
    if draft_vocab_size is not None:
        device = layer.shared_head.head.weight.device
        layer.shared_head.register_buffer("tokens", torch.empty(draft_vocab_size, dtype=torch.int64, device=device))


def renamings(config: Any) -> list[WeightRenaming]:
    """Transformers' renamings of tensors of DeepSeek-V4's MTP layers, which published checkpoints call `mtp.N.*`: to be applied
    after those of the decoder layers, which rename every `norm`."""
    if config.model_type != "deepseek_v4":
        return []
    pairs = [
        (rf"mtp\.{depth}\.{stored}", f"layers.{config.num_hidden_layers + depth}.{own}")
        for depth in range(mtp_layers(config))
        for stored, own in ((r"kv_norm\.", "shared_head.norm."), ("hc_head_", "hc_head.hc_"), ("", ""))
    ]
    return [WeightRenaming(source_patterns=pattern, target_patterns=target) for pattern, target in pairs]


def save_published_names(model: Any) -> None:
    """Lets `save_pretrained` give the tensors of a model's MTP layers their published names, where those are not the layers'
    own. Transformers knows these names, and ignores the tensors."""
    if not (more := renamings(model.config)):
        return
    given = getattr(model, "_weight_conversions", None)
    if given is None:  # not loaded: as in Transformers' `revert_weight_conversion`
        default = get_model_conversion_mapping(model, add_legacy=False)
        given = [conversion for conversion in default if not isinstance(conversion, PrefixChange)]
    model._weight_conversions = [*given, *reversed(more)]  # saving goes through them from the end, and the last matches all


def ignored_keys(config: Any) -> set[str]:
    """Name patterns of MTP tensors in checkpoints: Transformers must not report them as unexpected, loaded or not."""
    return {rf"(^|\.)layers\.{config.num_hidden_layers + depth}\." for depth in range(mtp_layers(config))}
