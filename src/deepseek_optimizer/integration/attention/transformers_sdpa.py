"""Transformers' attention with `scaled_dot_product_attention` and its masks: the fallback of `dso_sliding` and `dso_native`."""

from transformers.integrations.sdpa_attention import create_position_bias_mask, sdpa_attention_forward
from transformers.masking_utils import (
    causal_mask_function,
    create_causal_mask,
    create_sliding_window_causal_mask,
    prepare_padding_mask,
    sdpa_mask,
    sliding_window_causal_mask_function,
)

__all__ = [
    "causal_mask_function",
    "create_causal_mask",
    "create_position_bias_mask",
    "create_sliding_window_causal_mask",
    "prepare_padding_mask",
    "sdpa_attention_forward",
    "sdpa_mask",
    "sliding_window_causal_mask_function",
]
