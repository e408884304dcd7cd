"""The small trained DeepSeek-V3 model next to the repository: real routers, acceptance rates and perplexities.

Its path is the environment variable DSO_TINY_V3, or ../shared/models/tiny-v3; if it does not exist, tests that need it are
skipped.
"""

from __future__ import annotations

import os
import re
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")


def tiny_v3() -> Path:
    """The model's folder; skips the test if it does not exist."""
    given = os.environ.get("DSO_TINY_V3")
    path = Path(given) if given else Path(__file__).resolve().parents[3] / "shared" / "models" / "tiny-v3"
    if not (path / "config.json").is_file():
        pytest.skip(f"the trained model tiny-v3 is not at {path}; set DSO_TINY_V3 to its folder")
    return path


def documents(path: Path, count: int, length: int) -> list[list[int]]:
    """`count` held-out documents, truncated to `length` tokens; shorter ones are skipped."""
    tokens = np.load(path / "val_tokens.npy").astype(np.int64)
    starts = np.flatnonzero(tokens == 0)
    result = [tokens[a:b][:length].tolist() for a, b in zip(starts, [*starts[1:], len(tokens)], strict=True) if b - a >= length]
    assert len(result) >= count, f"only {len(result)} documents of {length} tokens"
    return result[:count]


@cache
def weights(path: Path) -> dict[str, torch.Tensor]:
    """Every weight in float32, including MTP layers, experts stacked as in Transformers."""
    stored = {name: tensor.float() for name, tensor in load_file(path / "model.safetensors").items()}
    experts: dict[str, dict[int, dict[str, torch.Tensor]]] = {}
    for name in list(stored):
        if result := _EXPERT.fullmatch(name):
            experts.setdefault(result[1], {}).setdefault(int(result[2]), {})[result[3]] = stored.pop(name)
    for path_, parts in experts.items():
        ordered = [parts[i] for i in range(len(parts))]
        stored[f"{path_}.gate_up_proj"] = torch.stack([torch.cat((p["gate"], p["up"])) for p in ordered])
        stored[f"{path_}.down_proj"] = torch.stack([p["down"] for p in ordered])
    return stored
