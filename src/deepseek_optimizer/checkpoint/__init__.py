"""Checkpoint files: validated when they are opened, and read as a stream.

`open_checkpoint` supports directories of safetensors files (float, or quantized by one of `quantized.METHODS`), directories
packed by this package, and .gguf files.
"""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import CheckpointError
from .atomic import atomic_directory
from .base import Checkpoint, TensorInfo, all_finite
from .directory import SafetensorsCheckpoint, open_files, read_config
from .gguf import GgufCheckpoint
from .language_part import VISION, language_part, packed_language_part
from .load import LoadProgress, check_tensors, stream_weights
from .manifest import Manifest
from .packed import PackedCheckpoint, is_packed
from .published_names import joined_parts, with_parameter_names
from .quantized import METHODS, QuantizedCheckpoint, method_of
from .stacks import transposed_stacks
from .tokenizer import check_tokenizer_beside, check_tokenizer_size, load_tokenizer


def open_checkpoint(path: str | os.PathLike[str], whole: bool = False) -> Checkpoint:
    """Opens and validates a checkpoint; only headers are read.

    Args:
        path: a directory with config.json and safetensors files (float, quantized or packed), or a .gguf file.
        whole: open a multimodal model as it is, instead of its language model (see `language_part`).

    Raises:
        CheckpointError: it is damaged, incomplete, or contains only pickled weights, which are never opened. The error names
            the file and the tensor.
        UnsupportedModelError: its GGUF architecture, or its kind of quantization, is not supported.
    """
    path = Path(path)
    if not os.path.exists(path):  # unlike Path.exists, False for an invalid name
        raise CheckpointError("does not exist", file=path)
    if not os.path.isdir(path):
        if path.suffix in (".safetensors", ".bin", ".pt", ".pth", ".ckpt"):
            raise CheckpointError("is a weight file; give the path of its directory, which has config.json too", file=path)
        return GgufCheckpoint(path)
    config = read_config(path)
    files, tensors = open_files(path)
    try:
        published = config
        if is_packed(config):
            config, tensors, left_out = (config, tensors, []) if whole else packed_language_part(config, tensors)
            checkpoint: SafetensorsCheckpoint = PackedCheckpoint(path, config, files, tensors)
            checkpoint.left_out, checkpoint.whole = left_out, published if left_out else None
            return checkpoint
        config, tensors, left_out = (config, tensors, []) if whole else language_part(config, tensors)
        family = config.get("model_type")
        tensors, parts = joined_parts(with_parameter_names(tensors, config), family)
        kind = QuantizedCheckpoint if method_of(config) else SafetensorsCheckpoint
        checkpoint = kind(path, config, files, tensors)
        checkpoint.left_out, checkpoint.parts_of = left_out, parts
        checkpoint.whole = published if any(line.startswith(VISION) for line in left_out) else None
        checkpoint.transposed = transposed_stacks(tensors, family)
        return checkpoint
    except BaseException:
        for file in files.values():
            file.close()
        raise


__all__ = [
    "METHODS",
    "Checkpoint",
    "GgufCheckpoint",
    "LoadProgress",
    "Manifest",
    "PackedCheckpoint",
    "QuantizedCheckpoint",
    "SafetensorsCheckpoint",
    "TensorInfo",
    "all_finite",
    "atomic_directory",
    "check_tensors",
    "check_tokenizer_beside",
    "check_tokenizer_size",
    "load_tokenizer",
    "open_checkpoint",
    "stream_weights",
]
