"""Tables of supported models with the memory that they need, computed from their configurations.

Weights: every matrix in the format named, at its packed size with scales and padding; matrices that no precision makes smaller
than int8 (`graph/min_formats.py`) at least in int8; routers and norms as they are stored. Cache: one sequence of `CONTEXT`
tokens, keys and values (or latents) in bf16, whole blocks. Not counted: Python and PyTorch themselves, the plan's buffers,
MTP layers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from .markdown import table

CONTEXT = 4096
FORMATS = ("int4", "int8", "bf16")


@dataclass(frozen=True, eq=False)
class Model:
    """A published checkpoint. `fields`: of its config.json, where they decide shapes and are not the family's defaults."""

    name: str
    family: str
    fields: Mapping[str, Any]


def _dense(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, vocab: int, **more: Any) -> dict[str, Any]:
    return {
        "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "vocab_size": vocab, "tie_word_embeddings": False, **more,
    }  # fmt: skip


def _v2(hidden: int, inner: int, layers: int, heads: int, experts: int, chosen: int, moe: int, **more: Any) -> dict[str, Any]:
    return _dense(
        hidden, inner, layers, heads, heads, 102400, n_routed_experts=experts, num_experts_per_tok=chosen,
        moe_intermediate_size=moe, n_shared_experts=2, first_k_dense_replace=1, kv_lora_rank=512, qk_nope_head_dim=128,
        qk_rope_head_dim=64, v_head_dim=128, **more,
    )  # fmt: skip


MODELS = (
    Model("HuggingFaceTB/SmolLM2-135M-Instruct", "llama", _dense(576, 1536, 30, 9, 3, 49152, tie_word_embeddings=True)),
    Model("deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", "qwen2", _dense(1536, 8960, 28, 12, 2, 151936)),
    Model("deepseek-ai/deepseek-llm-7b-chat", "llama", _dense(4096, 11008, 30, 32, 32, 102400)),
    Model("deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", "qwen2", _dense(3584, 18944, 28, 28, 4, 152064)),
    Model("deepseek-ai/DeepSeek-R1-Distill-Llama-8B", "llama", _dense(4096, 14336, 32, 32, 8, 128256)),
    Model("deepseek-ai/DeepSeek-R1-0528-Qwen3-8B", "qwen3", _dense(4096, 12288, 36, 32, 8, 151936, head_dim=128)),
    Model("deepseek-ai/DeepSeek-R1-Distill-Qwen-14B", "qwen2", _dense(5120, 13824, 48, 40, 8, 152064)),
    Model(
        "deepseek-ai/DeepSeek-V2-Lite-Chat", "deepseek_v2",
        _v2(2048, 10944, 27, 16, 64, 6, 1408, q_lora_rank=None, topk_method="greedy", n_group=1, topk_group=1,
            routed_scaling_factor=1.0, norm_topk_prob=False),
    ),
    Model("deepseek-ai/DeepSeek-R1-Distill-Qwen-32B", "qwen2", _dense(5120, 27648, 64, 40, 8, 152064)),
    Model("deepseek-ai/DeepSeek-R1-Distill-Llama-70B", "llama", _dense(8192, 28672, 80, 64, 8, 128256)),
    Model(
        "deepseek-ai/DeepSeek-V2-Chat", "deepseek_v2",
        _v2(5120, 12288, 60, 128, 160, 6, 1536, q_lora_rank=1536, topk_method="group_limited_greedy", n_group=8, topk_group=3,
            routed_scaling_factor=16.0, norm_topk_prob=False),
    ),
    Model("deepseek-ai/DeepSeek-V3, deepseek-ai/DeepSeek-R1", "deepseek_v3", {}),
)  # fmt: skip


@dataclass(frozen=True)
class Need:
    """Bytes of weights by format, bytes of cache a token in bf16, and parameters."""

    parameters: int
    weights: Mapping[str, int]
    cache_per_token: int

    def total(self, format_name: str) -> int:
        """With one sequence of `CONTEXT` tokens."""
        return self.weights[format_name] + self.cache_per_token * CONTEXT


@cache
def need(model: Model) -> Need:
    """Sizes from the shapes of the model, made on PyTorch's meta device: no weights, no download."""
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    from deepseek_optimizer.backends.reference import ReferenceBackend
    from deepseek_optimizer.cache.block_manager import BLOCK_TOKENS
    from deepseek_optimizer.checkpoint.manifest import PackedEntry
    from deepseek_optimizer.config import larger
    from deepseek_optimizer.graph.analysis import stack_shapes
    from deepseek_optimizer.graph.min_formats import min_formats
    from deepseek_optimizer.integration.bind.swap import sites
    from deepseek_optimizer.models import build_graph

    config = CONFIG_MAPPING[model.family](**model.fields)
    graph = build_graph(config)
    with torch.device("meta"):
        made = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    stacks, least = stack_shapes(graph), min_formats(graph)
    shapes = {
        weight: stacks.get(weight) or tuple(getattr(site.module, leaf).shape)
        for site in sites(made, graph)
        for leaf, weight in site.weights.items()
    }
    plain = sum(p.nbytes for name, p in made.named_parameters() if name not in shapes)
    weights = {
        name: plain + sum(math.prod(PackedEntry(larger(name, least.get(w, name)), shape).tiles) for w, shape in shapes.items())
        for name in FORMATS
    }
    per_token = ReferenceBackend().block_bytes(graph, "bf16") // BLOCK_TOKENS
    return Need(sum(p.numel() for p in made.parameters()), weights, per_token)


def short_table(names: tuple[str, ...] = ("model", "parameters", "int4", "int8", "bf16")) -> str:
    """For the READMEs: weights and the cache of one sequence together, in GB."""
    rows = []
    for model in MODELS:
        needs = need(model)
        rows.append((_title(model), _count(needs.parameters), *(_gb(needs.total(name)) for name in FORMATS)))
    return table(names, rows)


def long_table() -> str:
    """For the page on models: weights and cache apart."""
    header = ("model", "family", "parameters", *(f"weights, {name}" for name in FORMATS), "cache of 1,000 tokens")
    return table(header, _long_rows())


def _long_rows() -> Iterator[tuple[str, ...]]:
    for model in MODELS:
        needs = need(model)
        weights = (_gb(needs.weights[name]) for name in FORMATS)
        cache_mb = f"{needs.cache_per_token * 1000 / 1e6:,.0f} MB"
        yield f"`{model.name}`".replace(", ", "`, `"), f"`{model.family}`", _count(needs.parameters), *weights, cache_mb


def _title(model: Model) -> str:
    return model.name.rpartition("/")[2] if "," not in model.name else model.name.replace("deepseek-ai/", "")


def _gb(size: int) -> str:
    return f"{size / 1e9:,.2f} GB" if size < 1e9 else f"{size / 1e9:,.1f} GB"


def _count(parameters: int) -> str:
    return f"{parameters / 1e6:,.0f} M" if parameters < 1e9 else f"{parameters / 1e9:,.1f} B"
