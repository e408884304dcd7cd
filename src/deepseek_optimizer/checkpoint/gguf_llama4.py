"""GGUF's `llama4`: files have neither the chunks of attention nor the growth of queries, which llama.cpp knows.

Three of four layers have chunked attention and RoPE; the fourth has full attention without RoPE, whose queries grow with the
position. With a window of 0, all layers have full attention and RoPE. Queries and keys are normalized, except in the model with
128 experts. Rows are not permuted for RoPE, since Transformers rotates adjacent elements too.
Sources: llama.cpp's conversion/llama4.py, src/models/llama4.cpp.
"""

from __future__ import annotations

from typing import Any

from .gguf_metadata import Metadata

_CHUNK, _SCALE, _INTERVAL = 8192, 0.1, 4
_WITHOUT_NORMS = 128  # experts


def llama4_config(meta: Metadata, rope: dict[str, Any]) -> dict[str, Any]:
    """Config fields of this architecture besides the common ones.

    Args:
        meta: the file's metadata.
        rope: the common `rope_parameters`.
    """
    chunks = meta.integer(meta.of_model("attention.sliding_window"), _CHUNK, minimum=0) > 0
    rotated = [not chunks or (layer + 1) % _INTERVAL != 0 for layer in range(meta.layers)]
    return {
        "attention_chunk_size": _CHUNK,
        "attn_scale": _SCALE,
        "attn_temperature_tuning": chunks,
        "floor_scale": _CHUNK,
        "layer_types": ["chunked_attention" if chunks and each else "full_attention" for each in rotated],
        "no_rope_layers": [int(each) for each in rotated],
        "use_qk_norm": meta.integer(meta.of_model("expert_count")) != _WITHOUT_NORMS,
    }
