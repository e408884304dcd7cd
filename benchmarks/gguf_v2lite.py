"""DeepSeek-V2-Lite's shape as a GGUF file of random blocks, tensor by tensor: 15.7 billion weights are never there as floats.

Names and keys as llama.cpp's converter writes them. The vocabulary is a stand-in, of the right size.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .gguf_file import stand_in_tokenizer

LAYERS, HIDDEN, VOCABULARY, HEADS, RANK, ROPE, NOPE, VALUE = 27, 2048, 102400, 16, 512, 64, 128, 128
DENSE, EXPERTS, CHOSEN, SHARED, INNER = 10944, 64, 6, 2, 1408
SCALE = 0.003  # of a block; codes are uniform, so that weights have a standard deviation of 0.014


def write(target: Path, kind: str) -> None:
    """kind: a ggml type whose blocks begin with one fp16 scale, such as "Q4_0"."""
    import gguf
    import numpy as np

    blocks = _Blocks(gguf.GGUFWriter(target, "deepseek2", use_temp_file=True), kind)
    _describe(blocks.writer)
    blocks.add("token_embd", VOCABULARY, HIDDEN)
    blocks.ones("output_norm", HIDDEN)
    blocks.add("output", VOCABULARY, HIDDEN)
    for layer in range(LAYERS):
        name = f"blk.{layer}"
        for norm, width in (("attn_norm", HIDDEN), ("ffn_norm", HIDDEN), ("attn_kv_a_norm", RANK)):
            blocks.ones(f"{name}.{norm}", width)
        blocks.add(f"{name}.attn_q", HEADS * (NOPE + ROPE), HIDDEN)
        blocks.add(f"{name}.attn_kv_a_mqa", RANK + ROPE, HIDDEN)
        blocks.add(f"{name}.attn_k_b", HEADS, RANK, NOPE)
        blocks.add(f"{name}.attn_v_b", HEADS, VALUE, RANK)
        blocks.add(f"{name}.attn_output", HIDDEN, HEADS * VALUE)
        if layer == 0:
            blocks.mlp(name, "", DENSE)
            continue
        router = np.random.default_rng(layer).normal(0, 0.02, (EXPERTS, HIDDEN)).astype(np.float32)
        blocks.writer.add_tensor(f"{name}.ffn_gate_inp.weight", router)
        blocks.mlp(name, "_exps", INNER, EXPERTS)
        blocks.mlp(name, "_shexp", SHARED * INNER)
    writer = blocks.writer
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class _Blocks:
    """Adds tensors of random blocks."""

    def __init__(self, writer: Any, kind: str) -> None:
        import gguf
        import numpy as np

        self.writer, self.kind = writer, gguf.GGMLQuantizationType[kind]
        self.numbers, self.bytes = gguf.GGML_QUANT_SIZES[self.kind]
        self.random = np.random.default_rng(0)

    def add(self, name: str, *shape: int) -> None:
        import numpy as np

        blocks = self.random.integers(0, 256, (*shape[:-1], shape[-1] // self.numbers, self.bytes), dtype=np.uint8)
        blocks[..., :2] = np.array([SCALE], np.float16).view(np.uint8)
        self.writer.add_tensor(f"{name}.weight", blocks.reshape(*shape[:-1], -1), raw_dtype=self.kind)

    def ones(self, name: str, width: int) -> None:
        import numpy as np

        self.writer.add_tensor(f"{name}.weight", np.ones(width, np.float32))

    def mlp(self, name: str, suffix: str, inner: int, *experts: int) -> None:
        for part in ("gate", "up"):
            self.add(f"{name}.ffn_{part}{suffix}", *experts, inner, HIDDEN)
        self.add(f"{name}.ffn_down{suffix}", *experts, HIDDEN, inner)


def _describe(writer: Any) -> None:
    import gguf

    writer.add_context_length(32768)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(DENSE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(1)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(ROPE)
    writer.add_kv_lora_rank(RANK)
    writer.add_vocab_size(VOCABULARY)
    writer.add_key_length(RANK + ROPE)
    writer.add_value_length(RANK)
    writer.add_key_length_mla(NOPE + ROPE)
    writer.add_value_length_mla(VALUE)
    writer.add_leading_dense_block_count(1)
    writer.add_expert_count(EXPERTS)
    writer.add_expert_used_count(CHOSEN)
    writer.add_expert_shared_count(SHARED)
    writer.add_expert_feed_forward_length(INNER)
    writer.add_expert_weights_scale(1.0)
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SOFTMAX)
    stand_in_tokenizer(writer, VOCABULARY)
