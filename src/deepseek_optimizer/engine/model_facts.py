"""What an engine needs to know about its model. Does not import torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelFacts:
    """Properties of a model that the engine needs.

    Attributes:
        vocab_size: number of logits per row.
        hidden_size: size of the hidden states.
        context: context length in tokens, the maximum of prompt and text together.
        eos: end-of-text token ids.
        chunk: fixed chunk size in tokens for prompts, for models whose results depend on the chunking; None: any size.
        plain: with dynamic RoPE, the length in tokens up to which frequencies are not scaled; None: they never are.
        pictures: whether prompts may have pictures.
        qualities: whether requests may choose a quality: the model's weights have several.
    """

    vocab_size: int
    hidden_size: int
    context: int
    eos: frozenset[int]
    chunk: int | None = None
    plain: int | None = None
    pictures: bool = False
    qualities: bool = False
