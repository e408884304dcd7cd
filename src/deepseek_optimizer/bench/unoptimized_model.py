"""Loads the unoptimized model from the same files with Transformers."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from ..errors import ConfigError


def load_unoptimized(path: str | Path, dtype: Any) -> Any:
    """Transformers' own model in `dtype`, from a directory or a GGUF file, which is dequantized.

    Raises:
        ConfigError: a packed checkpoint, or one of another quantizer whose package Transformers would need: they do not contain
            the original weights.
    """
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        GgufConfig,
    )

    from ..checkpoint import METHODS
    from ..integration.load.resolve import resolve
    from ..quant import QUANT_METHOD

    path = resolve(path)
    if path.suffix != ".gguf":
        config = AutoConfig.from_pretrained(path)
        section = getattr(config, "quantization_config", None) or {}
        method = section.get("quant_method") if isinstance(section, dict) else None
        if method == QUANT_METHOD:
            raise ConfigError(f"{path} is packed; give the original model with --reference to compare with")
        if method in METHODS and method != "fp8":
            raise ConfigError(f"{path} is quantized by {method}; give the original model with --reference to compare with")
        whole = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING
        auto = AutoModelForImageTextToText if whole else AutoModelForCausalLM
        return auto.from_pretrained(path, dtype=dtype).eval()
    model = AutoModelForCausalLM.from_pretrained(
        path.parent,
        gguf_file=path.name,
        dtype=dtype,
        quantization_config=GgufConfig(gguf_file=path.name, dequantize=True),
    )
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model.eval()


def dequantized(gguf: Path) -> Path:
    """Converts a GGUF file to a bf16 checkpoint beside it with Transformers, once. Returns its path."""
    target = gguf.with_name(gguf.stem + "-bf16")
    if target.exists():
        return target
    import torch
    from transformers import AutoTokenizer

    partial = Path(tempfile.mkdtemp(dir=gguf.parent))
    try:
        load_unoptimized(gguf, torch.bfloat16).save_pretrained(partial)
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(partial)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target
