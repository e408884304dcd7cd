"""Training of multi-token prediction (MTP) layers: they are added to a model under their names in checkpoints, and run over
whole texts.

The input of layer k (from 0) at row i is the normed state of the previous layer at row i (for layer 0, that of the model) and
the embedding of token i + k + 1; it predicts token i + k + 2. Embedding and head are the model's (DeepSeek-V3 report, section
2.2). Those of DeepSeek-V4 take all residual streams of a row (`mtp_streams`). Transformers' forward does not run these layers;
`save_pretrained` saves them, and `load_model` uses them for drafts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...checkpoint import Checkpoint, open_checkpoint
from ...checkpoint.stacks import is_stack
from ...errors import ConfigError
from ...integration.attention.transformers_sdpa import create_causal_mask
from ...integration.bind.dtypes import kept_in_fp32
from ...integration.bind.graphs import loaded_mtp_layers
from ...integration.compat import cache_name
from ...integration.load.mtp_layers import add_mtp_layers, own_tensors, save_published_names
from ...integration.load.resolve import resolve
from ...integration.training.modules import attention_name
from ...models import draft_vocab_size, has_mtp, mtp_layers
from ..attention_function import DSO_TRAIN
from ..checkpoints.converted import read_stack
from .mtp_layer import step as advance
from .mtp_streams import has_streams, stream_states

RANDOM = "initialized at random, since no checkpoint contains it"  # source of a layer's weights
_ZERO = ("bias", ".base", "_base", ".sinks")  # ends of the names of vectors that are zero at first; others are one


def add_trained_layers(model: Any) -> list[str]:
    """Adds the MTP layers that a model's config declares. Their weights are read from the model's checkpoint, or initialized at
    random if it has none.

    Returns: for each added layer, a sentence about the source of its weights; empty if the model has MTP layers already.

    Raises:
        ConfigError: the config declares no MTP layers, or more than the checkpoint has with a draft vocabulary; or the model
            has adapters.
        CheckpointError: MTP layers in the checkpoint are incomplete or of another shape; see `stored_mtp_layers`.
    """
    unwrap = getattr(model, "get_base_model", None)
    base = model if unwrap is None else unwrap()
    config = base.config
    if loaded_mtp_layers(base):
        return []
    if base is not model:
        raise ConfigError(
            "mtp_loss_weight is set, but the model has adapters and no MTP layers; new ones would not be saved with the "
            "adapter. Set mtp_loss_weight=None, or use a model with MTP layers (load_model loads those of a checkpoint)"
        )
    if not (count := mtp_layers(config)):
        remedy = ", or config.num_nextn_predict_layers before the model is created" if has_mtp(config.model_type) else ""
        raise ConfigError(
            f"mtp_loss_weight is set, but this {config.model_type} model has no multi-token prediction layers; set "
            f"mtp_loss_weight=None{remedy}"
        )
    source = str(getattr(config, "name_or_path", "") or "")
    if not source or not _is_checkpoint(source):
        config.draft_vocab_size = None
        return _attach(model, [frozenset()] * count, None)
    with open_checkpoint(resolve(source)) as checkpoint:
        own = own_tensors(checkpoint, config)
        if own and len(own) < count and draft_vocab_size(config) is not None:
            raise ConfigError(
                f"config.num_nextn_predict_layers is {count}, but {checkpoint.path} has only {len(own)} such layers, and a new "
                f"one would have no draft vocabulary (config.draft_vocab_size); set it to {len(own)}"
            )
        if not own:
            config.draft_vocab_size = None  # of layers that were dropped
        return _attach(model, [*own, *[frozenset()] * (count - len(own))], checkpoint if own else None, len(own))


def _is_checkpoint(source: str) -> bool:
    path = Path(source)
    return not path.exists() or any(path.glob("*.safetensors")) or path.suffix == ".gguf"


def _attach(model: Any, own: list[Any], checkpoint: Checkpoint | None, stored: int = 0) -> list[str]:
    first, exact = model.model.layers[0].input_layernorm.weight, _exact(model)
    add_mtp_layers(model, own, model.dtype if exact.search(".input_layernorm.weight") else first.dtype)
    save_published_names(model)
    sources = []
    for depth, layer in enumerate(model.model.layers[model.config.num_hidden_layers :]):
        layer.to_empty(device=first.device).train(model.training)
        if checkpoint is not None and depth < stored:
            _read(layer, checkpoint, model.config, depth, exact)
            sources.append(f"MTP layer {depth}: read from {checkpoint.path}")
        else:
            _initialize(layer, model.config.initializer_range, exact)
            sources.append(f"MTP layer {depth}: {RANDOM}")
    return sources


def _exact(model: Any) -> re.Pattern[str]:
    """Matches the names of tensors that are always fp32: those that the model's class lists, and what makes discrete choices.
    With residual streams, Transformers' routers compute in the dtype of their input."""
    choices = ["e_score_correction_bias", *([] if has_streams(model) else [".mlp.gate.weight"])]
    return re.compile("|".join([kept_in_fp32(model, torch.bfloat16).pattern, *map(re.escape, choices)]))


@torch.no_grad()
def _initialize(layer: nn.Module, deviation: float, exact: re.Pattern[str]) -> None:
    """Initializes a layer as Transformers does."""
    for name, tensor in _tensors(layer, exact):
        if tensor.ndim > 1:
            tensor.normal_(0.0, deviation)
        else:
            tensor.fill_(0.0 if name.endswith(_ZERO) else 1.0)


@torch.no_grad()
def _read(layer: nn.Module, checkpoint: Checkpoint, config: Any, depth: int, exact: re.Pattern[str]) -> None:
    prefix = f"model.layers.{config.num_hidden_layers + depth}."
    for name, tensor in _tensors(layer, exact):
        if is_stack(prefix + name) and prefix + name not in checkpoint.tensors:
            read_stack(checkpoint, prefix + name, tensor)
        else:
            read = checkpoint.read(prefix + name)
            checkpoint.check_finite(prefix + name, read)
            tensor.copy_(read)


def _tensors(layer: nn.Module, exact: re.Pattern[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and buffers; converts those whose names match `exact` to fp32."""
    for name, tensor in (*layer.named_parameters(), *layer.named_buffers()):
        if tensor.is_floating_point() and exact.search(f".{name}"):
            tensor.data = tensor.data.float()
        yield name, tensor.data


def mtp_states(
    model: Any,
    hidden: torch.Tensor,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    steps: int | None = None,
    then: Callable[[int, int, Any, torch.Tensor], Any] | None = None,
) -> Iterator[tuple[int, nn.Module, Any]]:
    """Yields the depth of each MTP layer, the layer, and its normed states [B, S, H] or what `then` returns for them, in order.

    States at rows whose token lies after the end of the row or text are meaningless; no earlier row attends to them.

    Args:
        hidden: [B, S, H], the model's last hidden state, normed; or its streams [B, S, n, H], see `mtp_streams.DraftStates`.
        input_ids: int64 [B, S].
        attention_mask, position_ids: as passed to the model.
        steps: number of states; if there are fewer layers, the last one is applied again to its own states, each row to that of
            the row before, as in `engine.speculative.mtp`: it attends to what it computed from the model's states, and after
            these to what it computed from its own. None, as always with streams: one for each layer.
        then: called with the number of states before, depth, layer and states, while all weights of the layer are there: with
            FSDP2, those of its own head are not there any more when the states are yielded.
    """
    decoder, config = model.get_decoder(), model.config
    if position_ids is None:
        position_ids = torch.arange(hidden.shape[1], device=hidden.device, dtype=torch.int64)[None]
    if has_streams(model):
        assert steps is None  # `dso draft` refuses these families
        yield from stream_states(model, hidden, input_ids, attention_mask, position_ids, then)
        return
    where = {"config": config, "inputs_embeds": hidden, "attention_mask": attention_mask, "position_ids": position_ids}
    indexed = {"allow_is_causal_skip": False} if hasattr(config, "index_topk") else {}  # indexers need the mask itself
    mask = create_causal_mask(**where, **indexed, **{cache_name(): None})
    rotation = decoder.rotary_emb(hidden, position_ids)
    embedded, state = decoder.embed_tokens(input_ids), hidden
    layers = decoder.layers[config.num_hidden_layers :]
    steps = len(layers) if steps is None else steps
    passes = _Passes()
    for step in range(steps):
        depth = min(step, len(layers) - 1)
        layer = layers[depth]
        if step > depth:
            state = state.roll(1, 1)
        attending: dict[str, Any] = {"attention_mask": mask}
        if depth + 1 == len(layers) < steps:  # several passes
            layer.gradient_checkpointing = False  # it would drop the keys and values of earlier passes
            seen = pass_mask(position_ids, attention_mask, step - depth)
            attending = {"attention_mask": _for_attention(seen, layer, state.dtype), cache_name(): passes}
        inputs = {"position_ids": position_ids, "position_embeddings": rotation, "use_cache": False, **attending}
        following = input_ids if hasattr(layer, "embed_tokens") else embedded
        state, result = advance(
            layer, state, following, depth, None if then is None else partial(then, step, depth, layer), **inputs
        )
        yield depth, layer, result


class _Passes:
    """Keys and values of the passes of a layer over its rows, and the keys of its indexer (DeepSeek-V3.2), in place of
    Transformers' cache."""

    def __init__(self) -> None:
        self._keys: list[torch.Tensor] = []
        self._values: list[torch.Tensor] = []
        self._index_keys: list[torch.Tensor] = []

    def update(self, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds those of a pass, [B, heads, S, D]; returns all, [B, heads, passes * S, D]."""
        self._keys.append(key)
        self._values.append(value)
        return torch.cat(self._keys, 2), torch.cat(self._values, 2)

    def update_indexer(self, key: torch.Tensor, *_: Any) -> torch.Tensor:
        """Adds the indexer's of a pass, [B, S, D]; returns all, [B, passes * S, D]."""
        self._index_keys.append(key)
        return torch.cat(self._index_keys, 1)


def pass_mask(position_ids: torch.Tensor, attention_mask: torch.Tensor | None, passes: int) -> torch.Tensor:
    """bool [B, 1, S, (passes + 1) S]: the rows of earlier passes of a layer and of this one that its rows attend to.

    Row i of a pass has the state that the pass before computed at row i - 1. So of the first pass, which has the model's
    states, it attends to rows up to i - passes, and then to one row of each pass: those that its state was computed from, and
    itself.

    Args:
        position_ids: int64 [B, S] or [1, S].
        attention_mask: [B, S], 0 for padding; None: there is none.
        passes: number of passes before.
    """
    places = torch.arange(position_ids.shape[1], device=position_ids.device, dtype=torch.int64)
    behind = places[:, None] - places  # of a row, how many rows after each of the others
    begin = places - position_ids  # of each row's text
    first = (behind >= passes) & (begin[:, :, None] == begin[:, None])
    if attention_mask is not None:
        first &= attention_mask[:, None].bool()
    own = [(behind == passes - n)[None].expand_as(first) for n in range(1, passes + 1)]
    if not passes:
        first = first | (behind == 0)  # padding attends to itself: no row may be empty
    return torch.cat((first, *own), -1)[:, None]


def _for_attention(seen: torch.Tensor, layer: Any, dtype: torch.dtype) -> torch.Tensor:
    """A boolean mask in the form that a layer's attention function takes: `eager` adds the mask to the scores.

    Raises:
        ConfigError: the attention function takes no mask of pairs of tokens.
    """
    name = attention_name(layer.self_attn.config)
    if name in ("sdpa", DSO_TRAIN):
        return seen
    if name in (None, "eager"):
        return torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
    raise ConfigError(f'attn_implementation={name!r} cannot train several drafts of a layer; use "sdpa" or "eager"')


def head_of(layer: Any, model: Any) -> nn.Module:
    """The head of an MTP layer: its own if it has one, else the model's."""
    own = getattr(layer.shared_head, "head", None)
    head: nn.Module = model.get_output_embeddings() if own is None else own
    return head
