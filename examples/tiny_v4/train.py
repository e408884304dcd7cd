"""From text files to a chat with a DeepSeek-V4-shaped model of one's own.

    python examples/tiny_v4/train.py --output tiny --minutes 60
    dso chat tiny/int4

The script is that of examples/tiny_v3, with another model. See README.md beside this file.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tiny_v3"))

import train as tiny_v3


def make_model(size: Any, tokenizer: Any) -> Any:
    """A random `DeepseekV4ForCausalLM` with layers of all three types; the first one's experts are chosen by token id.

    Args:
        size: a `Size` of examples/tiny_v3/model.py; an inner head is as wide as there (48 elements, 16 of which turn).
    """
    import torch
    from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

    kinds = ("sliding", "compressed_sparse", "heavily_compressed", "compressed_sparse")
    config = DeepseekV4Config(
        vocab_size=len(tokenizer), hidden_size=size.hidden, moe_intermediate_size=size.inner, num_hidden_layers=size.layers,
        num_attention_heads=size.heads, head_dim=48, qk_rope_head_dim=16, q_lora_rank=size.hidden // 2, o_groups=2,
        o_lora_rank=size.hidden // 2, n_routed_experts=size.experts, num_experts_per_tok=2, n_shared_experts=1,
        routed_scaling_factor=1.0, hc_mult=2, hc_sinkhorn_iters=5, sliding_window=size.length // 4, index_n_heads=4,
        index_head_dim=32, index_topk=size.length // 8, num_nextn_predict_layers=1,
        layer_types=[f"{kinds[layer % 4]}_attention" for layer in range(size.layers)],
        mlp_layer_types=["hash_moe", *["moe"] * (size.layers - 1)],
        compress_rates={"compressed_sparse_attention": 4, "heavily_compressed_attention": 16},
        max_position_embeddings=4 * size.length, tie_word_embeddings=False, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = DeepseekV4ForCausalLM(config)
    ids = torch.arange(len(tokenizer))
    second = 1 + ids // size.experts % (size.experts - 1)  # distance to the second expert: every pair is chosen equally often
    model.model.layers[0].mlp.gate.tid2eid.copy_(torch.stack((ids, ids + second), 1) % size.experts)
    return model


if __name__ == "__main__":
    tiny_v3.main(kind=tiny_v3.Kind("tiny-v4", make_model, separates=False))
