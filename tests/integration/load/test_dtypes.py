"""The dtypes of a loaded model's plain tensors are those that Transformers loads the checkpoint in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from deepseek_optimizer import load_model
from deepseek_optimizer.graph.min_formats import fp32_weights
from deepseek_optimizer.integration.bind.graphs import whole_graph
from support.models import CASES, random_model

FAMILIES = ("deepseek_v4-mixed", "deepseek_v3-groups", "gpt_oss-sinks", "qwen3_5_moe_text-experts", "qwen2-gqa")
NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def plain_dtypes(model: Any) -> dict[str, torch.dtype]:
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    return {name: tensor.dtype for name, tensor in tensors.items() if tensor.is_floating_point()}


def set_dtype(folder: Path, name: str | None) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config.pop("dtype")
    path.write_text(json.dumps(config if name is None else {**config, "dtype": name}))


def check(folder: Path, expected: torch.dtype) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    assert theirs.config.dtype == expected
    ours = load_model(folder, precision="int8", backend="reference")
    assert ours.config.dtype == expected
    exact = fp32_weights(whole_graph(ours))  # more of these than Transformers does, this package holds in fp32
    dtypes, own = plain_dtypes(theirs), plain_dtypes(ours)
    assert len(own) > 5
    assert own == {name: torch.float32 if name in exact else dtypes[name] for name in own}


@pytest.mark.parametrize(
    ("case", "dtype"),
    # Transformers cannot run DeepSeek-V4 in fp16, since it multiplies such states with matrices in fp32.
    [(case, dtype) for case in FAMILIES for dtype in NAMES if (case, dtype) != ("deepseek_v4-mixed", torch.float16)],
)
def test_as_the_config_says(tmp_path: Path, case: str, dtype: torch.dtype) -> None:
    """Whatever dtype the tensors are stored in, and whatever names they have: those of DeepSeek-V4 are the published ones."""
    random_model(CASES[case](), dtype=torch.float32 if dtype == torch.bfloat16 else dtype).save_pretrained(tmp_path)
    set_dtype(tmp_path, NAMES[dtype])
    check(tmp_path, dtype)


@pytest.mark.parametrize("case", FAMILIES[:2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_as_stored_where_the_config_says_nothing(tmp_path: Path, case: str, dtype: torch.dtype) -> None:
    random_model(CASES[case](), dtype=dtype).save_pretrained(tmp_path)
    set_dtype(tmp_path, None)
    check(tmp_path, dtype)


@pytest.mark.parametrize("case", FAMILIES[:2])
def test_packed_models_keep_their_dtype(tmp_path: Path, case: str) -> None:
    random_model(CASES[case](), dtype=torch.bfloat16).save_pretrained(tmp_path / "float")
    model = load_model(tmp_path / "float", precision="int8", backend="reference")
    model.save_pretrained(tmp_path / "packed")
    assert json.loads((tmp_path / "packed" / "config.json").read_text())["dtype"] == "bfloat16"
    again = load_model(tmp_path / "packed", backend="reference")
    assert again.config.dtype == torch.bfloat16
    assert plain_dtypes(again) == plain_dtypes(model)
