"""The functions of `native/include/dso_train.h`, as `native.library()` types them: (result, arguments) by name.

A function stands here only once the library that is in use has it: `library()` refuses one that lacks any.
"""

from __future__ import annotations

import ctypes as C
from typing import Any

I32, I64, PTR = C.c_int32, C.c_int64, C.c_void_p
TYPES = {"float32": 0, "bfloat16": 1}  # DSO_TYPE_*

_PRODUCTS: dict[str, tuple[Any, list[Any]]] = {}

_ELEMENTWISE: dict[str, tuple[Any, list[Any]]] = {}

_ATTENTION: dict[str, tuple[Any, list[Any]]] = {}

SIGNATURES: dict[str, tuple[Any, list[Any]]] = {**_PRODUCTS, **_ELEMENTWISE, **_ATTENTION}
