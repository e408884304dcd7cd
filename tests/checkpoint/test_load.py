"""stream_weights: checks before reading, the tensors it yields, and its memory."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from deepseek_optimizer import quant
from deepseek_optimizer.checkpoint import Checkpoint, LoadProgress, all_finite, open_checkpoint, stream_weights
from deepseek_optimizer.checkpoint import base as checkpoint_base
from deepseek_optimizer.errors import CheckpointError, ConfigError
from support import warm_python
from support.checkpoint_files import safetensors_bytes

TENSORS = {
    "m.a.weight": torch.randn(40, 70),
    "m.b.weight": torch.randn(100, 32).bfloat16(),
    "m.c.weight": torch.randn(17, 64).half(),
    "norm.weight": torch.ones(70),
}
WANTED = {"norm.weight": None, "m.a.weight": "int4", "m.b.weight": "bf16", "m.c.weight": "q4_1"}
SHAPES = {name: tuple(tensor.shape) for name, tensor in TENSORS.items()}


def checkpoint_of(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> Checkpoint:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(safetensors_bytes(tensors))
    return open_checkpoint(tmp_path)


@pytest.mark.parametrize("panel", [1, 700, 1 << 21])
def test_all_tensors(tmp_path: Path, panel: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_base, "PANEL_ELEMENTS", panel)
    seen: list[LoadProgress] = []
    loaded = dict(stream_weights(checkpoint_of(tmp_path, TENSORS), WANTED, SHAPES, progress=seen.append))
    assert loaded.keys() == TENSORS.keys()
    for name, format in WANTED.items():
        if format is None:
            assert torch.equal(loaded[name], TENSORS[name])
        else:
            assert (loaded[name].rows, loaded[name].cols, loaded[name].format) == (*SHAPES[name], format)
            assert torch.equal(loaded[name].data, quant.get_format(format).pack(TENSORS[name]))
    assert [p.done_tensors for p in seen] == [1, 2, 3, 4] and seen[-1].done_bytes == seen[-1].total_bytes
    assert seen[-1].seconds_left == 0 and all(p.seconds_left >= 0 for p in seen)
    assert LoadProgress("x", 0, 10, 0, 1, 1.0).seconds_left is None
    assert LoadProgress("x", 25, 100, 1, 4, 2.0).seconds_left == 6.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_all_finite(dtype: torch.dtype) -> None:
    extremes = [torch.finfo(dtype).max, -torch.finfo(dtype).max, torch.finfo(dtype).tiny, -0.0]
    values = torch.tensor(extremes * 6, dtype=dtype).view(4, 6)
    assert all_finite(values) and all_finite(values.t()[::2]) and all_finite(values[:0])
    for wrong in (torch.nan, -torch.nan, torch.inf, -torch.inf):
        broken = values.clone()
        broken[2, 4] = wrong
        assert not all_finite(broken) and not all_finite(broken[:, ::2]) and all_finite(broken[:, ::3])


def test_the_given_packer_is_used(tmp_path: Path) -> None:
    calls: list[str] = []

    def packer(weight: torch.Tensor, name: str, out: torch.Tensor | None = None) -> torch.Tensor:
        calls.append(name)
        return quant.reference_packer(weight, name, out)

    list(stream_weights(checkpoint_of(tmp_path, TENSORS), WANTED, SHAPES, packer=packer))
    assert sorted(calls) == ["bf16", "int4", "q4_1"]


@pytest.mark.parametrize(
    "wanted, shapes, tensor, why",
    [
        ({**WANTED, "gone.weight": None}, {**SHAPES, "gone.weight": (1,)}, "gone.weight", "lacks gone.weight"),
        ({"norm.weight": None}, SHAPES, "m.a.weight", "contains m.a.weight, m.b.weight, m.c.weight, which the model"),
        (WANTED, {**SHAPES, "m.a.weight": (70, 40)}, "m.a.weight", r"\(40, 70\), but the config requires \(70, 40\)"),
        ({**WANTED, "norm.weight": "int8"}, SHAPES, "norm.weight", "not a matrix"),
    ],
)
def test_checked_before_anything_is_read(tmp_path: Path, wanted: dict, shapes: dict, tensor: str, why: str) -> None:
    with pytest.raises(CheckpointError, match=why) as caught:
        stream_weights(checkpoint_of(tmp_path, TENSORS), wanted, shapes)  # never iterated
    assert caught.value.tensor == tensor


def test_unknown_format(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="int5"):
        stream_weights(checkpoint_of(tmp_path, TENSORS), {**WANTED, "m.a.weight": "int5"}, SHAPES)


def test_buffers_of_old_checkpoints_are_skipped(tmp_path: Path) -> None:
    more = {**TENSORS, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(3), "lm_head.weight": torch.ones(2, 2)}
    checkpoint = checkpoint_of(tmp_path, more)
    with pytest.raises(CheckpointError, match="contains lm_head.weight, which"):
        stream_weights(checkpoint, WANTED, SHAPES)
    ignored = (r"lm_head\.weight", r".*inv_freq")
    assert len(list(stream_weights(checkpoint, WANTED, SHAPES, ignored=ignored))) == 4


@pytest.mark.parametrize("name", ["m.a.weight", "m.b.weight", "m.c.weight", "norm.weight"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_weights_name_the_tensor(tmp_path: Path, name: str, bad: float) -> None:
    tensors = {n: t.clone() for n, t in TENSORS.items()}
    tensors[name].view(-1)[-1] = bad
    with pytest.raises(CheckpointError, match="NaN or infinite") as caught:
        list(stream_weights(checkpoint_of(tmp_path, tensors), WANTED, SHAPES))
    assert caught.value.tensor == name


CHILD = """
import json, resource, sys
import torch
from deepseek_optimizer.checkpoint import open_checkpoint, stream_weights
from deepseek_optimizer.quant import pack
torch.set_num_threads(1)
path, format = sys.argv[1:]
pack(torch.randn(64, 64), format)  # whatever is made at first use
def status(key):
    return int(next(l for l in open("/proc/self/status") if l.startswith(key)).split()[1]) * 1024
open("/proc/self/clear_refs", "w").write("5")  # the high-water mark starts here
before = status("VmRSS")
checkpoint = open_checkpoint(path)
wanted = {n: format for n in checkpoint.tensors}
kept = dict(stream_weights(checkpoint, wanted, {n: checkpoint.shape(n) for n in wanted}))
packed = sum(m.nbytes for m in kept.values())
print(json.dumps({"peak": status("VmHWM") - before, "resident": status("VmRSS") - before, "packed": packed}))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 MB in bf16, most of it one matrix."""
    directory = tmp_path_factory.mktemp("large")
    tensors = {f"m.{i}.weight": torch.randn(2048, 4096).bfloat16() for i in range(4)}
    tensors["m.big.weight"] = torch.randn(8192, 2048).repeat(7, 1).bfloat16()
    (directory / "config.json").write_text("{}")
    (directory / "model.safetensors").write_bytes(safetensors_bytes(tensors))
    return directory


@pytest.mark.parametrize("format", ["int4", "bf16"])
def test_peak_memory_is_the_packed_size_and_panels(large: Path, format: str) -> None:
    """The largest matrix alone is 235 MB: it is never entirely in memory together with its packed form, nor mapped."""
    run = warm_python.run(CHILD, large, format)
    assert run.returncode == 0, run.stderr
    used = json.loads(run.stdout)
    assert used["packed"] > 80e6
    assert used["peak"] < used["packed"] + 64e6, used
    assert used["resident"] < used["packed"] + 48e6, used


def test_weights_too_large_for_their_format_are_named(tmp_path: Path) -> None:
    """They would become NaN: int4 has fp16 scales of an eighth of the largest weight of a group."""
    large = {**TENSORS, "m.a.weight": TENSORS["m.a.weight"] * 1e6}
    checkpoint = checkpoint_of(tmp_path, large)
    with pytest.raises(CheckpointError, match=r"m\.a\.weight.*has weights of up to .*e\+06, which are too large for int4"):
        dict(stream_weights(checkpoint, WANTED, SHAPES))
    loaded = dict(stream_weights(checkpoint, {**WANTED, "m.a.weight": "fp8"}, SHAPES))
    assert quant.unpack(loaded["m.a.weight"]).isfinite().all()
