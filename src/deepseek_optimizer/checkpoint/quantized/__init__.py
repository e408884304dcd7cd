"""Checkpoints that other quantizers wrote: GPTQ, AWQ, compressed-tensors, bitsandbytes, FP8 and MXFP4.

`find_*` of each method's file recognizes its layers by name, and checks names, shapes and dtypes; `QuantizedCheckpoint`
presents them as float weights.
"""

from __future__ import annotations

from .checkpoint import METHODS, QuantizedCheckpoint, method_of

__all__ = ["METHODS", "QuantizedCheckpoint", "method_of"]
