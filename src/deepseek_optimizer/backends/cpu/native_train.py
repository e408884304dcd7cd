"""Signatures of the functions of `native/include/dso_train.h` for `native.library()`: (result, arguments) by name.

`library()` rejects a shared library that lacks any of these functions.
"""

from __future__ import annotations

import ctypes as C
from typing import Any

I32, I64, PTR = C.c_int32, C.c_int64, C.c_void_p
TYPES = {"float32": 0, "bfloat16": 1}  # DSO_TYPE_*

PRODUCT_FORMS = {"nt": 0, "nn": 1, "tn": 2}  # DSO_PRODUCT_*
ADD, EXACT = 1, 2


class Matrix(C.Structure):
    """dso_train_matrix."""

    _fields_ = [("data", PTR), ("ld", I64), ("next", I64), ("type", I32), ("reserved", I32)]


_PRODUCTS: dict[str, tuple[Any, list[Any]]] = {
    "dso_train_product": (I32, [PTR, I32, I32, I64, I64, I64, PTR, PTR, PTR, PTR]),
    "dso_train_grouped_product": (I32, [PTR, I32, I32, I32, PTR, I64, I64, I64, PTR, PTR, PTR]),
    "dso_train_column_sums": (I32, [PTR, I32, I64, I64, PTR, PTR]),
}


class TrainUpdate(C.Structure):
    """dso_train_update."""

    _fields_ = [
        *((name, PTR) for name in ("parameter", "low", "gradient", "m", "v", "m_scale", "v_scale")),
        ("count", I64), ("master", I32), ("moments", I32), ("gradient_type", I32),
        *((n, C.c_float) for n in ("gradient_scale", "beta1", "rest1", "beta2", "rest2", "bias2", "eps", "step", "decay")),
        ("key", C.c_uint32 * 4),
    ]  # fmt: skip


class TrainRotation(C.Structure):
    """dso_train_rotation."""

    _fields_ = [
        *((n, I64) for n in ("batch", "tokens", "heads", "head_dim", "half", "x_batch", "x_token", "x_head")),
        *((n, I64) for n in ("out_batch", "out_token", "out_head", "angle_batch", "angle_token")),
        *((n, I32) for n in ("type", "halves", "interleaved", "backward")),
    ]


class TrainNumbers(C.Structure):
    """dso_train_numbers."""

    _fields_ = [("data", PTR), ("count", I64), ("type", I32), ("reserved", I32)]


_ELEMENTWISE: dict[str, tuple[Any, list[Any]]] = {
    "dso_train_adamw": (I32, [PTR, PTR, I64]),
    "dso_train_squares": (I32, [PTR, PTR, I64, PTR, PTR]),
    "dso_train_scale": (I32, [PTR, PTR, C.c_float, I32, PTR]),
    "dso_train_rows_summed": (I32, [PTR, I64, I64, PTR, PTR, I64, I64, PTR, I32]),
    "dso_train_rms_norm": (I32, [PTR, I64, I64, PTR, PTR, C.c_float, PTR, PTR]),
    "dso_train_rms_norm_backward": (I32, [PTR, I64, I64, PTR, PTR, PTR, PTR, PTR, PTR]),
    "dso_train_swiglu": (I32, [PTR, I64, I64, PTR, PTR, PTR]),
    "dso_train_swiglu_backward": (I32, [PTR, I64, I64, PTR, PTR, PTR, PTR, PTR, PTR]),
    "dso_train_rope": (I32, [PTR, PTR, PTR, PTR, PTR, PTR]),
    "dso_train_cross_entropy": (I32, [PTR, I64, I64, PTR, PTR, I64, C.c_float, I32, PTR]),
}


class TrainHeads(C.Structure):
    """dso_train_heads."""

    _fields_ = [("data", PTR), ("row", I64), ("token", I64), ("head", I64)]


class TrainAttention(C.Structure):
    """dso_train_attention."""

    _fields_ = [
        *((name, I32) for name in ("type", "heads", "kv_heads", "qk_width", "v_width")), ("scale", C.c_float),
        *((name, I64) for name in ("window", "rows", "row_tokens", "sequences")), ("begin", PTR), ("end", PTR),
        *((name, TrainHeads) for name in ("q", "k", "v", "o")), ("state", PTR),
        *((name, TrainHeads) for name in ("o_grad", "q_grad", "k_grad", "v_grad")),
    ]  # fmt: skip


_ATTENTION: dict[str, tuple[Any, list[Any]]] = {
    "dso_train_attention_forward": (I32, [PTR, PTR]),
    "dso_train_attention_backward": (I32, [PTR, PTR]),
}

SIGNATURES: dict[str, tuple[Any, list[Any]]] = {**_PRODUCTS, **_ELEMENTWISE, **_ATTENTION}
