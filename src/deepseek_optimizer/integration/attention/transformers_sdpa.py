"""Transformers' attention with `scaled_dot_product_attention` and its masks: the fallback of `dso_sliding`."""

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
