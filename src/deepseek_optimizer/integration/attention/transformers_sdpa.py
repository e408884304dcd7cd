"""Transformers' own attention by `scaled_dot_product_attention`, and its masks: what our attention functions fall back to."""

from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import (
    causal_mask_function,
    create_causal_mask,
    prepare_padding_mask,
    sdpa_mask,
    sliding_window_causal_mask_function,
)

__all__ = [
    "causal_mask_function",
    "create_causal_mask",
    "prepare_padding_mask",
    "sdpa_attention_forward",
    "sdpa_mask",
    "sliding_window_causal_mask_function",
]
