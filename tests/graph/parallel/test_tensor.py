"""A model divided among processes computes what it computes as a whole; what cannot be divided is refused, with the remedy."""

from __future__ import annotations

import pytest
import torch

from deepseek_optimizer.backends.reference import ReferenceBackend
from deepseek_optimizer.errors import ConfigError, UnsupportedModelError
from deepseek_optimizer.graph import rules
from deepseek_optimizer.graph.analysis import weight_shapes
from deepseek_optimizer.graph.attention_mode import AttentionMode, apply_mode
from deepseek_optimizer.graph.parallel import Parallel
from deepseek_optimizer.graph.parallel.shard import Units, even_spans
from deepseek_optimizer.graph.parallel.tensor import split
from deepseek_optimizer.graph.validate import check_graph
from deepseek_optimizer.models import build_graph
from support.family_configs import llama, mixtral, olmo2, phi3, qwen2
from support.models import CASES, assert_close_rows, random_ids, random_model, weights_of
from support.ranks import any_part, rank_runner
from support.steps import runner

DIVISIBLE = (
    "llama-gqa", "llama-tied", "llama-biases", "llama-mha", "llama-dynamic", "qwen2-gqa", "qwen2-windows", "qwen3-gqa",
    "qwen3-biases", "mistral-gqa", "mistral-tied-window", "ministral3-growing", "smollm3-nope", "granite-factors", "gemma-tied",
    "gemma2-limits", "gemma3_text-two-ropes", "ernie4_5-biases", "exaone4-types", "seed_oss-biases", "hunyuan_v1_dense-alpha",
    "stablelm-parallel", "starcoder2-window", "cohere2-types",
)  # fmt: skip


EXPERTS_AND_LATENTS = (
    "deepseek_v2-greedy", "deepseek_v2-groups", "deepseek_v2-biases", "deepseek_v3-groups", "deepseek_v3-direct",
    "deepseek_v32-indexer", "mixtral-window", "qwen3_moe-plain", "qwen3_moe-normalized", "qwen2_moe-shared",
)  # fmt: skip


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("case", DIVISIBLE)
def test_logits_are_those_of_the_whole_model(case, fused):
    model = random_model(CASES[case]())
    graph = build_graph(model.config)
    graph = rules.apply(graph)[0] if fused else graph
    weights, ids = weights_of(model), random_ids(model.config, 70)
    whole = runner(ReferenceBackend(), graph, weights).logits(ids, chunks=(33,))
    divided = rank_runner(graph, weights, 2).logits(ids, chunks=(33,))
    assert_close_rows(divided, whole, 1e-5)


def four_heads(case):
    """The config of a case, with a number of heads that 2 and 4 divide."""
    config = CASES[case]()
    if config.num_attention_heads % 4 and config.num_key_value_heads == config.num_attention_heads:
        config.num_attention_heads = config.num_key_value_heads = 4
    return config


@pytest.mark.parametrize("parallel", [Parallel(2), Parallel(expert=2)], ids=str)
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("case", EXPERTS_AND_LATENTS)
def test_latent_attention_and_experts(case, fused, parallel):
    model = random_model(four_heads(case))
    graph = build_graph(model.config)
    graph = rules.apply(graph)[0] if fused else graph
    weights, ids = weights_of(model), random_ids(model.config, 70)
    whole = runner(ReferenceBackend(), graph, weights).logits(ids, chunks=(33,))
    assert_close_rows(rank_runner(graph, weights, parallel).logits(ids, chunks=(33,)), whole, 1e-5)


def test_experts_may_be_divided_in_both_ways():
    model = random_model(four_heads("deepseek_v3-groups"))
    graph = rules.apply(build_graph(model.config))[0]
    weights, ids = weights_of(model), random_ids(model.config, 40)
    whole = runner(ReferenceBackend(), graph, weights).logits(ids)
    assert_close_rows(rank_runner(graph, weights, Parallel(tensor=2, expert=2)).logits(ids), whole, 1e-5)


def test_results_of_routed_and_shared_experts_are_added_once():
    graph = rules.apply(build_graph(four_heads("deepseek_v3-groups")))[0]
    ops = [node.op for node in split(graph, 0, Parallel(expert=2), any_part).graph.nodes]
    assert ops.count("all_reduce") == 2 * graph.cache.layers


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_any_number_of_ranks(ranks):
    """Widths of the MLP and the vocabulary need not be multiples of the number of ranks. Hidden states are whole."""
    model = random_model(llama(num_attention_heads=12, num_key_value_heads=12, head_dim=8))
    graph = rules.apply(build_graph(model.config))[0]
    weights, ids = weights_of(model), random_ids(model.config, 40)
    whole, divided = runner(ReferenceBackend(), graph, weights), rank_runner(graph, weights, ranks)
    assert_close_rows(divided.logits(ids), whole.logits(ids), 1e-5)
    assert_close_rows(divided.hidden(ids), whole.hidden(ids), 1e-5)


@pytest.mark.parametrize("mode", [AttentionMode("sliding", window=40, sinks=4), AttentionMode("sparse", 32, 4, 160)])
def test_attention_modes(mode):
    model = random_model(qwen2())
    graph = apply_mode(rules.apply(build_graph(model.config))[0], mode)[0]
    weights, ids = weights_of(model), random_ids(model.config, 300)
    whole = runner(ReferenceBackend(), graph, weights).logits(ids)
    assert_close_rows(rank_runner(graph, weights, 2).logits(ids), whole, 1e-5)


@pytest.mark.parametrize("case", ["llama-gqa", "llama-tied", "qwen3-biases", "gemma-tied"])
def test_shards_are_well_formed_and_cover_each_weight_once(case):
    plain = build_graph(CASES[case]())
    fused = rules.apply(plain)[0]
    shapes, ranks = weight_shapes(plain), 2
    shards = [split(fused, rank, Parallel(ranks), any_part) for rank in range(ranks)]
    for rank, shard in enumerate(shards):
        check_graph(shard.graph)
        assert shard.parts == split(plain, rank, Parallel(ranks), any_part).parts
        assert [n.op for n in shard.graph.nodes] == [n.op for n in shards[0].graph.nodes]
    for name in shards[0].parts:
        covered = torch.zeros(shapes[name], dtype=torch.int64)
        for shard in shards:
            part = shard.parts[name]
            covered[tuple(slice(None) if s is None else slice(*s) for s in (part.rows, part.cols)[: covered.ndim])] += 1
        assert bool((covered == 1).all()), name


def test_a_shared_matrix_of_embedding_and_head_is_whole():
    shard = split(build_graph(llama(tie_word_embeddings=True)), 1, Parallel(2), any_part)
    (view, (source, rows)), vocab = next(iter(shard.views.items())), llama().vocab_size
    assert source == "model.embed_tokens.weight" and source not in shard.parts and rows[1] == vocab
    assert any(view in node.weights for node in shard.graph.nodes if node.op == "lm_head")


@pytest.mark.parametrize(
    ("config", "ranks", "error", "text"),
    [
        (llama, 5, ConfigError, "does not divide the model's"),
        (lambda: llama(num_key_value_heads=1), 2, ConfigError, "num_key_value_heads"),
        (lambda: mixtral(num_local_experts=2, num_experts_per_tok=1), 3, ConfigError, "does not divide the model's"),
        (olmo2, 2, UnsupportedModelError, "rms_norm needs all elements"),
        (phi3, 2, UnsupportedModelError, "several matrices in one"),
        (CASES["deepseek_v4-mixed"], 2, UnsupportedModelError, "or their latents"),
        (CASES["lfm2-mixed"], 2, UnsupportedModelError, "load it without parallel"),
    ],
)
def test_refused(config, ranks, error, text):
    with pytest.raises(error, match=text):
        split(build_graph(config()), 0, Parallel(ranks), any_part)


def test_matrices_are_divided_between_blocks_only():
    with pytest.raises(ConfigError, match="blocks of 32; use fewer processes"):
        split(build_graph(CASES["qwen3-gqa"]()), 0, Parallel(2), lambda name: Units(16, 32))
    graph = build_graph(llama(head_dim=32, intermediate_size=160))
    parts = split(graph, 1, Parallel(2), lambda name: Units(16, 32)).parts
    assert parts["model.layers.0.mlp.down_proj.weight"].cols == (64, 160)


def test_even_spans():
    assert even_spans(160, 2, 32) == [(0, 64), (64, 160)]
    assert even_spans(100, 3, 32) == [(0, 32), (32, 64), (64, 100)]
