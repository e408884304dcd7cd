"""The forward of an optimized model: the plan if it can serve a call, otherwise Transformers' own forward over packed modules.

It is set on the model instance; classes and Transformers itself are unchanged.

The plan returns the same as Transformers, with three differences. Logits are float32 whatever the model's dtype, since rounding
to bf16 would turn near ties into ties. Padding is not computed: its logits and hidden states are zero. There are no gradients:
if they are needed, Transformers' forward runs.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
import torch

from ...backends.base import DECODE, PREFILL, Int32
from ...errors import UnsupportedRequestError
from ...graph.analysis import dynamic_rope
from ...graph.ir import RowsSpec
from ...models import traits
from ..bind.instance_method import PLANNED, Replacement
from ..compat import cache_name, chosen_hidden, output_class, take_cache
from ..generation.cache import Bool, PagedCache, PagedState
from ..generation.steps import Columns, documents_of, run_columns
from .embedded_ids import embedded_ids

_LOSS_ARGUMENTS = {"num_items_in_batch", "shift_labels", "ignore_index"}
_SERVED = {
    "input_ids", "attention_mask", "position_ids", "inputs_embeds", "labels", "use_cache", "logits_to_keep",
    "output_hidden_states", "output_attentions", "return_dict", *_LOSS_ARGUMENTS,
}  # fmt: skip
_NO_CACHE = "start again without a cache, or pass a transformers.DynamicCache() from the first call on"


class PlanForward(Replacement):
    """`model.forward`, with the arguments of the class's forward.

    Raises:
        ValueError: an argument has a wrong shape, dtype or value.
        UnsupportedRequestError: the call has a PagedCache, but the plan cannot serve it.
    """

    replaces = "forward"

    @torch.compiler.disable(reason=PLANNED)
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = self.named(args, kwargs)
        cache = take_cache(call)
        reason = self.why_not(call, cache)
        if reason is None:
            return self._planned(call, cache)
        self.refuse(reason, cache)
        return self._original(self.runtime.model, **call, **({} if cache is None else {cache_name(): cache}))

    def refuse(self, reason: str, cache: Any) -> None:
        """Warns that Transformers' own forward runs, and why.

        Raises:
            UnsupportedRequestError: the call has a PagedCache.
        """
        if isinstance(cache, PagedCache):
            raise UnsupportedRequestError(
                f"the plan cannot serve this call ({reason}), and a PagedCache can be used only by the plan; {_NO_CACHE}"
            )
        mode = self.runtime.config.attention.kind
        effects = f" and without {mode} attention: every token attends to all before it" if self.runtime.in_mode else ""
        effects += "; dynamic RoPE follows the length of each call" if dynamic_rope(self.runtime.graph) else ""
        self.runtime.warn_once(
            f"{reason}: such calls run Transformers' own forward over the packed modules, which is slower{effects}"
        )

    def why_not(self, call: dict[str, Any], cache: Any) -> str | None:
        """Why the plan cannot serve this call; None if it can."""
        model, config = self.runtime.model, self.runtime.model.config
        for name, value in call.items():
            if name not in _SERVED and value is not None and value is not False:
                return f"argument {name!r} is given"
        if call.get("output_attentions") or (call.get("output_attentions") is None and config.output_attentions):
            return "output_attentions is requested"
        states = call.get("output_hidden_states")
        if (config.output_hidden_states if states is None else states) and self.runtime.graph.hidden_states == 1:
            return "output_hidden_states is requested, and layers have several residual streams"
        if getattr(config, "output_router_logits", False) and call.get("output_router_logits") is None:
            return "config.output_router_logits is true"
        if call.get("is_causal", getattr(config, "is_causal", None)) is False:
            return "is_causal is False, so tokens attend to later ones"
        if reason := self.runtime.unserved():
            return reason
        mask, embeds = call.get("attention_mask"), call.get("inputs_embeds")
        if mask is not None and (not isinstance(mask, torch.Tensor) or mask.ndim != 2):
            return "attention_mask is not a 2-D tensor"
        if cache is not None and not (isinstance(cache, PagedCache) and cache.state.arena is self.runtime.arena):
            return f"the cache is a {type(cache).__name__} that does not belong to this model's plan"
        positions = call.get("position_ids")
        if positions is not None and (positions.ndim != 2 or positions.is_floating_point()):
            return "position_ids is not a 2-D tensor of integers"
        graph = self.runtime.graph
        compresses = isinstance(graph.cache, RowsSpec)
        if (graph.states or compresses) and cache is None and mask is None and positions is not None:
            if bool((positions.diff(dim=1) != 1).any()):
                layers = "compressed attention does" if compresses else "recurrent layers do"
                return f"rows pack several documents, which Transformers' {layers} not separate"
        if compresses and positions is not None and not self._counted(call, cache, positions):
            return "position_ids do not count the tokens of each row from 0, as compressed entries do"
        if model.training and getattr(config, "attention_dropout", 0.0):
            return "the model is in training mode and has dropout"
        if torch.is_grad_enabled() and ((embeds is not None and embeds.requires_grad) or trainable(model)):
            return "gradients are needed"
        return None

    def _counted(self, call: dict[str, Any], cache: PagedCache | None, positions: torch.Tensor) -> bool:
        """Whether each real token's position is its number in its row."""
        source: Any = call.get("inputs_embeds") if call.get("input_ids") is None else call["input_ids"]
        if not isinstance(source, torch.Tensor) or source.ndim < 2 or 0 in source.shape:
            return True  # refused later, with its own error
        rows, q = source.shape[:2]
        state = None if cache is None else cache.state
        kept = _kept(state, call.get("attention_mask"), rows, q)
        same = positions[:, -q:].cpu().numpy() == _numbers(state, kept, rows, q)
        return bool((same if kept is None else same | ~kept).all())

    def _planned(self, call: dict[str, Any], cache: PagedCache | None) -> Any:
        runtime, config = self.runtime, self.runtime.model.config
        ids, embeds = call.get("input_ids"), call.get("inputs_embeds")
        if (ids is None) == (embeds is None):
            raise ValueError("pass exactly one of input_ids and inputs_embeds")
        source: Any = embeds if ids is None else ids
        if not isinstance(source, torch.Tensor):
            raise ValueError(f"the prompt must be a tensor of token ids [batch, tokens], got {type(source).__name__}")
        if source.ndim != (2 if embeds is None else 3) or 0 in source.shape:
            raise ValueError(
                f"the prompt is empty or has a wrong shape {tuple(source.shape)}; pass ids [batch, tokens], at least one token"
            )
        if embeds is None and (source.is_floating_point() or source.dtype == torch.bool):
            raise ValueError(f"token ids must be integers, got {source.dtype}")
        use_cache = call.get("use_cache")
        keep_cache = cache is not None or (config.use_cache if use_cache is None else use_cache)
        if keep_cache and cache is None:
            cache = PagedCache(runtime.model)
        state = cache.state if cache is not None else PagedState(runtime.arena)
        requested = call.get("output_hidden_states")
        requested = config.output_hidden_states if requested is None else requested
        new = self._columns(state, ids, embeds, call, bool(requested))
        masked = cache is not None or call.get("attention_mask") is not None
        if not masked and traits(config).separates_documents:  # as in Transformers: only then may rows pack documents
            new.documents = documents_of(new.positions)
        if not state.sequences:
            state.start(source.shape[0] if new.documents is None else len(new.sequences()))
        elif len(state.sequences) != source.shape[0]:
            raise ValueError(
                f"the cache has {len(state.sequences)} sequences, but the call has {source.shape[0]} rows; pass a new cache"
            )
        logits, hidden = run_columns(runtime, state, new)
        state.steps += 1
        if hidden is not None:
            hidden = hidden.to(source.device, runtime.model.dtype)
        states = None
        if hidden is not None and new.hidden:
            states = _tuple_of(hidden, chosen_hidden(requested, runtime.graph.hidden_states))
        output = self._output(call, new, logits.to(source.device), hidden, states, cache if keep_cache else None)
        return_dict = call.get("return_dict")
        return output if (config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    def _output(self, call: dict[str, Any], new: Columns, logits: torch.Tensor, hidden: Any, states: Any, cache: Any) -> Any:
        """The output object. `hidden`: the plan's hidden states; `states`: the tuple of those that the caller requested."""
        if isinstance(keep := call.get("logits_to_keep", 0), torch.Tensor):
            logits = logits[:, torch.from_numpy(np.searchsorted(new.wanted, _columns_of(keep, new.positions.shape[1])))]
        fields = {"loss": self._loss(logits, call), "logits": logits, "hidden_states": states, cache_name(): cache}
        return output_class(self.runtime.model)(**fields)

    def _wanted(self, call: dict[str, Any], q: int) -> Any:
        """The columns whose logits are computed, ascending."""
        keep = call.get("logits_to_keep", 0)
        if isinstance(keep, torch.Tensor):
            return np.unique(_columns_of(keep, q))
        return np.arange(q)[slice(-keep, None)]  # as in Transformers: a negative number leaves out the first columns

    def _columns(self, state: PagedState, ids: Any, embeds: Any, call: dict[str, Any], hidden: bool) -> Columns:
        """The call's arguments, checked and converted to numpy."""
        graph = self.runtime.graph
        rows, q = (embeds if ids is None else ids).shape[:2]
        ids32 = None
        if ids is None and graph.looks_up:
            known = call.get("ids_of_layers")
            ids = embedded_ids(self.runtime.model, embeds) if known is None else known
        if ids is not None:
            ids32 = ids.detach().cpu().numpy()
            low, high = int(ids32.min()), int(ids32.max())
            if low < 0 or high >= graph.vocab_size:
                raise ValueError(
                    f"token id {low if low < 0 else high} is outside the vocabulary of {graph.vocab_size}; "
                    "use the tokenizer that belongs to this model"
                )
            ids32 = ids32.astype(np.int32)
        wanted, kept = self._wanted(call, q), _kept(state, call.get("attention_mask"), rows, q)
        given = call.get("position_ids")
        if given is None and isinstance(graph.cache, RowsSpec):
            positions = _numbers(state, kept, rows, q)
        elif given is None:
            positions = np.broadcast_to(np.arange(state.columns, state.columns + q, dtype=np.int32), (rows, q))
        else:
            positions = np.broadcast_to(given[:, -q:].cpu().numpy().astype(np.int32), (rows, q))
        low, high = int(positions.min()), int(positions.max())
        if low < 0 or high >= graph.max_positions:
            raise ValueError(
                f"position {low if low < 0 else high} is outside the model's context of {graph.max_positions} tokens; "
                "shorten the prompt, request fewer new tokens, or load the model with context_extension"
            )
        return Columns(ids32, embeds, positions, kept, wanted, self._phase(state, q), hidden)

    def _phase(self, state: PagedState, q: int) -> int:
        """DECODE for single tokens and for the verification of drafts, PREFILL for all other calls."""
        return DECODE if q == 1 or state.verifies or self.runtime.config.batch_invariant else PREFILL

    def _loss(self, logits: torch.Tensor, call: dict[str, Any]) -> torch.Tensor | None:
        if call.get("labels") is None:
            return None
        model = self.runtime.model
        extra = {name: call[name] for name in _LOSS_ARGUMENTS if call.get(name) is not None}
        loss: torch.Tensor = model.loss_function(
            logits=logits, labels=call["labels"], vocab_size=model.config.vocab_size, **extra
        )
        return loss


def _kept(state: PagedState | None, mask: torch.Tensor | None, rows: int, q: int) -> Bool | None:
    """Which new columns hold a real token, bool [rows, q]; None: all.

    `mask` also covers the cached columns, for which it must not differ from the earlier masks.
    """
    if mask is None:
        return None
    cached = 0 if state is None else state.columns
    if mask.shape != (rows, cached + q):
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)}; with {cached} cached tokens it must be {(rows, cached + q)}"
        )
    if mask.is_floating_point() and mask.isnan().any():
        raise ValueError("attention_mask contains NaN; use 1 for a token and 0 for padding")
    kept = mask.cpu().numpy() != 0
    past = kept[:, :cached]
    if not (past.all() if state is None or state.kept is None else (past == state.kept).all()):
        raise UnsupportedRequestError(
            f"attention_mask differs from the one that the cached tokens were computed with; {_NO_CACHE}"
        )
    new = kept[:, cached:]
    return None if new.all() else new


def _numbers(state: PagedState | None, kept: Bool | None, rows: int, q: int) -> Int32:
    """The number of each new column's token in its row, from 0, int32 [rows, q]; of padding that of the token before, at least
    0."""
    before = np.zeros(rows, np.int32)
    if state is not None and state.sequences:
        before[:] = [sequence.tokens for sequence in state.sequences]
    new = np.ones((rows, q), np.int32) if kept is None else kept.astype(np.int32)
    return (before[:, None] + new.cumsum(1, dtype=np.int32) - 1).clip(min=0)


def _columns_of(index: torch.Tensor, q: int) -> Any:
    """The columns that `logits_to_keep` selects as a tensor; negative ones count from the end."""
    if index.ndim != 1:
        raise ValueError(f"logits_to_keep must be an integer or a 1-D tensor, got {index.ndim} dimensions")
    columns = index.cpu().numpy()
    if columns.dtype == np.bool_:
        columns = np.flatnonzero(columns)
    columns = np.where(columns < 0, columns + q, columns)
    if columns.size and not (0 <= columns.min() and columns.max() < q):
        raise ValueError(f"logits_to_keep contains columns outside the {q} of this call")
    return columns


def _tuple_of(hidden: torch.Tensor, chosen: Collection[int]) -> tuple[torch.Tensor | None, ...]:
    """`hidden_states` of an output: those not requested are None, as in Transformers."""
    return tuple(h if i in chosen else None for i, h in enumerate(hidden))


def trainable(model: torch.nn.Module) -> bool:
    """Whether a parameter requires gradients."""
    return any(parameter.requires_grad for parameter in model.parameters())
