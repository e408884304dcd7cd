"""The dtypes that Transformers loads a model's tensors in."""

from __future__ import annotations

import re
from typing import Any

import torch

from .modules import Packed


def model_dtype(model: Any) -> torch.dtype:
    """The dtype that a model was loaded in. Its first parameter may have another one: DeepSeek-V4's norms are always fp32."""
    own: torch.dtype = next((module.dtype for module in model.modules() if isinstance(module, Packed)), model.dtype)
    return own


def kept_in_fp32(model: Any, dtype: torch.dtype) -> re.Pattern[str]:
    """What is found in the names of the tensors that are fp32 in a model that Transformers loads in this dtype.

    `_keep_in_fp32_modules` without `_strict` is for fp16 only.
    """
    names: set[str] = set()
    for module in model.modules():
        if dtype in (torch.bfloat16, torch.float16):
            names |= set(getattr(module, "_keep_in_fp32_modules_strict", None) or ())
        if dtype == torch.float16:
            names |= set(getattr(module, "_keep_in_fp32_modules", None) or ())
    return re.compile("|".join(map(re.escape, sorted(names))) or "$^")
