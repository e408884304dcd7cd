"""What an engine reads for a token, out of the files it runs on: whatever format its head and its embedding have counts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deepseek_optimizer.bench.memory_traffic import Experts, Reads, traffic_of

__all__ = ["Reads", "of_gguf", "of_ours"]


def of_ours(path: Path, fields: Mapping[str, Any]) -> Reads:
    """Of a packed checkpoint: what its plan says."""
    from deepseek_optimizer import load_model

    return traffic_of(load_model(path, **fields))


def of_gguf(path: Path) -> Reads:
    """In llama.cpp: every matrix but an embedding that is not the head too, of experts those chosen; the cache in fp16."""
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
    if architecture == "deepseek2":  # latents, and keys that all heads share
        numbers = field("block_count") * field("attention.key_length")
    else:
        stored = f"{architecture}.attention.key_length" in reader.fields
        head_dim = field("attention.key_length") if stored else field("embedding_length") // field("attention.head_count")
        numbers = 2 * field("block_count") * field("attention.head_count_kv") * head_dim
    return Reads(sum(sizes.values()) - sum(stacks.values()), 2 * numbers, experts=experts)
