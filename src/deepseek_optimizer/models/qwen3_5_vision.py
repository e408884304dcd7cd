"""Qwen3.5, the vision tower: that of Qwen3-VL without features for the language model's layers."""

from __future__ import annotations

from . import qwen3_vl_vision
from .fields import Fields
from .vision import Tower


def build(fields: Fields) -> Tower:
    return qwen3_vl_vision.build(fields, "qwen3_5_vision")
