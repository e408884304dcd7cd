"""GGUF files of every family: the logits of Transformers' model that the file was written from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from deepseek_optimizer import load_model
from deepseek_optimizer.backends.cpu import unavailable_reason
from deepseek_optimizer.integration.load.pack_checkpoint import pack_checkpoint
from support.gguf_converter import rounded, write_gguf
from support.gguf_families import CASES
from support.models import assert_close_rows, random_ids, random_model, transformers_logits


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0"])
@pytest.mark.filterwarnings("ignore:.*rounds them again")
def test_logits(tmp_path: Path, name: str, kind: str) -> None:
    case = CASES[name]
    model = rounded(random_model(case.config()), kind)
    path = write_gguf(tmp_path / "m.gguf", case, model, kind)
    settings: dict[str, Any] = {} if kind == "Q8_0" else {"precision": "fp32"}
    loaded = load_model(path, backend="reference", kv_cache="fp32", **settings)
    ids = random_ids(model.config, 60)
    with torch.no_grad():
        assert_close_rows(loaded(torch.tensor([ids])).logits[0], transformers_logits(model, ids))


@pytest.mark.skipif(unavailable_reason() is not None, reason="no native build")
@pytest.mark.parametrize(
    "name", ["gemma3", "phi3-longrope", "glm4_moe", "qwen3_5_moe", "qwen3_next", "kimi_linear", "lfm2_moe"]
)
def test_logits_natively(tmp_path: Path, name: str) -> None:
    """In fp32, so that kernels do not round."""
    case = CASES[name]
    model = random_model(case.config())
    path = write_gguf(tmp_path / "m.gguf", case, model)
    ids = random_ids(model.config, 60)
    with torch.no_grad():
        logits = load_model(path, backend="cpu", precision="fp32", kv_cache="fp32")(torch.tensor([ids])).logits[0]
    assert_close_rows(logits, transformers_logits(model, ids))


@pytest.mark.parametrize("name", ["gemma2", "qwen3_5", "kimi_linear"])
@pytest.mark.filterwarnings("ignore:.*rounds them again")
def test_converted(tmp_path: Path, name: str) -> None:
    """Converted shard by shard: the same model as the file's."""
    case = CASES[name]
    path = write_gguf(tmp_path / "m.gguf", case, random_model(case.config()), "Q8_0")
    pack_checkpoint(path, tmp_path / "packed", {"backend": "reference"}, shard_bytes=1, tell=lambda message: None)
    model = load_model(path, backend="reference")
    ids = torch.tensor([random_ids(model.config, 20)])
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path / "packed", backend="reference")(ids).logits, model(ids).logits)
