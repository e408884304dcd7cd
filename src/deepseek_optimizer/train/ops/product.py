"""The matrix products of training: y = x W^T, dx = dy W, dW = dy^T x, for single matrices and for groups of rows (experts).

Products are summed in fp32 (fp64 for fp64) and rounded once. If one of the two matrices is bf16, both are multiplied as bf16;
if both are fp32, as fp32. The native implementation packs blocks of both operands on the fly, so that neither is copied or
transposed as a whole.
"""

from __future__ import annotations

import ctypes as C
from typing import Any, Literal

import torch

from ...backends.cpu.buffers import address, strided
from ...backends.cpu.native_train import ADD, EXACT, PRODUCT_FORMS, Matrix
from . import native

Form = Literal["nt", "nn", "tn"]


def product(
    form: Form,
    a: torch.Tensor,
    b: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    add: bool = False,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """C [M, N] = op(a) op(b) (+ bias). Rows may have any stride.

    Args:
        form: "nt": a [M, K], b [N, K]; "nn": a [M, K], b [K, N]; "tn": a [K, M], b [K, N].
        bias: [N].
        out: the tensor to write C to; None: a new one.
        add: add C to `out` instead of overwriting it.
        dtype: dtype of a new `out`; None: that of a.

    Raises:
        ValueError: shapes do not match.
    """
    _check_product(form, a, b)
    if out is None:
        out = native.new(_sizes(form, a, b)[:2], a, dtype)
    _check_out("product", out, *_sizes(form, a, b)[:2])
    if native.usable(a, b, bias, out) and _is_matrix(out):
        torch.ops.dso.train_product(a, b, bias, out, form, add)
    elif on_tensor_cores(a, b):
        _put(tensor_core_product(form, a, b, bias), out, add)
    else:
        _put(product_reference(form, a, b, bias), out, add)
    return out


def on_tensor_cores(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether `tensor_core_product` supports these operands: on a CUDA device, one in bf16 and none in fp64."""
    dtypes = a.dtype, b.dtype
    return a.is_cuda and b.is_cuda and torch.bfloat16 in dtypes and torch.float64 not in dtypes


def tensor_core_product(form: Form, a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """As `product_reference`, without copies of the operands in fp32. Not run on a card yet."""
    left, right = a.to(torch.bfloat16), b.to(torch.bfloat16)
    left, right = left.t() if form == "tn" else left, right.t() if form == "nt" else right
    result = torch.mm(left, right, out_dtype=torch.float32)
    return result if bias is None else result + bias.float()


def product_reference(form: Form, a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """C before rounding: in fp32, or in fp64 if an operand is fp64."""
    wide = torch.float64 if torch.float64 in (a.dtype, b.dtype) else torch.float32
    left, right = (
        t.to(torch.bfloat16) if torch.bfloat16 in (a.dtype, b.dtype) and wide != torch.float64 else t for t in (a, b)
    )
    left, right = left.to(wide), right.to(wide)
    result = (left.t() if form == "tn" else left) @ (right.t() if form == "nt" else right)
    return result if bias is None else result + bias.to(wide)


def grouped_product(
    form: Form,
    a: torch.Tensor,
    b: torch.Tensor,
    offsets: torch.Tensor,
    *,
    out: torch.Tensor | None = None,
    add: bool = False,
) -> torch.Tensor:
    """`product` for groups of rows; group e is rows [offsets[e], offsets[e + 1]).

    Args:
        form: "nt": a [T, K], b [E, N, K] -> [T, N]; "nn": a [T, K], b [E, K, N] -> [T, N]; "tn": a [T, M], b [T, N] ->
            [E, M, N], zero for an empty group.
        offsets: int64 [E + 1], ascending from 0 to T, on the CPU.
        out, add: see `product`.
    """
    groups = offsets.numel() - 1
    shape = (groups, a.shape[1], b.shape[1]) if form == "tn" else (a.shape[0], b.shape[1 if form == "nt" else 2])
    if out is None:
        out = native.new(shape, a)
    _check_out("grouped_product", out, *shape)
    if native.usable(a, b, out) and _is_matrix(out):
        torch.ops.dso.train_grouped_product(a, b, offsets, out, form, add)
    else:
        _put(grouped_product_reference(form, a, b, offsets), out, add)
    return out


def grouped_product_reference(form: Form, a: torch.Tensor, b: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """The grouped product before rounding, as in `product_reference`."""
    ends = offsets.tolist()
    parts = list(zip(ends, ends[1:], strict=False))
    if form == "tn":
        return torch.stack([product_reference(form, a[i:j], b[i:j]) for i, j in parts])
    return torch.cat([product_reference(form, a[i:j], b[e]) for e, (i, j) in enumerate(parts)])


def column_sums(
    x: torch.Tensor, *, out: torch.Tensor | None = None, add: bool = False, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """[T, N] -> [N], summed over rows in fp32 (fp64 for fp64): the gradient of a bias.

    Args:
        out, add, dtype: see `product`.
    """
    if out is None:
        out = native.new((x.shape[1],), x, dtype)
    _check_out("column_sums", out, x.shape[1])
    if native.usable(x, out) and out.is_contiguous():
        torch.ops.dso.train_column_sums(x, out, add)
    else:
        _put(x.to(torch.promote_types(x.dtype, torch.float32)).sum(0), out, add)
    return out


# ---- registration as torch ops, with `torch.library.define`: a call costs a tenth of `custom_op`'s 30 us

torch.library.define("dso::train_product", "(Tensor a, Tensor b, Tensor? bias, Tensor(a!) out, str form, bool add) -> ()")
torch.library.define(
    "dso::train_grouped_product", "(Tensor a, Tensor b, Tensor offsets, Tensor(a!) out, str form, bool add) -> ()"
)
torch.library.define("dso::train_column_sums", "(Tensor x, Tensor(a!) out, bool add) -> ()")


@torch.library.impl("dso::train_product", "cpu")
def _run_product(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor, form: str, add: bool) -> None:
    M, N, K = _sizes(form, a, b)
    a, b, bias = _with_rows(a), _with_rows(b), None if bias is None else bias.contiguous()
    left, right = (K, M) if form == "tn" else (M, K), (N, K) if form == "nt" else (K, N)
    at = None if bias is None else _matrix(bias, "bias", (N,))
    native.call(
        "dso_train_product", PRODUCT_FORMS[form], _flags(a, b, add), M, N, K,
        _matrix(a, "a", left), _matrix(b, "b", right), at, _matrix(out, "out", (M, N)), out=out,
    )  # fmt: skip


@torch.library.impl("dso::train_grouped_product", "cpu")
def _run_grouped_product(
    a: torch.Tensor, b: torch.Tensor, offsets: torch.Tensor, out: torch.Tensor, form: str, add: bool
) -> None:
    a, b, offsets = _with_rows(a), _with_rows(b), offsets.contiguous()
    M, N, K = (a.shape[1], b.shape[1], 0) if form == "tn" else (0, out.shape[1], a.shape[1])
    groups, tokens = offsets.numel() - 1, a.shape[0]
    right = {"tn": (tokens, N), "nt": (groups, N, K), "nn": (groups, K, N)}[form]
    out_shape = (groups, M, N) if form == "tn" else (tokens, N)
    bounds = address(offsets, "offsets", torch.int64, (groups + 1,))
    native.call(
        "dso_train_grouped_product", PRODUCT_FORMS[form], _flags(a, b, add), groups, bounds, M, N, K,
        _matrix(a, "a", (tokens, M or K)), _matrix(b, "b", right), _matrix(out, "out", out_shape), out=out,
    )  # fmt: skip


@torch.library.impl("dso::train_column_sums", "cpu")
def _run_column_sums(x: torch.Tensor, out: torch.Tensor, add: bool) -> None:
    x = _with_rows(x)
    sums = _matrix(out, "out", (x.shape[1],))
    native.call("dso_train_column_sums", ADD if add else 0, *x.shape, _matrix(x, "x", tuple(x.shape)), sums, out=out)


@torch.library.register_fake("dso::train_product")
@torch.library.register_fake("dso::train_grouped_product")
@torch.library.register_fake("dso::train_column_sums")
def _(*arguments: object) -> None:
    """They change `out` in place and have no output."""


def _matrix(t: torch.Tensor, name: str, shape: tuple[int, ...]) -> Any:
    """The native descriptor of a vector, a matrix or a stack of matrices, by reference."""
    ld, stride = t.stride(-2) if t.dim() > 1 else t.numel(), t.stride(0) if t.dim() == 3 else 0
    return C.byref(Matrix(strided(t, name, t.dtype, shape), ld, stride, native.type_of(t), 0))


def _flags(a: torch.Tensor, b: torch.Tensor, add: bool) -> int:
    exact = a.dtype == b.dtype == torch.float32
    return (ADD if add else 0) | (EXACT if exact else 0)


def _is_matrix(t: torch.Tensor) -> bool:
    """Whether its rows are contiguous and do not overlap (in each matrix of a stack)."""
    rows, columns = t.shape[-2:]
    return t.numel() == 0 or ((columns == 1 or t.stride(-1) == 1) and (rows == 1 or t.stride(-2) >= columns))


def _with_rows(t: torch.Tensor) -> torch.Tensor:
    return t if _is_matrix(t) else t.contiguous()


def _sizes(form: str, a: torch.Tensor, b: torch.Tensor) -> tuple[int, int, int]:
    K, M = a.shape if form == "tn" else (a.shape[1], a.shape[0])
    return M, b.shape[0 if form == "nt" else 1], K


def _put(result: torch.Tensor, out: torch.Tensor, add: bool) -> None:
    out.copy_(result + out if add else result)


def _check_out(op: str, out: torch.Tensor, *shape: int) -> None:
    """ValueError if `out` has another shape; the kernels would write past its end."""
    if out.shape != shape:
        raise ValueError(f"{op}: the result has shape {list(shape)}, but out (a main_grad?) has {list(out.shape)}")


def _check_product(form: str, a: torch.Tensor, b: torch.Tensor) -> None:
    depth = b.shape[1 if form == "nt" else 0]
    if _sizes(form, a, b)[2] != depth:
        raise ValueError(f"product {form!r} of {list(a.shape)} and {list(b.shape)}: the summed dimensions differ")
