"""The forwards of a multimodal model: its own, which is Transformers', and that of its language model, which runs the plan."""

from __future__ import annotations

import copy
import inspect
import threading
from typing import Any

import torch

from ..bind.instance_method import PLANNED, Replacement
from ..compat import cache_name, class_output, take_cache
from ..generation.cache import PagedCache
from ..generation.steps import Columns
from ..model.decoder_forward import DecoderForward
from ..model.forward import trainable
from .pictures import Call, plain_call, with_layer_inputs


class OuterCall(threading.local):
    """The arguments of the whole model's forward that runs in this thread."""

    arguments: dict[str, Any] | None = None
    records: bool = False  # the language model is not run: its call is raised as `Recorded`

    def __deepcopy__(self, memo: dict[int, Any]) -> OuterCall:
        return OuterCall()


class Recorded(Exception):  # noqa: N818  # no error: it ends a forward at the language model
    """The call of the language model in a forward that only prepares it.

    Args:
        call: the call.
    """

    def __init__(self, call: Call) -> None:
        super().__init__("the language model was not to be run")
        self.call = call


class LanguageForward(DecoderForward):
    """The forward of the language model's module. Embeddings of pictures are rows like others.

    Args:
        runtime: that of the `LanguageModel`.
        outer: shared with the `WholeForward`.
        token_types: as in `models.Multimodal`; "": attention is causal.
    """

    runs_plan = True

    def __init__(self, runtime: Any, outer: OuterCall, token_types: str) -> None:
        self.runtime, self._outer, self._token_types = runtime, outer, token_types
        decoder = runtime.model.model
        self._original = type(decoder).forward
        self.__signature__ = inspect.signature(self._original.__get__(decoder))
        self._order = [n for n, p in self.__signature__.parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]

    @torch.compiler.disable(reason=PLANNED)
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = self.named(args, kwargs)
        cache = take_cache(call)
        plain = plain_call(call, self._outer.arguments, self._token_types)
        if self._outer.records:
            raise Recorded(plain)
        ids = plain.arguments.pop("ids_of_layers", None)
        reason = plain.reason or self.why_not(plain.arguments, cache)
        if reason is None:
            return self._planned({**plain.arguments, "pictures": plain.pictures, "ids_of_layers": ids}, cache)
        self.refuse(reason, cache)
        return self._original(self.runtime.model.model, **call, **({} if cache is None else {cache_name(): cache}))

    def _columns(self, state: Any, ids: Any, embeds: Any, call: dict[str, Any], hidden: bool) -> Columns:
        columns: Columns = super()._columns(state, ids, embeds, call, hidden)
        columns.pictures = call.get("pictures")
        return columns

    def _output(self, call: dict[str, Any], new: Columns, logits: torch.Tensor, hidden: Any, states: Any, cache: Any) -> Any:
        fields = {"last_hidden_state": hidden[-1], "hidden_states": states, cache_name(): cache}
        decoder_class: Any = type(self.runtime.model.model)
        return class_output(decoder_class)(**fields)

    def __deepcopy__(self, memo: dict[int, Any]) -> LanguageForward:
        copy.deepcopy(self.runtime.model, memo)  # the runtime's copy needs that of its model
        twin: LanguageForward = super().__deepcopy__(memo)
        twin._outer = copy.deepcopy(self._outer, memo)
        return twin


class WholeForward(Replacement):
    """The forward of the whole model: Transformers' own, with a cache that the language model's plan can use."""

    replaces = "forward"

    @torch.compiler.disable(reason=PLANNED)
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        runtime: Any = self.runtime  # a MultimodalRuntime
        call = self.named(args, kwargs)
        cache = take_cache(call)
        if cache is None and self._keeps_cache(call) and self._plain(call):
            cache = PagedCache(runtime.language_model)
        if cache is not None:
            call[cache_name()] = cache
        call, known = with_layer_inputs(runtime.model, call)
        outer = runtime.outer
        before, outer.arguments = outer.arguments, known
        try:
            with runtime.running():
                return self._original(runtime.model, **call)
        finally:
            outer.arguments = before

    def _keeps_cache(self, call: dict[str, Any]) -> bool:
        runtime: Any = self.runtime
        use = call.get("use_cache")
        return bool(runtime.language_model.config.use_cache if use is None else use)

    def _plain(self, call: dict[str, Any]) -> bool:
        """Whether the language model's plan serves the call, as far as this can be known before the language model is
        called."""
        runtime: Any = self.runtime
        model, language = runtime.model, runtime.language
        mask = call.get("attention_mask")
        return not (
            call.get("output_attentions")
            or language.model.config.output_attentions
            or language.unserved()
            or isinstance(mask, dict)
            or (isinstance(mask, torch.Tensor) and mask.ndim != 2)
            or model.training
            or (torch.is_grad_enabled() and trainable(model))
        )
