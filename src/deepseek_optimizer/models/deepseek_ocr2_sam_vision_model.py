"""DeepSeek-OCR-2, the first encoder: SAM's layers, on pictures of several sizes."""

from __future__ import annotations

from .fields import Fields
from .sam_vision_model import build_sam
from .vision import Tower


def build(fields: Fields) -> Tower:
    return build_sam(fields, "deepseek_ocr2_sam_vision_model")
