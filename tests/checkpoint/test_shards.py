"""Files of a checkpoint: cut between layers, planned from shapes alone, mapped back bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from deepseek_optimizer.checkpoint import open_checkpoint
from deepseek_optimizer.checkpoint.layout import Stored, bytes_of, layout_of
from deepseek_optimizer.checkpoint.packed import write_safetensors
from deepseek_optimizer.checkpoint.shards import plan_shards, write_index, write_shard
from deepseek_optimizer.quant import PackedMatrix, pack
from support.packed_files import packed_fields


def model(layers: int = 4) -> dict[str, Stored]:
    generator = torch.Generator().manual_seed(0)

    def matrix(rows: int, cols: int) -> PackedMatrix:
        return pack(torch.randn(rows, cols, generator=generator), "int4")

    made: dict[str, Stored] = {"model.embed_tokens.weight": matrix(33, 32)}
    for i in range(layers):
        made[f"model.layers.{i}.a.weight"] = matrix(32, 64)  # 4 tiles: a multiple of 64 bytes
        made[f"model.layers.{i}.b.weight"] = matrix(16, 32)  # 1 tile: not
        made[f"model.layers.{i}.norm.weight"] = torch.randn(32, generator=generator).bfloat16()
        made[f"model.layers.{i}.odd"] = torch.randn(3, generator=generator)
    return made | {"model.norm.weight": torch.ones(32), "lm_head.weight": matrix(33, 32)}


def meta(tensors: dict[str, Stored]) -> dict[str, Stored]:
    return {
        n: PackedMatrix(t.format, t.rows, t.cols, t.data.to("meta")) if isinstance(t, PackedMatrix) else t.to("meta")
        for n, t in tensors.items()
    }


def test_a_layout_is_known_before_the_data(tmp_path: Path) -> None:
    tensors = model(1)
    planned, made = layout_of(meta(tensors)), layout_of(tensors)
    assert planned == made
    write_safetensors(tmp_path / "x", tensors)
    data = (tmp_path / "x").read_bytes()
    assert data.startswith(planned.header) and len(data) == planned.size
    assert data == planned.header + b"".join(bytes_of(tensors[name]) for name in planned.order)


def test_layers_stay_whole() -> None:
    tensors = model(4)
    layer = sum(bytes_of(t).nbytes for n, t in tensors.items() if ".layers.0." in n)
    for size in (1, layer, 2 * layer, 3 * layer + 1, 100 * layer):
        shards = plan_shards(meta(tensors), size)
        assert sorted(n for s in shards for n in s.layout.order) == sorted(tensors)
        places = {n: i for i, s in enumerate(shards) for n in s.layout.order}
        assert len({places[n] for n in tensors if ".layers.2." in n}) == 1
        assert [s.layout.size - len(s.layout.header) <= max(size, layer) for s in shards] == [True] * len(shards)
        if size == 1:
            assert len(shards) == 6 and shards[0].name == "model-00001-of-00006.safetensors"
        if size == 100 * layer:
            assert [s.name for s in shards] == ["model.safetensors"]


@pytest.mark.parametrize("size", [1, 4000, 1 << 20])
def test_write_and_map(tmp_path: Path, size: int) -> None:
    tensors = model()
    shards = plan_shards(meta(tensors), size)
    weights = iter([(n, tensors[n]) for s in shards for n in s.layout.order])
    for shard in shards:
        with open(tmp_path / shard.name, "wb") as file:
            write_shard(file, shard, weights)
    write_index(tmp_path, shards)
    assert (tmp_path / "model.safetensors.index.json").exists() == (len(shards) > 1)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **packed_fields(tensors)}))
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.kind == "packed" and set(checkpoint.tensors) == set(tensors)
        for name, value in tensors.items():
            if isinstance(value, PackedMatrix):
                mapped = checkpoint.packed(name, value.format)
                assert torch.equal(mapped.data, value.data)
                if value.nbytes % 64 == 0:
                    assert mapped.data.data_ptr() % 64 == 0 and checkpoint.info(name).offset % 64 == 0
            else:
                assert torch.equal(checkpoint.read(name), value)


def test_tensors_in_pieces(tmp_path: Path) -> None:
    tensors = {"a.weight": torch.randn(6, 4), "empty": torch.empty(0, 3), "b.weight": torch.randn(7)}
    (shard,) = plan_shards(meta(tensors))
    pieces = ((name, piece) for name in shard.layout.order for piece in tensors[name].split(2))
    with open(tmp_path / "model.safetensors", "wb") as file:
        write_shard(file, shard, pieces)
    stored = load_file(tmp_path / "model.safetensors")
    assert stored.keys() == tensors.keys() and all(torch.equal(stored[name], tensors[name]) for name in tensors)


def test_weights_that_deviate_from_the_plan(tmp_path: Path) -> None:
    tensors = model(1)
    (shard,) = plan_shards(meta(tensors))
    weights = [(n, tensors[n]) for n in shard.layout.order]
    with open(tmp_path / "x", "wb") as file:
        with pytest.raises(AssertionError, match="came where"):
            write_shard(file, shard, iter(weights[::-1]))
        name = weights[-1][0]
        with pytest.raises(AssertionError, match="bytes instead of"):
            write_shard(file, shard, iter([*weights[:-1], (name, torch.ones(99))]))
        size = shard.layout.sizes[-1]
        with pytest.raises(AssertionError, match=f"the weights end where {shard.name} needs {size} more bytes of {name}"):
            write_shard(file, shard, iter(weights[:-1]))
        with pytest.raises(AssertionError, match=f"needs 1 more bytes of {name}"):
            write_shard(file, shard, iter([*weights[:-1], (name, torch.zeros(size - 1, dtype=torch.uint8))]))


def test_an_empty_tensor_may_come_first() -> None:
    tensors: dict[str, Stored] = {"empty": torch.empty(0, 3), "model.layers.0.a.weight": torch.randn(7)}
    (shard,) = plan_shards(meta(tensors))
    assert sorted(shard.layout.order) == sorted(tensors)
