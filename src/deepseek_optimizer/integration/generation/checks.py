"""Validation of the arguments of `generate` before any work is done."""

from __future__ import annotations

import math
from typing import Any

import torch

from ...graph.ir import Graph

_FINITE = (
    "temperature", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff", "repetition_penalty",
    "length_penalty", "diversity_penalty", "encoder_repetition_penalty", "guidance_scale", "max_time",
    "assistant_confidence_threshold",
)  # fmt: skip
# Factors and divisors that keep float32 logits finite, and exponents that keep the power of a length finite.
_RANGES = {
    "temperature": (1e-30, 1e30), "repetition_penalty": (1e-30, 1e30), "encoder_repetition_penalty": (1e-30, 1e30),
    "guidance_scale": (-1e30, 1e30), "length_penalty": (-50, 50), "top_p": (0, 1), "min_p": (0, 1),
    "assistant_confidence_threshold": (0, 1),
}  # fmt: skip
_KINDS = {2: "integer token ids", 3: "floating point embeddings"}
# Minimum, and the maximum of values that memory use is proportional to.
_WHOLE = {
    "max_new_tokens": (1, None), "max_length": (0, None), "min_new_tokens": (None, None), "min_length": (0, None),
    "top_k": (0, None), "num_beams": (1, 1 << 12), "num_return_sequences": (1, 1 << 12), "no_repeat_ngram_size": (0, None),
    "prompt_lookup_num_tokens": (1, None), "num_assistant_tokens": (1, None),
}  # fmt: skip


def check_prompt(inputs: Any, mask: Any, graph: Graph) -> None:
    """Checks a prompt.

    Args:
        inputs: ids [B, n], or embeddings [B, n, H]; None: `generate` begins with the bos token.
        mask: the attention mask.
        graph: the model's graph.

    Raises:
        ValueError: the prompt is empty, longer than the context, outside the vocabulary, or has a wrong shape or dtype.
    """
    if inputs is None:
        return
    if not isinstance(inputs, torch.Tensor) or inputs.ndim not in (2, 3):
        what = getattr(inputs, "shape", type(inputs).__name__)
        raise ValueError(f"the prompt must be a tensor of token ids [batch, tokens], got {what}")
    if 0 in inputs.shape:
        raise ValueError(
            f"the prompt is empty, shape {tuple(inputs.shape)}; pass at least one token, for example the bos token"
        )
    if inputs.shape[1] > graph.max_positions:
        raise ValueError(
            f"the prompt has {inputs.shape[1]} tokens, more than the model's context of {graph.max_positions}; shorten the "
            "prompt, or load the model with context_extension"
        )
    if inputs.is_floating_point() != (inputs.ndim == 3) or inputs.dtype == torch.bool:
        raise ValueError(f"a prompt with {inputs.ndim} dimensions must contain {_KINDS[inputs.ndim]}, got {inputs.dtype}")
    if isinstance(mask, torch.Tensor) and mask.ndim == 2:
        rows, columns = inputs.shape[:2]
        if mask.shape[0] != rows or mask.shape[1] < columns:
            raise ValueError(f"attention_mask has shape {tuple(mask.shape)}, but the prompt has shape {(rows, columns)}")
    if inputs.ndim == 2:
        low, high = (int(extreme) for extreme in inputs.aminmax())
        if low < 0 or high >= graph.vocab_size:
            raise ValueError(
                f"token id {low if low < 0 else high} is outside the vocabulary of {graph.vocab_size}; "
                "use the tokenizer that belongs to this model"
            )


def unserved_mask(mask: Any) -> str | None:
    """Why the plan cannot generate from a prompt with this mask; None if it can.

    The plan does not compute padding, but Transformers continues a row that ends in padding from a padding token's logits.
    """
    if not isinstance(mask, torch.Tensor):
        return None if mask is None else f"attention_mask is a {type(mask).__name__}"
    if mask.ndim != 2:
        return f"attention_mask has {mask.ndim} dimensions"
    if mask.shape[1] and not mask[:, -1].all():
        row = int((mask[:, -1] == 0).nonzero()[0])
        return f"row {row} of the prompt ends in padding (set tokenizer.padding_side = 'left')"
    return None


def check_generation(config: Any) -> None:
    """Checks a complete GenerationConfig for values that Transformers would accept and compute nonsense with.

    Raises:
        ValueError: a value is not valid; the message names it.
    """
    for name in _FINITE:
        value = getattr(config, name, None)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ValueError(f"{name} must be a finite number, got {value!r}")
    for name, (low, high) in _WHOLE.items():
        value = getattr(config, name, None)
        if value is None:
            continue
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not whole or (low is not None and value < low) or (high is not None and value > high):
            upper = "" if high is None else f" and <= {high}"
            raise ValueError(f"{name} must be an integer{'' if low is None else f' >= {low}'}{upper}, got {value!r}")
    for name, (minimum, maximum) in _RANGES.items():
        value = getattr(config, name, None)
        if value is None or minimum <= value <= maximum or (name == "temperature" and not config.do_sample):
            continue
        remedy = "; use do_sample=False for greedy decoding" if name == "temperature" else ""
        raise ValueError(f"{name} must be from {minimum:g} to {maximum:g}, got {value!r}{remedy}")
