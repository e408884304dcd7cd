"""Stacks of experts: read one by one or merged, packed matrix by matrix, mapped again; errors name the tensor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from deepseek_optimizer.checkpoint import Checkpoint, open_checkpoint, stream_weights
from deepseek_optimizer.checkpoint import base as checkpoint_base
from deepseek_optimizer.checkpoint.stacks import matrices_per_expert, parts, surplus_expert
from deepseek_optimizer.errors import CheckpointError
from deepseek_optimizer.quant import PackedMatrix, PackedStack, get_format
from support.checkpoint_files import safetensors_bytes
from support.packed_files import save_packed

EXPERTS, INTERMEDIATE, HIDDEN = 5, 40, 72  # neither a multiple of 16 rows nor of 32 columns
BASE = "model.layers.1.mlp.experts"
GATE_UP, DOWN = f"{BASE}.gate_up_proj", f"{BASE}.down_proj"
SHAPES: dict[str, tuple[int, ...]] = {
    GATE_UP: (2 * EXPERTS, INTERMEDIATE, HIDDEN), DOWN: (EXPERTS, HIDDEN, INTERMEDIATE), "norm.weight": (HIDDEN,),
}  # fmt: skip
WANTED = {GATE_UP: "int4", DOWN: "int8", "norm.weight": None}


def one_by_one(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = {"norm.weight": torch.ones(HIDDEN)}
    for e in range(EXPERTS):
        for role, shape in {
            "gate": (INTERMEDIATE, HIDDEN),
            "up": (INTERMEDIATE, HIDDEN),
            "down": (HIDDEN, INTERMEDIATE),
        }.items():
            made[f"{BASE}.{e}.{role}_proj.weight"] = torch.randn(shape, generator=generator).bfloat16()
    return made


def merged(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Merged as by Transformers when loading."""
    each = {r: torch.stack([tensors[f"{BASE}.{e}.{r}_proj.weight"] for e in range(EXPERTS)]) for r in ("gate", "up", "down")}
    both = torch.cat([each["gate"], each["up"]], 1)
    return {"norm.weight": tensors["norm.weight"], GATE_UP: both, DOWN: each["down"]}


def checkpoint_of(folder: Path, tensors: dict[str, torch.Tensor]) -> Checkpoint:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(safetensors_bytes(tensors))
    return open_checkpoint(folder)


def matrices(tensors: dict[str, torch.Tensor], name: str) -> list[torch.Tensor]:
    roles = ("gate", "up") if name == GATE_UP else ("down",)
    return [tensors[f"{BASE}.{e}.{role}_proj.weight"] for e in range(EXPERTS) for role in roles]


@pytest.mark.parametrize("form", [dict, merged])
@pytest.mark.parametrize("panel", [1, 3000, 1 << 21])
def test_separate_and_merged_experts_are_packed_matrix_by_matrix(
    tmp_path: Path, form: Any, panel: int, monkeypatch: Any
) -> None:
    monkeypatch.setattr(checkpoint_base, "PANEL_ELEMENTS", panel)
    tensors = one_by_one()
    loaded = dict(stream_weights(checkpoint_of(tmp_path, form(tensors)), WANTED, SHAPES))
    assert loaded.keys() == WANTED.keys()
    for name in (GATE_UP, DOWN):
        stack = loaded[name]
        assert isinstance(stack, PackedStack) and stack.shape == SHAPES[name] and stack.format == WANTED[name]
        for i, matrix in enumerate(matrices(tensors, name)):
            assert torch.equal(stack.matrix(i).data, get_format(stack.format).pack(matrix)), (name, i)


@pytest.mark.parametrize("form", [dict, merged])
@pytest.mark.parametrize("size, pieces", [(1, EXPERTS), (11_000, 3), (1 << 30, 1)])
def test_pieces_of_a_stack_are_whole_experts(tmp_path: Path, form: Any, size: int, pieces: int) -> None:
    checkpoint, made = checkpoint_of(tmp_path, form(one_by_one())), dict[str, list[Any]]()
    whole = dict(stream_weights(checkpoint, WANTED, SHAPES))
    for name, piece in stream_weights(checkpoint, WANTED, SHAPES, piece_bytes=size):
        made.setdefault(name, []).append(piece)
    assert len(made[GATE_UP]) == pieces
    for name in (GATE_UP, DOWN):
        stacks = made[name]
        assert torch.equal(torch.cat([part.data for part in stacks]), whole[name].data)
        assert all(len(part.data) == part.count and part.count % matrices_per_expert(name) == 0 for part in stacks)
        assert all(part.data.nbytes <= max(size, whole[name].nbytes // EXPERTS) for part in stacks)


def test_the_format_of_a_stack_is_the_largest_of_its_parts(tmp_path: Path) -> None:
    tensors = one_by_one()
    assert checkpoint_of(tmp_path / "a", tensors).own_format(GATE_UP, SHAPES[GATE_UP]) == "bf16"
    tensors[f"{BASE}.3.up_proj.weight"] = torch.randn(INTERMEDIATE, HIDDEN)
    checkpoint = checkpoint_of(tmp_path / "b", tensors)
    assert (checkpoint.own_format(GATE_UP, SHAPES[GATE_UP]), checkpoint.own_format(DOWN, SHAPES[DOWN])) == ("fp32", "bf16")


def left_out(name: str) -> Any:
    return lambda tensors: tensors.pop(name)


def put(name: str, *shape: int) -> Any:
    return lambda tensors: tensors.update({name: torch.zeros(shape)})


@pytest.mark.parametrize(
    "form, damage, tensor, why",
    [
        (dict, left_out(f"{BASE}.3.up_proj.weight"), f"{BASE}.3.up_proj.weight", "lacks"),
        (dict, left_out(f"{BASE}.4.down_proj.weight"), f"{BASE}.4.down_proj.weight", "lacks"),
        (dict, put(f"{BASE}.5.down_proj.weight", HIDDEN, INTERMEDIATE), f"{BASE}.5.down_proj.weight", "5 experts"),
        (dict, put(f"{BASE}.0.gate_proj.weight", HIDDEN, INTERMEDIATE), f"{BASE}.0.gate_proj.weight", r"requires \(40, 72\)"),
        (dict, put(f"{BASE}.0.gate_proj.bias", INTERMEDIATE), f"{BASE}.0.gate_proj.bias", "does not have"),
        (merged, left_out(GATE_UP), f"{BASE}.0.gate_proj.weight", "lacks"),
        (merged, put(GATE_UP, EXPERTS, INTERMEDIATE, HIDDEN), GATE_UP, r"requires \(5, 80, 72\)"),
        (merged, put(DOWN, EXPERTS + 1, HIDDEN, INTERMEDIATE), DOWN, r"requires \(5, 72, 40\)"),
        (merged, put(f"{BASE}.0.gate_proj.weight", INTERMEDIATE, HIDDEN), f"{BASE}.0.gate_proj.weight", "under another name"),
        (dict, put(f"{BASE}.03.up_proj.weight", INTERMEDIATE, HIDDEN), f"{BASE}.03.up_proj.weight", "under another name"),
    ],
)
def test_errors_are_named_before_reading(tmp_path: Path, form: Any, damage: Any, tensor: str, why: str) -> None:
    tensors = form(one_by_one())
    damage(tensors)
    with pytest.raises(CheckpointError, match=why) as caught:
        stream_weights(checkpoint_of(tmp_path, tensors), WANTED, SHAPES)  # never iterated
    assert caught.value.tensor == tensor and str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("form, name", [(dict, f"{BASE}.2.up_proj.weight"), (merged, GATE_UP)])
def test_nan_weights_name_the_stored_tensor(tmp_path: Path, form: Any, name: str) -> None:
    tensors = {n: t.clone() for n, t in form(one_by_one()).items()}
    tensors[name].view(-1)[-1] = torch.nan
    with pytest.raises(CheckpointError, match="NaN or infinite") as caught:
        list(stream_weights(checkpoint_of(tmp_path, tensors), WANTED, SHAPES))
    assert caught.value.tensor == name


def test_packed_stacks_are_saved_and_mapped(tmp_path: Path) -> None:
    loaded = dict(stream_weights(checkpoint_of(tmp_path / "float", one_by_one()), WANTED, SHAPES))
    matrix = PackedMatrix("int8", 33, 48, get_format("int8").pack(torch.randn(33, 48)))
    save_packed(tmp_path / "packed", {}, {**loaded, "a.weight": matrix})
    section = json.loads((tmp_path / "packed" / "config.json").read_text())["packed_manifest"]
    assert section["modules"][GATE_UP] == {"format": "int4", "shape": [2 * EXPERTS, INTERMEDIATE, HIDDEN]}
    with open_checkpoint(tmp_path / "packed") as checkpoint:
        assert checkpoint.shape(GATE_UP) == SHAPES[GATE_UP] and checkpoint.own_format(GATE_UP, SHAPES[GATE_UP]) == "int4"
        again = dict(stream_weights(checkpoint, {**WANTED, "a.weight": "int8"}, {**SHAPES, "a.weight": (33, 48)}))
        floats = checkpoint.read(DOWN)
        with pytest.raises(CheckpointError, match="is packed as int4, not int8"):
            checkpoint.packed_stack(GATE_UP, "int8", (2 * EXPERTS, INTERMEDIATE, HIDDEN))
    for name in (GATE_UP, DOWN):
        assert torch.equal(again[name].data, loaded[name].data) and again[name].shape == SHAPES[name]
    assert torch.equal(floats[3], get_format("int8").unpack(loaded[DOWN].matrix(3).data, HIDDEN, INTERMEDIATE))


def test_a_packed_stack_of_the_wrong_size(tmp_path: Path) -> None:
    loaded = dict(stream_weights(checkpoint_of(tmp_path / "float", one_by_one()), WANTED, SHAPES))
    save_packed(tmp_path / "packed", {}, loaded)
    with (
        open_checkpoint(tmp_path / "packed") as checkpoint,
        pytest.raises(CheckpointError, match="the config requires") as caught,
    ):
        stream_weights(checkpoint, WANTED, {**SHAPES, DOWN: (EXPERTS - 1, HIDDEN, INTERMEDIATE)})
    assert caught.value.tensor == DOWN


@pytest.mark.parametrize(
    "change, why",
    [
        ({"shape": [EXPERTS, HIDDEN]}, "does not describe it|missing"),
        ({"shape": [EXPERTS + 1, HIDDEN, INTERMEDIATE]}, r"must be U8 \(6, 5, 2, "),
        ({"shape": [EXPERTS, 1, HIDDEN, INTERMEDIATE]}, "two or three"),
        ({"shape": [0, HIDDEN, INTERMEDIATE]}, "two or three"),
    ],
)
def test_false_entries_of_stacks(tmp_path: Path, change: dict[str, Any], why: str) -> None:
    stack = PackedStack(
        "int8", EXPERTS, HIDDEN, INTERMEDIATE, torch.zeros(EXPERTS, 5, 2, get_format("int8").tile_bytes, dtype=torch.uint8)
    )
    save_packed(tmp_path / "m", {}, {DOWN: stack})
    path = tmp_path / "m" / "config.json"
    config = json.loads(path.read_text())
    config["packed_manifest"]["modules"][DOWN].update(change)
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=why):
        open_checkpoint(tmp_path / "m")


def test_missing_and_extra_parts() -> None:
    assert [p.tensor for p in parts(GATE_UP, (4, 1, 1), ())] == [
        f"{BASE}.{e}.{role}_proj.weight" for e in (0, 1) for role in ("gate", "up")
    ]
    assert [p.row for p in parts(GATE_UP, (4, 7, 1), {GATE_UP})] == [0, 7, 14, 21]
    with pytest.raises(ValueError, match="not a stack"):
        parts("model.layers.0.mlp.up_proj.weight", (1, 1, 1), ())
    assert surplus_expert("model.layers.1.mlp.up_proj.weight", SHAPES) is None
    assert surplus_expert("model.layers.9.mlp.experts.4.up_proj.weight", SHAPES) is None
