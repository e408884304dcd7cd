"""What decoding moves, counted from the graphs of published models, is little more than their weights and cached tokens."""

from __future__ import annotations

import pytest
from transformers import DeepseekV2Config, DeepseekV4Config, GptOssConfig, LlamaConfig, Qwen2Config

from deepseek_optimizer.backends.cuda.traffic import decode_traffic
from deepseek_optimizer.graph import rules
from deepseek_optimizer.graph.analysis import stack_shapes, weight_shapes
from deepseek_optimizer.graph.min_formats import exact_weights
from deepseek_optimizer.models import build_graph

CONFIGS = {
    "R1-Distill-Qwen-1.5B": lambda: Qwen2Config(
        vocab_size=151936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12,
        num_key_value_heads=2,
    ),
    "Llama-3.1-8B": lambda: LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8,
    ),
    "DeepSeek-V2-Lite": lambda: DeepseekV2Config(
        vocab_size=102400, hidden_size=2048, intermediate_size=10944, moe_intermediate_size=1408, num_hidden_layers=27,
        num_attention_heads=16, num_key_value_heads=16, q_lora_rank=None, n_routed_experts=64, n_shared_experts=2,
        num_experts_per_tok=6, first_k_dense_replace=1, topk_method="greedy", n_group=1, topk_group=1,
    ),
    "DeepSeek-V4": DeepseekV4Config,  # of 43 layers
    "gpt-oss-20b": lambda: GptOssConfig(num_local_experts=32, num_hidden_layers=24),
}  # fmt: skip

# Unfinished results of chunks, which fit into an L2 cache, and the keys of `kv_b`, which are bf16 in every format.
MORE = {("DeepSeek-V2-Lite", "int4", 4095): 1.07}


def traffic(name: str, format_name: str, contexts: list[int], kv_dtype: str = "bf16"):
    graph = rules.apply(build_graph(CONFIGS[name]()))[0]
    stacks, exact = stack_shapes(graph), exact_weights(graph)
    packed = [n for n, shape in weight_shapes(graph).items() if n in stacks or len(shape) == 2 and n not in exact]
    return graph, decode_traffic(graph, dict.fromkeys(packed, format_name), kv_dtype, contexts)


@pytest.mark.parametrize("context", [0, 1000, 4095])
@pytest.mark.parametrize("format_name", ["bf16", "int4"])
@pytest.mark.parametrize("name", CONFIGS)
def test_decoding_moves_little_more_than_the_floor(name, format_name, context):
    _, moved = traffic(name, format_name, [context])
    most = MORE.get((name, format_name, context), 1.05)
    assert moved.floor <= moved.total <= most * moved.floor


def test_the_floor_is_what_has_to_be_read():
    """Of Llama 3.1 8B in bf16: all matrices but the embedding, and the cache of 1001 tokens."""
    _, moved = traffic("Llama-3.1-8B", "bf16", [1000])
    layer = 4096 * (4096 * 2 + 1024 * 2) + 3 * 4096 * 14336
    matrices, cache = 2 * (32 * layer + 128256 * 4096), 2 * 1001 * 32 * 2 * 8 * 128
    assert 0 < moved.floor - matrices - cache < 2e6  # norms and a row of the embedding


@pytest.mark.parametrize("kv_dtype", ["int8", "fp8"])
def test_codes_have_scales(kv_dtype):
    """A float32 of each key and value of a head; of each 128 elements of a latent, whose rotated key is bf16."""
    for name, token in (("Llama-3.1-8B", 32 * 2 * 8 * (128 + 4)), ("DeepSeek-V2-Lite", 27 * (512 + 4 * 4 + 2 * 64))):
        (_, short), (_, long) = (traffic(name, "bf16", [context], kv_dtype) for context in (100, 101))
        assert long.floor - short.floor == token and short.cache == 102 * token  # and the new token's, which is written


def test_sequences_share_weights_and_experts_are_read_where_they_are_chosen():
    _, one = traffic("gpt-oss-20b", "mxfp4", [100])
    _, two = traffic("gpt-oss-20b", "mxfp4", [100, 100])
    _, many = traffic("gpt-oss-20b", "mxfp4", [100] * 64)
    assert one.weights < two.weights < 2 * one.weights and two.cache == 2 * one.cache
    assert many.weights < 32 / 4 * one.weights
    _, windowed = traffic("gpt-oss-20b", "mxfp4", [10_000])
    _, longer = traffic("gpt-oss-20b", "mxfp4", [20_000])
    assert longer.floor - windowed.floor == 12 * 10_000 * 2 * 8 * 64 * 2  # half of the layers have windows
