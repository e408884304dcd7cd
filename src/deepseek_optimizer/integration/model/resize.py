"""`resize_token_embeddings` of an optimized model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ...errors import UnsupportedRequestError
from ..bind.graphs import loaded_mtp_layers, whole_graph
from ..bind.instance_method import Replacement
from ..bind.modules import PackedEmbedding, PackedLinear
from ..bind.swap import pack_in_place
from .refuse import RESIZE

_EXACT = ("fp32", "bf16")  # lossless formats


class ResizeTokens(Replacement):
    """`model.resize_token_embeddings`: applies Transformers' method to float copies of the embedding and the head, and packs
    these again in their formats. Earlier caches become invalid.

    Args:
        runtime: the model's runtime.
        bind: binds a plan to the resized model (`bind_plan.bind`).

    Raises:
        UnsupportedRequestError: packing the weights again would round them, the model has MTP layers, or a module was wrapped.
    """

    replaces = "resize_token_embeddings"

    def __init__(self, runtime: Any, bind: Callable[..., Any]) -> None:
        super().__init__(runtime)
        self._bind = bind

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        runtime = self.runtime
        model, call = runtime.model, self.named(args, kwargs)
        if call.get("new_num_tokens") is None and call.get("pad_to_multiple_of") is None:
            return model.get_input_embeddings()
        self._check(model)
        embedding, head = _ends(model)
        by_layer = _layer_embedding(runtime)
        if by_layer is not None:
            model.set_per_layer_input_embeddings(_float_embedding(by_layer))
        table = _float_embedding(embedding)
        model.set_input_embeddings(table)
        if head is not None:
            linear = _float_linear(head)
            if head.weight is embedding.weight:
                linear.weight = table.weight
            model.set_output_embeddings(linear)
        try:
            self._original(model, **call)
        finally:  # after an error, unchanged modules are packed as before
            manifest = runtime.manifest
            pack_in_place(model, whole_graph(model), runtime.config, runtime.backend.pack, manifest.formats())
            model.get_input_embeddings().scale = embedding.scale
            if by_layer is not None:
                model.get_per_layer_input_embeddings().scale = by_layer.scale
            self._bind(model, runtime.config, earlier=manifest, bytes_before=runtime.bytes_before, notes=runtime.notes)
        return model.get_input_embeddings()

    def _check(self, model: Any) -> None:
        if reason := self.runtime.changed():
            raise UnsupportedRequestError(f"the embeddings cannot be resized: {reason}; resize them first")
        if loaded_mtp_layers(model):
            raise UnsupportedRequestError(
                'the embeddings cannot be resized: they are shared with MTP layers; load the model with mtp="off"'
            )
        for module in (*_ends(model), _layer_embedding(self.runtime)):
            if module is not None and module.format not in _EXACT:
                raise UnsupportedRequestError(
                    f"the embeddings cannot be resized: packed as {module.format}, they would be rounded again; {RESIZE}"
                )


def _ends(model: Any) -> tuple[PackedEmbedding, PackedLinear | None]:
    """The packed embedding and, if there is one, the packed head."""
    return model.get_input_embeddings(), type(model).get_output_embeddings(model)


def _layer_embedding(runtime: Any) -> PackedEmbedding | None:
    """The table of embeddings per layer, which Transformers resizes with the other."""
    by_layer = any(node.op == "lookup" for node in runtime.graph.nodes)
    return runtime.model.get_per_layer_input_embeddings() if by_layer else None


def _float_embedding(packed: PackedEmbedding) -> nn.Embedding:
    weight = packed.dequantized(packed.dtype)
    return nn.Embedding.from_pretrained(weight, padding_idx=packed.padding_idx)


def _float_linear(packed: PackedLinear) -> nn.Linear:
    with torch.device("meta"):
        linear = nn.Linear(packed.in_features, packed.out_features, bias=False, dtype=packed.dtype)
    linear.weight = nn.Parameter(packed.dequantized(packed.dtype), requires_grad=False)
    linear.bias = packed.bias
    return linear
