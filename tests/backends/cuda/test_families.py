"""Logits of families that need more than Llama does, beside those of the reference: caps, factors, other gates, sinks, chunks,
tables per layer, parts of matrices that begin within a tile.
"""

from __future__ import annotations

import pytest

from support import triton_interpreter

DEVICE = triton_interpreter.require_device()

from deepseek_optimizer.backends.cuda.backend import CudaBackend
from support import family_configs as configs
from support.models import assert_close_rows, random_ids, random_model

from .plans import BF16_CACHE, FORMAT_TOLERANCE, pair, stepwise

TINY = {
    "vocab_size": 31, "hidden_size": 40, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 10,
}  # fmt: skip
TYPES = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 9}
NO_HEAD = {name: value for name, value in TINY.items() if name != "head_dim"}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 20}
LLAMA4 = TINY | {
    "num_hidden_layers": 2, "num_local_experts": 3, "intermediate_size": 20, "intermediate_size_mlp": 48,
    "attention_chunk_size": 11,
}  # fmt: skip
GEMMA4 = {"num_hidden_layers": 4, "sliding_window": 9, "global_head_dim": 14}
FAMILIES = {
    "gemma2-caps": lambda: configs.gemma2(**TINY | TYPES),
    "gemma3-two-ropes": lambda: configs.gemma3_text(**TINY | TYPES),
    "cohere2-logits": lambda: configs.cohere2(**NO_HEAD),
    "granite-factors": lambda: configs.granite(**NO_HEAD),
    "granitemoe-factors": lambda: configs.granitemoe(**NO_HEAD | EXPERTS),
    "starcoder2-gelu": lambda: configs.starcoder2(**NO_HEAD),
    "ministral3-positions": lambda: configs.ministral3(**TINY),
    "gpt_oss-sinks": lambda: configs.gpt_oss(**TINY | TYPES | EXPERTS),
    "llama4_text-chunks": lambda: configs.llama4_text(
        **LLAMA4, num_experts_per_tok=2, no_rope_layers=[1, 0], interleave_moe_layer_step=1
    ),
    "llama4_text-dense": lambda: configs.llama4_text(
        **LLAMA4, num_experts_per_tok=1, no_rope_layers=[0, 1], interleave_moe_layer_step=2, use_qk_norm=False
    ),
    "gemma4_text-shared": lambda: configs.gemma4_shared(
        **TINY | GEMMA4,
        num_kv_shared_layers=2,
        hidden_size_per_layer_input=6,
        vocab_size_per_layer_input=33,
        layer_types=["sliding_attention", "full_attention"] * 2,
    ),
    "gemma4_text-experts": lambda: configs.gemma4_moe(
        **TINY | GEMMA4 | {"num_hidden_layers": 2},
        num_experts=4,
        moe_intermediate_size=20,
    ),
    "gemma4_unified_text": lambda: configs.gemma4_unified_text(
        **TINY | GEMMA4 | {"num_hidden_layers": 2},
        num_kv_shared_layers=1,
        layer_types=["full_attention"] * 2,
    ),
    "phi3-parts": lambda: configs.phi3(**NO_HEAD | {"hidden_size": 36, "intermediate_size": 52}, sliding_window=9),
    "glm-parts": lambda: configs.glm(**TINY | {"head_dim": 12, "intermediate_size": 52}),
    "glm4-moe": lambda: configs.glm4_moe(
        **TINY | {"head_dim": 12}, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=20
    ),
}


def check(family: str, format_name: str, kv: str, tolerance: float) -> None:
    model = random_model(FAMILIES[family]())
    made, exact = pair(CudaBackend(DEVICE), model, format_name, kv)
    ids = random_ids(model.config, 39)
    assert_close_rows(stepwise(made, ids), stepwise(exact, ids), tolerance)


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family):
    check(family, "fp32", "fp32", FORMAT_TOLERANCE["fp32"])


def test_gpt_oss_in_its_own_format():
    """Experts in MXFP4, as its checkpoints have them; a bf16 cache."""
    check("gpt_oss-sinks", "mxfp4", "bf16", BF16_CACHE)
