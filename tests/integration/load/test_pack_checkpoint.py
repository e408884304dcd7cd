"""Conversion from file to file: the same bytes as a loaded model saves, however often the conversion was killed on the way."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

from deepseek_optimizer import CheckpointError, ConfigError, load_model
from deepseek_optimizer.checkpoint import open_checkpoint
from deepseek_optimizer.integration.load import pack_checkpoint as module
from deepseek_optimizer.integration.load.pack_checkpoint import pack_checkpoint
from support import warm_python
from support.gguf_kquants import llama_file
from support.models import CASES, random_ids, random_model

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("float") / "model"
    random_model(CASES["qwen2-gqa"](), dtype=torch.bfloat16).save_pretrained(folder)
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.mark.parametrize("case", ["llama-tied", "llama-biases", "qwen3-gqa"])
@pytest.mark.parametrize("precision", ["auto", "fp32", "int4", "int3"])
def test_the_same_files_as_save_pretrained(tmp_path: Path, case: str, precision: str) -> None:
    random_model(CASES[case](), dtype=torch.bfloat16).save_pretrained(tmp_path / "float")
    load_model(tmp_path / "float", precision=precision).save_pretrained(tmp_path / "saved")
    pack_checkpoint(tmp_path / "float", tmp_path / "packed", {"precision": precision})
    assert content(tmp_path / "packed") == content(tmp_path / "saved")


@pytest.mark.parametrize("case", ["deepseek_v3-groups", "gpt_oss-sinks", "llama4_text-chunks", "deepseek_v4-mixed"])
def test_experts_in_pieces(tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PIECE_BYTES", 1)
    random_model(CASES[case](), dtype=torch.bfloat16).save_pretrained(tmp_path / "float")
    load_model(tmp_path / "float", precision="int4").save_pretrained(tmp_path / "saved")
    pack_checkpoint(tmp_path / "float", tmp_path / "packed", {"precision": "int4"})
    assert content(tmp_path / "packed") == content(tmp_path / "saved")
    assert json.loads((tmp_path / "packed" / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_gguf_file_and_its_notes(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(llama_file({"": "IQ3_S"}))
    with pytest.warns(UserWarning, match="rounds them again"):
        load_model(tmp_path / "m.gguf").save_pretrained(tmp_path / "saved")
    messages: list[str] = []
    pack_checkpoint(tmp_path / "m.gguf", tmp_path / "packed", {}, tell=messages.append)
    assert content(tmp_path / "packed") == content(tmp_path / "saved")
    assert len(messages) == 1 and "stored as IQ3_S converted to q4_1" in messages[0]


def test_several_files(tmp_path: Path, source: Path) -> None:
    pack_checkpoint(source, tmp_path / "packed", {"precision": "int8"}, shard_bytes=1)
    files = sorted(content(tmp_path / "packed"))
    assert [f for f in files if f.startswith("model-")] == [f"model-0000{i}-of-00005.safetensors" for i in range(1, 6)]
    assert INDEX in files and "model.safetensors" not in files
    one, many = load_model(source, precision="int8"), load_model(tmp_path / "packed")
    ids = torch.tensor([random_ids(one.config, 9)])
    assert torch.equal(one(ids).logits, many(ids).logits)
    with open_checkpoint(tmp_path / "packed") as checkpoint:
        assert checkpoint.kind == "packed"
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert torch.equal(one(ids).logits, theirs(ids).logits)


def test_a_packed_source_and_its_own_directory(tmp_path: Path, source: Path) -> None:
    """A packed checkpoint is copied; an existing target is replaced only on request."""
    pack_checkpoint(source, tmp_path / "a", {"precision": "int4"}, shard_bytes=1)
    pack_checkpoint(tmp_path / "a", tmp_path / "b", {}, shard_bytes=1)
    weights = {n: d for n, d in content(tmp_path / "a").items() if n.endswith("safetensors")}
    assert weights.items() <= content(tmp_path / "b").items()
    with pytest.raises(CheckpointError, match="exists already"):
        pack_checkpoint(source, tmp_path / "b", {"precision": "int8"})
    pack_checkpoint(source, tmp_path / "b", {"precision": "int8"}, overwrite=True)
    assert "model.safetensors" in content(tmp_path / "b") and INDEX not in content(tmp_path / "b")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


PROGRAM = """
import os, signal, sys
from deepseek_optimizer.integration.load import pack_checkpoint as module
left = int(sys.argv[3])
write = module.write_shard
def dying(file, shard, weights):
    global left
    if left == 0:  # in the midst of a shard
        file.write(shard.layout.header)
        os.kill(os.getpid(), signal.SIGKILL)
    left -= 1
    write(file, shard, weights)
module.write_shard = dying
module.pack_checkpoint(sys.argv[1], sys.argv[2], {"precision": "int4"}, shard_bytes=1)
"""


def killed(source: Path, out: Path, after: int) -> Path:
    """Runs a conversion that is killed after `after` shards; returns its temporary directory."""
    done = warm_python.run(PROGRAM, source, out, after)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not out.exists()
    (left,) = out.parent.glob(f".{out.name}.*.tmp")
    return left


def interrupted(source: Path, out: Path, after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same by Ctrl-C."""
    write, left = module.write_shard, [after]

    def stopping(file, shard, weights):
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        write(file, shard, weights)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "write_shard", stopping)
        pack_checkpoint(source, out, {"precision": "int4"}, shard_bytes=1)


def finish(source: Path, out: Path, precision: str = "int4") -> tuple[list[str], list[str]]:
    """The second run: returns its messages, and the shards that it wrote."""
    messages, written = [], []
    write = module.write_shard

    def noted(file, shard, weights):
        written.append(shard.name[:11])
        write(file, shard, weights)

    module.write_shard = noted
    try:
        pack_checkpoint(source, out, {"precision": precision}, shard_bytes=1, tell=messages.append)
    finally:
        module.write_shard = write
    assert [p.name for p in out.parent.iterdir() if p.name.startswith(".")] == []
    return messages, written


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("whole") / "out"
    pack_checkpoint(source, folder, {"precision": "int4"}, shard_bytes=1)
    return content(folder)


def test_killed_and_resumed(tmp_path: Path, source: Path, whole: dict[str, bytes]) -> None:
    left = killed(source, tmp_path / "out", after=2)
    kept = {p.name: p.stat().st_ino for p in (left / "files").iterdir() if not p.name.endswith(".part")}
    assert len(kept) == 2
    messages, written = finish(source, tmp_path / "out")
    assert len(messages) == 1 and "2 of 5 files are finished" in messages[0]
    assert written == ["model-00003", "model-00004", "model-00005"]
    assert content(tmp_path / "out") == whole
    assert all((tmp_path / "out" / name).stat().st_ino == inode for name, inode in kept.items())


def test_killed_twice_and_damaged(tmp_path: Path, source: Path, whole: dict[str, bytes]) -> None:
    killed(source, tmp_path / "out", after=1)
    left = killed(source, tmp_path / "out", after=2)  # two more
    files = sorted(p for p in (left / "files").iterdir() if p.suffix == ".safetensors")
    assert len(files) == 3
    os.truncate(files[0], files[0].stat().st_size - 64)
    messages, written = finish(source, tmp_path / "out")
    assert "2 of 5" in messages[0] and f"written again: {files[0].name}" in messages[0]
    assert written == ["model-00001", "model-00004", "model-00005"] and content(tmp_path / "out") == whole


def test_another_source_or_other_settings_start_over(
    tmp_path: Path, source: Path, whole: dict[str, bytes], monkeypatch
) -> None:
    interrupted(source, tmp_path / "out", 2, monkeypatch)
    messages, written = finish(source, tmp_path / "out", "int8")
    assert "another settings" in messages[0] and "starting over" in messages[0] and len(written) == 5
    shutil.rmtree(tmp_path / "out")
    other = shutil.copytree(source, tmp_path / "other")  # preserves modification times
    interrupted(other, tmp_path / "out", 2, monkeypatch)
    messages, written = finish(source, tmp_path / "out")  # the same files in another directory
    assert "resuming" in messages[0] and content(tmp_path / "out").keys() == whole.keys()
    shutil.rmtree(tmp_path / "out")
    interrupted(other, tmp_path / "out", 2, monkeypatch)
    os.utime(other / "model.safetensors")
    messages, written = finish(other, tmp_path / "out")
    assert "another source" in messages[0] and len(written) == 5


def test_another_layout_starts_over(tmp_path: Path, source: Path, whole: dict[str, bytes], monkeypatch) -> None:
    """An earlier commit of the same version may have packed the finished files in another layout of the same size."""
    with monkeypatch.context() as patch:
        patch.setattr(module, "VERSION", 3, raising=False)
        interrupted(source, tmp_path / "out", 2, monkeypatch)
    messages, written = finish(source, tmp_path / "out")
    assert "another layout version" in messages[0] and len(written) == 5 and content(tmp_path / "out") == whole


def test_a_full_disk_is_reported_first(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    monkeypatch.setattr(module, "write_shard", None)
    with pytest.raises(OSError, match=r"remain to be written, but only 0\.0 GB are free.*out"):
        pack_checkpoint(source, tmp_path / "out", {})
    assert not list(tmp_path.iterdir())


def test_errors_leave_nothing(tmp_path: Path, source: Path) -> None:
    with pytest.raises(ConfigError, match="kl_budget"):
        pack_checkpoint(source, tmp_path / "out", {"kl_budget": 0.1})
    broken = shutil.copytree(source, tmp_path / "broken")
    data = bytearray((broken / "model.safetensors").read_bytes())
    data[-2:] = b"\xff\xff"
    (broken / "model.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match="NaN"):
        pack_checkpoint(broken, tmp_path / "out", {}, shard_bytes=1)
    assert [p.name for p in tmp_path.iterdir()] == ["broken"]
