"""llama.cpp's own quantizer, `llama_model_quantize`, called in its shared library.

The library comes prebuilt from npm: `npm pack @node-llama-cpp/linux-x64`, unpacked; its folder has libllama*.so and
libggml*.so.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

FTYPES = {"Q4_0": 2, "Q3_K_M": 12, "IQ3_XXS": 23, "IQ4_XS": 30}  # llama.h, `enum llama_ftype`
_BUFFER = 8 << 30  # the default of the last field, by which the layout is recognized


class _Importance(ctypes.Structure):
    """llama.h, `llama_model_imatrix_data`: a list of these ends with one without a name."""

    _fields_ = (("name", ctypes.c_char_p), ("data", ctypes.POINTER(ctypes.c_float)), ("size", ctypes.c_size_t))


class _Parameters(ctypes.Structure):
    """llama.h, `llama_model_quantize_params`."""

    _fields_ = (
        ("nthread", ctypes.c_int32), ("ftype", ctypes.c_int), ("output_type", ctypes.c_int), ("embedding_type", ctypes.c_int),
        ("allow_requantize", ctypes.c_bool), ("quantize_output", ctypes.c_bool), ("only_copy", ctypes.c_bool),
        ("pure", ctypes.c_bool), ("keep_split", ctypes.c_bool), ("dry_run", ctypes.c_bool),
        ("imatrix", ctypes.POINTER(_Importance)), ("kv_overrides", ctypes.c_void_p), ("tensor_types", ctypes.c_void_p),
        ("prune_layers", ctypes.c_void_p), ("max_buffer", ctypes.c_size_t),
    )  # fmt: skip


class LlamaCppQuantizer:
    """Args:
    folder: with the shared libraries.

    Raises:
        OSError: a library is missing.
        RuntimeError: this version has other parameters.
    """

    def __init__(self, folder: Path) -> None:
        for pattern in ("libggml-base.so*", "libggml.*so*", "libllama.*so*"):
            found = sorted(folder.glob(pattern))
            if not found:
                raise OSError(f"{folder} has no {pattern}; see {__name__}")
            self._library: Any = ctypes.CDLL(str(found[0]), mode=ctypes.RTLD_GLOBAL)
        self._library.llama_model_quantize_default_params.restype = _Parameters
        self._library.llama_model_quantize.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.POINTER(_Parameters))
        self._library.llama_model_quantize.restype = ctypes.c_uint32
        if self._library.llama_model_quantize_default_params().max_buffer != _BUFFER:
            raise RuntimeError(f"{found[0]} has other parameters than those in {__name__}; compare with its llama.h")

    def quantize(
        self, source: Path, target: Path, ftype: str, importance: Mapping[str, np.ndarray[Any, Any]], threads: int = 2
    ) -> None:
        """Writes a quantized GGUF file.

        Args:
            source: a GGUF file in floats.
            ftype: of `FTYPES`.
            importance: mean squares of the input columns of tensors, by their names in the file, as llama.cpp's importance
                matrix has them; all experts' one after the other.
        """
        parameters = self._library.llama_model_quantize_default_params()
        parameters.nthread, parameters.ftype = threads, FTYPES[ftype]
        rows = {name: np.ascontiguousarray(values, np.float32).reshape(-1) for name, values in importance.items()}
        entries = (_Importance * (len(rows) + 1))()
        for entry, (name, row) in zip(entries, rows.items(), strict=False):
            entry.name, entry.size = name.encode(), row.size
            entry.data = row.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        parameters.imatrix = entries
        if self._library.llama_model_quantize(bytes(source), bytes(target), ctypes.byref(parameters)):
            raise RuntimeError(f"llama.cpp could not quantize {source} to {ftype}")
