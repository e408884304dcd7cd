"""Multi-token prediction layers that are trained: hung on a model under the names that checkpoints have, and run over whole
texts.

Layer k (from 0) has at row i the previous layer's normed state of row i (the model's own, for layer 0) and the embedding of
token i + k + 1, and predicts token i + k + 2; embedding and head are the model's (DeepSeek-V3's report, section 2.2).
Transformers' forward runs `num_hidden_layers` layers and leaves these alone; `save_pretrained` writes them, and `load_model`
drafts with them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...checkpoint import Checkpoint, open_checkpoint
from ...checkpoint.stacks import is_stack
from ...errors import ConfigError
from ...integration.attention.transformers_sdpa import create_causal_mask
from ...integration.bind.graphs import loaded_mtp_layers
from ...integration.compat import cache_name
from ...integration.load.mtp_layers import add_mtp_layers, own_tensors
from ...integration.load.resolve import resolve
from ...models import mtp_layers
from ..checkpoints.experts import read_stack

_EXACT = (".mlp.gate.weight", ".e_score_correction_bias")  # kept in fp32 whatever the rest is in: they decide, not compute


def add_trained_layers(model: Any) -> list[str]:
    """Hangs the MTP layers that a model's config promises on it: read from the checkpoint that it came from, or drawn at random
    where that has none.

    Returns: for each layer where its weights are from, for reports; none if there were layers already.

    Raises:
        ConfigError: the config promises none.
        CheckpointError: the checkpoint's layers are half there or of another shape, as `stored_mtp_layers` has it.
    """
    wraps = getattr(model, "get_base_model", None)
    base = model if wraps is None else wraps()
    if loaded_mtp_layers(base):
        return []
    config = base.config
    if base is not model:
        raise ConfigError(
            "mtp_loss_weight is set, but the model has adapters and no MTP layers: those would be trained and not saved with "
            "the adapter; leave mtp_loss_weight=None, or take a model that has them (load_model keeps a checkpoint's)"
        )
    if not (count := mtp_layers(config)):
        raise ConfigError(
            f"mtp_loss_weight is set, but config.num_nextn_predict_layers of this {config.model_type} model promises no layers "
            "for multi-token prediction; leave mtp_loss_weight=None, or set the field before the model is made"
        )
    source = str(getattr(config, "name_or_path", "") or "")
    if not source or not _is_checkpoint(source):
        return _hang(model, [frozenset()] * count, None)
    with open_checkpoint(resolve(source)) as checkpoint:
        own = own_tensors(checkpoint, config)
        return _hang(model, [*own, *[frozenset()] * (count - len(own))], checkpoint if own else None, len(own))


def _is_checkpoint(source: str) -> bool:
    path = Path(source)
    return not path.exists() or any(path.glob("*.safetensors")) or path.suffix == ".gguf"


def _hang(model: Any, own: list[Any], checkpoint: Checkpoint | None, stored: int = 0) -> list[str]:
    first = model.model.layers[0].input_layernorm.weight
    add_mtp_layers(model, own, first.dtype)
    said = []
    for depth, layer in enumerate(model.model.layers[model.config.num_hidden_layers :]):
        layer.to_empty(device=first.device).train(model.training)
        if checkpoint is not None and depth < stored:
            _read(layer, checkpoint, model.config, depth)
            said.append(f"MTP layer {depth}: read from {checkpoint.path}")
        else:
            _draw(layer, model.config.initializer_range)
            said.append(f"MTP layer {depth}: drawn at random, for there is none in a checkpoint")
    return said


@torch.no_grad()
def _draw(layer: nn.Module, deviation: float) -> None:
    """As Transformers draws a model's own layers."""
    for name, tensor in _tensors(layer):
        if tensor.ndim > 1:
            tensor.normal_(0.0, deviation)
        else:
            tensor.fill_(0.0 if name.endswith("bias") else 1.0)


@torch.no_grad()
def _read(layer: nn.Module, checkpoint: Checkpoint, config: Any, depth: int) -> None:
    prefix = f"model.layers.{config.num_hidden_layers + depth}."
    for name, tensor in _tensors(layer):
        if is_stack(prefix + name) and prefix + name not in checkpoint.tensors:
            read_stack(checkpoint, prefix + name, tensor)
        else:
            read = checkpoint.read(prefix + name)
            checkpoint.check_finite(prefix + name, read)
            tensor.copy_(read)


def _tensors(layer: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and buffers, those of `_EXACT` made fp32."""
    for name, tensor in (*layer.named_parameters(), *layer.named_buffers()):
        if f".{name}".endswith(_EXACT):
            tensor.data = tensor.data.float()
        yield name, tensor.data


def mtp_states(
    model: Any,
    hidden: torch.Tensor,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
) -> Iterator[tuple[nn.Module, torch.Tensor]]:
    """Each MTP layer with its normed states [B, S, H], in their order.

    Rows whose token lies behind the end of the row or text hold nothing of use; no row before them sees them.

    Args:
        hidden: [B, S, H], the model's last hidden state, normed.
        input_ids: int64 [B, S].
        attention_mask, position_ids: as the model itself was given them.
    """
    decoder, config = model.get_decoder(), model.config
    if position_ids is None:
        position_ids = torch.arange(hidden.shape[1], device=hidden.device, dtype=torch.int64)[None]
    where = {"config": config, "inputs_embeds": hidden, "attention_mask": attention_mask, "position_ids": position_ids}
    mask = create_causal_mask(**where, **{cache_name(): None})
    turns = decoder.rotary_emb(hidden, position_ids)
    embedded, state = decoder.embed_tokens(input_ids), hidden
    for depth, layer in enumerate(decoder.layers[config.num_hidden_layers :]):
        following = layer.embed_tokens(input_ids) if hasattr(layer, "embed_tokens") else embedded
        both = torch.cat((layer.enorm(following.roll(-(depth + 1), 1)), layer.hnorm(state)), -1)
        state = layer(
            layer.eh_proj(both), attention_mask=mask, position_ids=position_ids, position_embeddings=turns, use_cache=False
        )
        state = layer.shared_head.norm(state)
        yield layer, state


def head_of(layer: Any, model: Any) -> nn.Module:
    """The module whose weight makes logits of an MTP layer's states: the model's, unless the layer has its own."""
    own = getattr(layer.shared_head, "head", None)
    found: nn.Module = model.get_output_embeddings() if own is None else own
    return found
