"""Decoder layers of DeepSeek-V4 with several residual streams (hyper-connections), for training; see `ops.streams`."""

from __future__ import annotations

from functools import partial
from typing import Any, Final

import torch
from torch import nn

from ..ops.streams import doubly_stochastic, read, write
from .linear import is_untouched

_CHILDREN: Final = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm", "attn_hc", "ffn_hc"}


class TrainedHyperConnection(nn.Module):
    """What a block reads from the streams, and the weights by which its output is added to them; a mixin for Transformers'
    class."""

    fn: torch.Tensor
    base: torch.Tensor
    scale: torch.Tensor
    hc_mult: int
    hc_sinkhorn_iters: int
    hc_eps: float
    input_norm: Any

    @staticmethod
    def fits(module: nn.Module) -> bool:
        parameters = {name for name, _ in module.named_parameters()}
        return parameters == {"fn", "base", "scale"} and hasattr(module, "hc_sinkhorn_iters")

    def forward(self, hidden_streams: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """[B, S, n, H] -> post [B, S, n], comb [B, S, n, n] and the block's input [B, S, H]."""
        y, _, post, comb = self.with_streams(hidden_streams)
        return post, comb, y

    def with_streams(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """(the block's input, x, post, comb); the x that is returned is to be used from then on, as in `ops.streams.read`."""
        weights = partial(_block_weights, count=self.hc_mult, steps=self.hc_sinkhorn_iters, eps=self.hc_eps)
        y, streams, post, comb = read(x.flatten(0, 1), self.fn, self.base, self.scale, weights, self.input_norm.eps)
        tokens = x.shape[:2]
        return y.view(*tokens, -1), streams.view_as(x), post.view(*tokens, -1), comb.view(*tokens, *comb.shape[1:])


class TrainedHyperHead(nn.Module):
    """The weighted sum of the streams that the model's last norm takes; a mixin for Transformers' class."""

    hc_fn: torch.Tensor
    hc_base: torch.Tensor
    hc_scale: torch.Tensor
    eps: float
    input_norm: Any

    @staticmethod
    def fits(module: nn.Module) -> bool:
        return {name for name, _ in module.named_parameters()} == {"hc_fn", "hc_base", "hc_scale"}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, S, n, H] -> [B, S, H]."""
        weights = partial(_head_weights, eps=self.eps)
        y, _ = read(x.flatten(0, 1), self.hc_fn, self.hc_base, self.hc_scale, weights, self.input_norm.eps)
        return y.view(*x.shape[:2], -1)


class TrainedStreamLayer(nn.Module):
    """Attention and experts, each with a hyper-connection; a mixin for Transformers' class."""

    self_attn: nn.Module
    mlp: nn.Module
    input_layernorm: nn.Module
    post_attention_layernorm: nn.Module
    attn_hc: nn.Module
    ffn_hc: nn.Module

    @staticmethod
    def fits(module: nn.Module) -> bool:
        return {name for name, _ in module.named_children()} >= _CHILDREN  # MTP layers have more

    def forward(self, hidden_states: torch.Tensor, input_ids: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor:
        """[B, S, n, H] -> [B, S, n, H]."""
        x, *connection = _read(self.attn_hc, hidden_states)
        attended, _ = self.self_attn(self.input_layernorm(x), **kwargs)
        x, *connection = _read(self.ffn_hc, _written(attended, *connection))
        return _written(self.mlp(self.post_attention_layernorm(x), input_ids=input_ids), *connection)


def _read(connection: nn.Module, streams: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(the block's input, streams, post, comb)."""
    if isinstance(connection, TrainedHyperConnection) and is_untouched(connection):
        return connection.with_streams(streams)
    post, comb, x = connection(streams)
    return x, streams, post, comb


def _written(y: torch.Tensor, streams: torch.Tensor, post: torch.Tensor, comb: torch.Tensor) -> torch.Tensor:
    flat = (t.flatten(0, 1) for t in (streams, y.to(streams.dtype), post, comb))
    return write(*flat).view_as(streams)


def _block_weights(
    numbers: torch.Tensor, base: torch.Tensor, scale: torch.Tensor, count: int, steps: int, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(pre [T, n], post [T, n], comb [T, n, n])."""
    parts = zip(*(t.split([count, count, count * count], -1) for t in (numbers, base)), scale.unbind(), strict=True)
    pre, post, comb = (number * factor + bias for number, bias, factor in parts)
    return pre.sigmoid() + eps, 2 * post.sigmoid(), doubly_stochastic(comb.unflatten(-1, (count, count)), steps, eps)


def _head_weights(numbers: torch.Tensor, base: torch.Tensor, scale: torch.Tensor, eps: float) -> tuple[torch.Tensor]:
    return ((numbers * scale + base).sigmoid() + eps,)
