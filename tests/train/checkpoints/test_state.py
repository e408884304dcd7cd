"""Saved states are restored with the same bits and types; values that would need pickle are rejected."""

from __future__ import annotations

import math
import random
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from deepseek_optimizer.errors import CheckpointError
from deepseek_optimizer.train.checkpoints.random_numbers import random_states, set_random_states
from deepseek_optimizer.train.checkpoints.state import read_state, sizes, write_state
from support.train_runs import differences

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.int16, torch.int8,
          torch.uint8, torch.bool, torch.uint16, torch.float8_e4m3fn, torch.float8_e5m2)  # fmt: skip


def test_round_trip(tmp_path: Path) -> None:
    state = {
        "tensors": {i: torch.arange(7).to(dtype) for i, dtype in enumerate(DTYPES)},
        "odd": [torch.tensor(3.5), torch.empty(0, 4), torch.arange(6).reshape(2, 3).T, torch.tensor([math.nan, -0.0])],
        "plain": (1, -2.5, 0.1 + 0.2, math.inf, None, True, "ä\0", [], {}, ()),
        "keys": {0: "a", "0": "b", None: "c", True: (1,), 1.5: [2]},
    }
    write_state(tmp_path / "s.safetensors", state)
    back = read_state(tmp_path / "s.safetensors")
    state["odd"][2] = state["odd"][2].contiguous()
    assert differences(state, back) == []
    assert [type(key) for key in back["keys"]] == [type(key) for key in state["keys"]]


def test_the_file_is_plain_safetensors(tmp_path: Path) -> None:
    write_state(tmp_path / "s.safetensors", {"state": {0: {"m": torch.ones(3, dtype=torch.bfloat16), "b": torch.ones(1)}}})
    loaded = safetensors.torch.load_file(tmp_path / "s.safetensors")
    assert loaded.keys() == {"/state/0/m", "/state/0/b"} and loaded["/state/0/m"].dtype == torch.bfloat16


def test_random_generators_continue_exactly(tmp_path: Path) -> None:
    random.gauss(0, 1), np.random.randn(3)
    write_state(tmp_path / "r.safetensors", random_states())
    drawn = (random.gauss(0, 1), np.random.randn(), torch.randn(2).tolist())
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    set_random_states(read_state(tmp_path / "r.safetensors"))
    assert (random.gauss(0, 1), np.random.randn(), torch.randn(2).tolist()) == drawn


@pytest.mark.parametrize("value", [object(), {1, 2}, lambda x: x, torch.zeros(2, dtype=torch.complex64)])
def test_values_that_need_pickle_are_rejected_by_name(tmp_path: Path, value: object) -> None:
    with pytest.raises(CheckpointError, match="/groups/0/x"):
        write_state(tmp_path / "s.safetensors", {"groups": [{"x": value}]})


@pytest.mark.parametrize("tree", ['{"tensor": "/gone"}', '{"code": 1}', "[{}]", "{", '{"dict": [[1]]}', '{"dict": [[[], 1]]}'])
def test_damaged_descriptions_are_typed_errors(tmp_path: Path, tree: str) -> None:
    safetensors.torch.save_file({"x": torch.ones(1)}, tmp_path / "s.safetensors", metadata={"state": tree})
    with pytest.raises(CheckpointError, match="s.safetensors"):
        read_state(tmp_path / "s.safetensors")


def test_other_files_are_rejected(tmp_path: Path) -> None:
    safetensors.torch.save_file({"x": torch.ones(1)}, tmp_path / "s.safetensors")
    with pytest.raises(CheckpointError, match="not a training state"):
        read_state(tmp_path / "s.safetensors")
    (tmp_path / "t.safetensors").write_bytes(b"\x80\x04evil")
    with pytest.raises(CheckpointError, match="at least 8"):
        read_state(tmp_path / "t.safetensors")


def test_sizes() -> None:
    assert sizes({"a": [torch.ones(3), (torch.ones(2, dtype=torch.int8),)], "b": 4}) == 14
