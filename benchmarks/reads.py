"""What an engine reads for a token, out of the files it runs on: whatever format its head and its embedding have counts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deepseek_optimizer.bench.memory_traffic import Experts, Reads, traffic_of

__all__ = ["Reads", "of_gguf", "of_ours"]

_PERIODS = {"gemma3": 6, "gpt-oss": 2}  # one of so many layers has no window


def of_ours(path: Path, fields: Mapping[str, Any]) -> Reads:
    """Of a packed checkpoint: what its plan says."""
    from deepseek_optimizer import load_model

    return traffic_of(load_model(path, **fields))


def of_gguf(path: Path) -> Reads:
    """In llama.cpp: every matrix but an embedding that is not the head too, of experts those chosen; the cache in fp16, and
    states in fp32."""
    from gguf import GGUFReader

    reader = GGUFReader(path)

    def field(name: str) -> int:
        found = reader.get_field(f"{architecture}.{name}")
        assert found is not None, name
        return int(found.contents())

    architecture = reader.fields["general.architecture"].contents()
    sizes = {tensor.name: int(tensor.n_bytes) for tensor in reader.tensors if len(tensor.shape) >= 2}
    if "output.weight" in sizes:
        del sizes["token_embd.weight"]
    stacks = {name: size for name, size in sizes.items() if "_exps." in name}
    experts = tuple(Experts(size, field("expert_count"), field("expert_used_count")) for size in stacks.values())
    weights = sum(sizes.values()) - sum(stacks.values())
    if architecture == "deepseek2":  # latents, and keys that all heads share
        return Reads(weights, 2 * field("block_count") * field("attention.key_length"), experts=experts)
    stored = f"{architecture}.attention.key_length" in reader.fields
    head_dim = field("attention.key_length") if stored else field("embedding_length") // field("attention.head_count")
    layer = 2 * 2 * field("attention.head_count_kv") * head_dim  # bytes of a token's key and value
    layers = sum(name.endswith(".attn_k.weight") for name in sizes)
    windowed = layers - layers // _PERIODS[architecture] if architecture in _PERIODS else 0
    windows = ((float(layer * windowed), field("attention.sliding_window")),) if windowed else ()
    recurrent = [math.prod(tensor.shape) for tensor in reader.tensors if tensor.name.endswith(".ssm_conv1d.weight")]
    states = 0
    for weights_of_taps in recurrent:
        taps = field("ssm.conv_kernel")
        states += field("ssm.state_size") * field("ssm.inner_size") + weights_of_taps // taps * (taps - 1)
    return Reads(weights, layer * (layers - windowed), experts=experts, windows=windows, state_bytes=4 * states)
