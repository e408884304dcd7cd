"""What an engine reads for a token, out of the files it runs on: whatever format its head and its embedding have counts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deepseek_optimizer.bench.traffic import Reads, traffic_of

__all__ = ["Reads", "of_gguf", "of_ours"]


def of_ours(path: Path, fields: Mapping[str, Any]) -> Reads:
    """Of a packed checkpoint: what its plan says."""
    from deepseek_optimizer import load_model

    return traffic_of(load_model(path, **fields))


def of_gguf(path: Path) -> Reads:
    """In llama.cpp: every matrix but an embedding that is not the head too; keys and values in fp16."""
    from gguf import GGUFReader

    reader = GGUFReader(path)

    def field(name: str) -> int:
        found = reader.get_field(f"{architecture}.{name}")
        assert found is not None, name
        return int(found.contents())

    architecture = reader.fields["general.architecture"].contents()
    sizes = {tensor.name: int(tensor.n_bytes) for tensor in reader.tensors if len(tensor.shape) == 2}
    if "output.weight" in sizes:
        del sizes["token_embd.weight"]
    head_dim = field("embedding_length") // field("attention.head_count")
    kv_bytes = 2 * 2 * field("block_count") * field("attention.head_count_kv") * head_dim
    return Reads(sum(sizes.values()), kv_bytes)
