"""Checkpoints that other quantisers wrote: GPTQ, AWQ, compressed-tensors, bitsandbytes, FP8 and MXFP4.

`find_*` of each method's file recognises its layers by name, and checks names, shapes and dtypes; `QuantisedCheckpoint`
presents them as float weights.
"""

from __future__ import annotations

from .checkpoint import METHODS, QuantisedCheckpoint, method_of

__all__ = ["METHODS", "QuantisedCheckpoint", "method_of"]
