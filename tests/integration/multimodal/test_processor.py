"""Processors without torchvision, which some of Transformers' need for videos."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("PIL", reason="needs Pillow")

from deepseek_optimizer.chat.pictures import load_processor
from support.picture_processors import PLACEHOLDER, make_pair, picture


@pytest.fixture(params=["qwen2_5_vl", "qwen3_vl"])
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """A family, its processor, and a folder with its parts for pictures."""
    model, processor = make_pair(request.param)
    processor.tokenizer.chat_template = processor.chat_template
    for part in (model.config, processor.tokenizer, processor.image_processor):
        part.save_pretrained(tmp_path)
    return request.param, processor, tmp_path


def test_pictures_need_no_torchvision(saved: Any) -> None:
    import torch

    family, processor, folder = saved
    loaded = load_processor(str(folder))
    assert loaded.chat_template == processor.chat_template and f"{type(loaded).__name__}:" in repr(loaded)
    given = {"text": [f"{PLACEHOLDER[family]}what"], "images": [[picture(40, 24)]], "return_tensors": "pt"}
    want, found = processor(**given), loaded(**given)
    assert set(want) == set(found) and all(torch.equal(want[name], found[name]) for name in want)


def test_videos_are_refused(saved: Any) -> None:
    import numpy as np

    if importlib.util.find_spec("torchvision") is not None:
        pytest.skip("torchvision is installed")
    _, _, folder = saved
    with pytest.raises(ImportError, match="needs torchvision for videos"):
        load_processor(str(folder))(text=["<|video_pad|>"], videos=[np.zeros((4, 8, 8, 3), dtype=np.uint8)])
