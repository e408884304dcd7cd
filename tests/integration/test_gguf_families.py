"""GGUF files of every family: the logits of Transformers' model that the file was written from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from deepseek_optimizer import load_model
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
