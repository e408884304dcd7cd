"""What a request to `generate` must be before any work is done for it: errors that name the value and the remedy."""

from __future__ import annotations

import math
from typing import Any

import torch

from ...graph.ir import Graph

_FINITE = (
    "temperature", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff", "repetition_penalty",
    "length_penalty", "diversity_penalty", "encoder_repetition_penalty", "guidance_scale", "max_time",
)  # fmt: skip
# What float32 logits can be divided or multiplied by and stay numbers, and what a length can be raised to.
_RANGES = {
    "temperature": (1e-30, 1e30), "repetition_penalty": (1e-30, 1e30), "encoder_repetition_penalty": (1e-30, 1e30),
    "guidance_scale": (-1e30, 1e30), "length_penalty": (-50, 50), "top_p": (0, 1), "min_p": (0, 1),
}  # fmt: skip
_KINDS = {2: "integer token ids", 3: "floating point embeddings"}
# Smallest values, and largest where memory is taken for each.
_WHOLE = {
    "max_new_tokens": (1, None), "max_length": (0, None), "min_new_tokens": (None, None), "min_length": (0, None),
    "top_k": (0, None), "num_beams": (1, 1 << 12), "num_return_sequences": (1, 1 << 12), "no_repeat_ngram_size": (0, None),
    "prompt_lookup_num_tokens": (1, None), "num_assistant_tokens": (1, None),
}  # fmt: skip


def check_prompt(inputs: Any, mask: Any, graph: Graph) -> None:
    """ids [B, n] or embeddings [B, n, H]: not empty, inside the vocabulary, inside the context.

    Raises: ValueError.
    """
    if inputs is None:
        return  # generate begins with the bos token, or says that there is none
    if not isinstance(inputs, torch.Tensor) or inputs.ndim not in (2, 3):
        what = getattr(inputs, "shape", type(inputs).__name__)
        raise ValueError(f"the prompt must be a tensor of ids [batch, tokens], got {what}")
    if 0 in inputs.shape:
        raise ValueError(f"the prompt is empty ({tuple(inputs.shape)}); give at least one token, for example the bos token")
    if inputs.shape[1] > graph.max_positions:
        raise ValueError(
            f"the prompt has {inputs.shape[1]} tokens, the model's context holds {graph.max_positions}; shorten the prompt, or "
            "make room with context_extension"
        )
    if inputs.is_floating_point() != (inputs.ndim == 3) or inputs.dtype == torch.bool:
        raise ValueError(f"a prompt of {inputs.ndim} dimensions must be {_KINDS[inputs.ndim]}, got {inputs.dtype}")
    if isinstance(mask, torch.Tensor) and mask.ndim == 2:
        rows, columns = inputs.shape[:2]
        if mask.shape[0] != rows or mask.shape[1] < columns:
            raise ValueError(f"attention_mask has shape {tuple(mask.shape)}, but the prompt {(rows, columns)}")
    if inputs.ndim == 2:
        low, high = (int(extreme) for extreme in inputs.aminmax())
        if low < 0 or high >= graph.vocab_size:
            raise ValueError(
                f"token id {low if low < 0 else high} is outside the vocabulary of {graph.vocab_size}; "
                "use the tokenizer that belongs to this model"
            )


def unserved_mask(mask: Any) -> str | None:
    """Why the plan cannot generate from a prompt under this mask; None if it can.

    The plan computes no padding, and Transformers continues a row that ends in padding from the logits of a padding token.
    """
    if not isinstance(mask, torch.Tensor):
        return None if mask is None else f"attention_mask is a {type(mask).__name__}"
    if mask.ndim != 2:
        return f"attention_mask has {mask.ndim} dimensions"
    if mask.shape[1] and not mask[:, -1].all():
        row = int((mask[:, -1] == 0).nonzero()[0])
        return f"row {row} of the prompt ends in padding (tokenizer.padding_side = 'left' avoids it)"
    return None


def check_generation(config: Any) -> None:
    """A settled GenerationConfig: numbers that Transformers would take and compute nonsense with.

    Raises: ValueError.
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
            most = "" if high is None else f", {high} at most"
            raise ValueError(f"{name} must be a whole number{'' if low is None else f' from {low} on'}{most}, got {value!r}")
    for name, (least, most_of_it) in _RANGES.items():
        value = getattr(config, name, None)
        if value is None or least <= value <= most_of_it or (name == "temperature" and not config.do_sample):
            continue
        remedy = "; for greedy, do_sample=False" if name == "temperature" else ""
        raise ValueError(f"{name} must be from {least:g} to {most_of_it:g}, got {value!r}{remedy}")
