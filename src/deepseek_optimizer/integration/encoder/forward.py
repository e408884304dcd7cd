"""The forward of an encoder's base model: the plan if it can serve a call, otherwise Transformers' own over packed layers.

It is set on the base model's instance, so that poolers, heads and classes around it run unchanged on its output.

The plan returns the same as Transformers, except for padding: it is not computed, and its hidden states are zero. There are no
gradients: if they are needed, Transformers' forward runs.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch

from ...errors import BackendError
from ..bind.instance_method import PLANNED, Replacement
from ..compat import chosen_hidden, output_class
from .rows import rows_of

_SERVED = {
    "input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds", "output_hidden_states",
    "output_attentions", "return_dict",
}  # fmt: skip


class OnBase:
    """A reference from the base model's forward to the runtime, which it does not keep alive: the runtime holds the modules.

    Args:
        runtime: the `EncoderRuntime`.
    """

    def __init__(self, runtime: Any) -> None:
        self._runtime, self._base = weakref.ref(runtime), weakref.ref(runtime.base)

    @property
    def runtime(self) -> Any:
        """The runtime; None if the model was deleted, and only its base model is left."""
        return self._runtime()

    @property
    def model(self) -> Any:
        """The base model."""
        runtime = self.runtime
        return self._base() if runtime is None else runtime.base

    def copied(self, memo: dict[int, Any]) -> OnBase:
        """The reference for the copy of the model that `copy.deepcopy` is creating."""
        if self.runtime is None:
            raise BackendError("the optimized model was deleted, so its base model cannot be copied; copy it before")
        twin = object.__new__(OnBase)
        twin._runtime = weakref.ref(self.runtime.copied(memo))
        twin._base = weakref.ref(memo[id(self._base())])
        return twin

    def __reduce__(self) -> Any:
        return self.runtime.__reduce__()


class EncoderForward(Replacement):
    """`base_model.forward`, with the arguments of the class's forward.

    Raises:
        ValueError: an argument has a wrong shape or value.
    """

    runtime: Any  # an OnBase
    replaces = "forward"

    @torch.compiler.disable(reason=PLANNED)
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        runtime, base, call = self.runtime.runtime, self.runtime.model, self.named(args, kwargs)
        if runtime is None:
            return self._original(base, **call)
        with runtime.backend.thread_context():
            if (reason := _why_not(runtime, base, call)) is None:
                return _planned(runtime, base, call)
            runtime.warn_once(f"{reason}: such calls run Transformers' own forward over the packed layers, which is slower")
            return self._original(base, **call)


def _why_not(runtime: Any, base: Any, call: dict[str, Any]) -> str | None:
    """Why the plan cannot serve this call; None if it can."""
    for name, value in call.items():
        if name not in _SERVED and value is not None and value is not False:
            return f"argument {name!r} is given"
    requested = call.get("output_attentions")
    if requested or (requested is None and base.config.output_attentions):
        return "output_attentions is requested"
    ids, embeds, mask = (call.get(name) for name in ("input_ids", "inputs_embeds", "attention_mask"))
    source = embeds if ids is None else ids
    if (ids is None) == (embeds is None) or not isinstance(source, torch.Tensor) or 0 in source.shape:
        return "not exactly one of input_ids and inputs_embeds is given, with at least one token"  # Transformers' error follows
    if source.ndim != (2 if embeds is None else 3):
        return f"the input has {source.ndim} dimensions"
    if mask is not None and (not isinstance(mask, torch.Tensor) or mask.shape != source.shape[:2]):
        return "attention_mask is not a tensor with one number per token"
    for name in ("position_ids", "token_type_ids"):
        value = call.get(name)
        if value is not None and (value.ndim != 2 or value.shape[1] != source.shape[1] or value.is_floating_point()):
            return f"{name} is not a tensor of integers with one number per token"
    if torch.is_grad_enabled() and embeds is not None and embeds.requires_grad:
        return "gradients are needed"
    if mask is not None and _has_windows(runtime) and not _contiguous(mask != 0):
        return "padding lies between tokens, which have a window of columns"
    reason: str | None = runtime.why_no_plan()
    return reason


def _has_windows(runtime: Any) -> bool:
    return any(node.attrs.get("window") for node in runtime.graph.nodes)


def _contiguous(kept: torch.Tensor) -> bool:
    """Whether the tokens of each row are adjacent."""
    starts = kept[:, 1:] & ~kept[:, :-1]
    return bool((starts.sum(1) + kept[:, 0] <= 1).all())


def _planned(runtime: Any, base: Any, call: dict[str, Any]) -> Any:
    ids, embeds, mask, config = call.get("input_ids"), call.get("inputs_embeds"), call.get("attention_mask"), base.config
    source: Any = embeds if ids is None else ids
    shape = source.shape[:2]
    kept = torch.ones(shape, dtype=torch.bool, device=source.device) if mask is None else mask.to(source.device) != 0
    wanted = call.get("output_hidden_states")
    wanted = config.output_hidden_states if wanted is None else wanted
    with torch.no_grad():
        if bool(kept.any()):
            made = runtime.run(rows_of(base.embeddings, call, kept), bool(wanted))
        else:
            states = runtime.graph.hidden_states if wanted else 1
            made = torch.zeros(states, 0, runtime.graph.hidden_size, dtype=base.dtype, device=kept.device)
        if bool(kept.all()):
            hidden = made.view(len(made), *shape, -1)
        else:
            hidden = made.new_zeros(len(made), *shape, made.shape[-1])
            hidden[:, kept] = made
    fields: dict[str, Any] = {"last_hidden_state": hidden[-1]}
    if wanted:
        chosen = chosen_hidden(wanted, len(hidden))
        fields["hidden_states"] = tuple(h if i in chosen else None for i, h in enumerate(hidden))
    if hasattr(base, "pooler"):
        fields["pooler_output"] = None if base.pooler is None else base.pooler(hidden[-1])
    output = output_class(base)(**fields)
    return_dict = call.get("return_dict")
    return output if (config.return_dict if return_dict is None else return_dict) else output.to_tuple()
