"""Tokenizers of checkpoints, and tokenizers that do not belong to the checkpoint."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer

from deepseek_optimizer.checkpoint import load_tokenizer, open_checkpoint
from deepseek_optimizer.errors import CheckpointError
from support.checkpoint_files import ARRAY, STRING, U32, gguf_bytes, gguf_tensor, model_tensors, model_values


def with_bytes(architecture: str, rows: int) -> bytes:
    """A GGUF model with a byte-level vocabulary of 256 bytes, two merges and an end marker: 259 tokens."""
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "he", "ll", "<|end|>"]
    values = model_values(architecture) | {
        "tokenizer.ggml.model": (STRING, "gpt2"),
        "tokenizer.ggml.pre": (STRING, "qwen2"),
        "tokenizer.ggml.tokens": (ARRAY, (STRING, tokens)),
        "tokenizer.ggml.merges": (ARRAY, (STRING, ["h e", "l l"])),
        "tokenizer.ggml.eos_token_id": (U32, 258),
    }
    del values["tokenizer.ggml.scores"], values["tokenizer.ggml.bos_token_id"]
    tensors = [gguf_tensor("token_embd.weight", torch.randn(rows, 64)), *model_tensors(architecture, tied=True)[1:]]
    return gguf_bytes(values, tensors)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_gguf_tokenizer_equals_auto_tokenizer(tmp_path: Path, architecture: str) -> None:
    (tmp_path / "m.gguf").write_bytes(with_bytes(architecture, 259))
    ours = load_tokenizer(open_checkpoint(tmp_path / "m.gguf"))
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    text = "hello héllo  12345\n\n<|end|>"
    assert ours(text)["input_ids"] == theirs(text)["input_ids"] and ours.decode(ours(text)["input_ids"]) == text
    assert ours.eos_token_id == theirs.eos_token_id == 258
    assert ours.backend_tokenizer.to_str() == theirs.backend_tokenizer.to_str()


def test_larger_than_the_embedding(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(with_bytes("llama", 258))
    with pytest.raises(CheckpointError, match="259 tokens, but the embedding only 258 rows"):
        load_tokenizer(open_checkpoint(tmp_path / "m.gguf"))


def test_tokenizer_of_a_directory(tiny_model: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(open_checkpoint(tiny_model))
    assert tokenizer.decode(tokenizer("abc")["input_ids"]) == "abc"
    for name in ("config.json", "model.safetensors"):
        shutil.copy(tiny_model / name, tmp_path)
    with pytest.raises(CheckpointError, match="no tokenizer"):
        load_tokenizer(open_checkpoint(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no tokenizer"):
        load_tokenizer(open_checkpoint(tmp_path))
