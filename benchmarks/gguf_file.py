"""A Llama- or Qwen2-shaped model directory as a GGUF file, every matrix in one type, by gguf-py's own quantizer.

All matrices, embedding and head too: what llama.cpp then reads a token is as little as that type allows. The vocabulary is a
stand-in, of the right size: for speed, not for text.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

_MODULES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def write(source: Path, target: Path, kind: str) -> None:
    """kind: a ggml type of matrices ("Q4_0", "Q4_1", "Q8_0"); vectors are fp32."""
    import gguf
    import numpy as np
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(source)
    tensor_type = gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(target, config.model_type)
    _describe(writer, config)
    for name, values in _tensors(source):
        values = _interleaved(name, values, config)
        if values.ndim == 2:
            writer.add_tensor(renamed(name), gguf.quantize(values, tensor_type), raw_dtype=tensor_type)
        else:
            writer.add_tensor(renamed(name), values.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _describe(writer: Any, config: Any) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    stand_in_tokenizer(writer, config.vocab_size)


def stand_in_tokenizer(writer: Any, tokens: int) -> None:
    """A vocabulary of the right size, for engines that want one."""
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(["t", "1", *(f"t{i}" for i in range(tokens - 2))])  # and what the merge joins
    writer.add_token_types([1] * tokens)
    writer.add_token_merges(["t 1"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def _tensors(source: Path) -> Iterator[tuple[str, Any]]:
    """Parameters by name, as fp32 arrays."""
    from safetensors import safe_open

    for path in sorted(source.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():
                yield name, file.get_tensor(name).float().numpy()


def renamed(name: str) -> str:
    module, leaf = name.rsplit(".", 1)
    if module in _MODULES:
        return f"{_MODULES[module]}.{leaf}"
    _, _, layer, part = module.split(".", 3)
    return f"blk.{layer}.{_MODULES[part]}.{leaf}"


def _interleaved(name: str, values: Any, config: Any) -> Any:
    """llama.cpp's "llama" rotates neighboring columns of a head, Transformers its halves: rows of q and k change places."""
    if config.model_type != "llama" or not name.endswith(("q_proj.weight", "k_proj.weight")):
        return values
    heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
    rows, columns = values.shape
    return values.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)
