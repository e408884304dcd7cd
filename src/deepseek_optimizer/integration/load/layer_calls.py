"""How a decoder calls its layers, recorded on texts, so that single layers can be run on other hidden states."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

_HIDDEN = "hidden_states"  # name of the layers' first argument in Transformers


class _Stop(Exception):
    """Ends a forward of which only the beginning is needed."""


class LayerCalls:
    """The arguments of a decoder's layers on texts. They include masks and rotary embeddings, which depend on the layer's kind.

    Args:
        decoder: the decoder, whose forward calls each of `layers` once, in order, with hidden states as the first argument.
        layers: its layers.
        texts: token ids, int64 [1, n] each.

    Attributes:
        inputs: the hidden states that the first layer gets, [1, n, H] for each text.
    """

    def __init__(self, decoder: nn.Module, layers: Sequence[nn.Module], texts: Sequence[torch.Tensor]) -> None:
        self.inputs: list[torch.Tensor] = []
        self._calls: list[list[tuple[tuple[Any, ...], dict[str, Any]]]] = []  # by text and layer; without the hidden states
        for text in texts:
            # Texts of one length are called alike unless arguments depend on the tokens, which the first two texts show.
            known = len(self._calls) > 1 and text.shape == texts[0].shape == texts[1].shape
            alike = known and _equal(self._calls[0], self._calls[1])
            calls = _recorded(decoder, layers[:1] if alike else layers, layers[1] if alike and len(layers) > 1 else None, text)
            self.inputs.append(calls[0][0])
            self._calls.append(self._calls[0] if alike else [(args, kwargs) for _, args, kwargs in calls])

    def run(self, layer: nn.Module, index: int, text: int, hidden: torch.Tensor) -> torch.Tensor:
        """The output of a layer for hidden states [1, n, H] of text number `text`."""
        args, kwargs = self._calls[text][index]
        output = layer(hidden, *args, **kwargs)
        result: torch.Tensor = output[0] if isinstance(output, tuple) else output
        return result

    def run_until(self, layer: nn.Module, index: int, text: int, hidden: torch.Tensor, module: nn.Module) -> None:
        """Runs a layer until it calls one of its modules; pre-hooks of that module run too."""
        handle = module.register_forward_pre_hook(_end)
        try:
            self.run(layer, index, text, hidden)
        except _Stop:
            pass
        finally:
            handle.remove()

    def adds(self, layer: nn.Module, index: int, module: nn.Module, hidden: torch.Tensor) -> bool:
        """Whether a layer adds the result of one of its modules, unchanged, to its output. It is run twice on the first text.

        `hidden`: hidden states [1, n, H] of that text.
        """
        output = self.run(layer, index, 0, hidden)
        steps = torch.linspace(-2, 2, output.numel(), dtype=torch.float32, device=output.device).view_as(output)
        change = output.float().abs().median() * steps

        def changed(module: nn.Module, args: Any, result: Any) -> Any:
            same = isinstance(result, torch.Tensor) and result.numel() == change.numel()
            return result + change.view_as(result).to(result.dtype) if same else result

        handle = module.register_forward_hook(changed)
        try:
            difference = self.run(layer, index, 0, hidden).float() - output.float()
        finally:
            handle.remove()
        return bool((difference - change).abs().median() < 0.05 * change.abs().median())  # outputs are rounded, often to bf16


def first_inputs(decoder: nn.Module, layers: Sequence[nn.Module], texts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The hidden states that the first layer gets now, [1, n, H] for each text; the arguments are those of `LayerCalls`."""
    second = layers[1] if len(layers) > 1 else None
    return [_recorded(decoder, layers[:1], second, text)[0][0] for text in texts]


def _recorded(
    decoder: nn.Module, layers: Sequence[nn.Module], stop: nn.Module | None, ids: torch.Tensor
) -> list[tuple[torch.Tensor, tuple[Any, ...], dict[str, Any]]]:
    """The hidden states and other arguments of each layer; the forward ends where the layer `stop` begins."""
    calls: list[tuple[torch.Tensor, tuple[Any, ...], dict[str, Any]]] = []

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        kwargs = dict(kwargs)
        hidden = args[0] if args else kwargs.pop(_HIDDEN)
        calls.append((hidden, args[1:], kwargs))

    handles = [layer.register_forward_pre_hook(record, with_kwargs=True) for layer in layers]
    handles += [] if stop is None else [stop.register_forward_pre_hook(_end)]
    try:
        decoder(ids, use_cache=False)
    except _Stop:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _end(module: nn.Module, args: Any) -> None:
    raise _Stop


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(_equal, a, b))
    if isinstance(a, Mapping):  # such as Gemma 4's keys and values for other layers
        return isinstance(b, Mapping) and a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    return a is b or bool(a == b)
