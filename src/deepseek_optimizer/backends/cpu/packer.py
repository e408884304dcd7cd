"""Packing and single products through the native library, for loaders and for the packed modules' own forward."""

from __future__ import annotations

import ctypes as C

import torch

from ...errors import BackendError
from ...quant import fp8, get_format, ggml
from ...quant.packed import PackedMatrix, PackedStack
from ...quant.search import check_importance
from ...quant.tiles import empty_tiles, panels, tile_counts
from .native import FORMATS, SLOT_KINDS, Context, Weight, check
from .native_train import ADD, EXACT, PRODUCT_FORMS, TYPES, Matrix

_SOURCES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.uint8: 3}  # uint8: ggml blocks


def pack(
    context: Context,
    weight: torch.Tensor,
    format_name: str,
    out: torch.Tensor | None = None,
    importance: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """float [N, K] (fp32, bf16 or fp16), ggml blocks, or E4M3 -> uint8 tiles, the bits of `quant.reference_packer`.

    Args:
        out: contiguous tiles to fill; None: fresh ones.
        importance: float32 [K], as `quant.Packer` has it.
        scale: the blocks' scales of an E4M3 matrix, as `quant.Packer` has them.
    """
    weight = weight.detach()
    if weight.dtype not in (*_SOURCES, torch.float8_e4m3fn):
        weight = weight.float()
    rows, cols = weight.shape
    if weight.stride(1) != 1 or weight.stride(0) < cols or weight.dtype == torch.uint8:  # transposed, or a row shown many times
        weight = weight.contiguous()
    stride = max(weight.stride(0), cols)  # a single row may have any
    if weight.dtype == torch.uint8:
        cols = stride = ggml.blocks_for(format_name, cols)[1]
    out = _tiles_for(rows, cols, format_name, out)
    if weight.dtype == torch.float8_e4m3fn:
        fp8.check_target(format_name)
        scale = fp8.check_scale(weight, scale).contiguous()
        check(context.lib.dso_pack_fp8(context.handle, weight.data_ptr(), scale.data_ptr(), rows, cols, stride, out.data_ptr()))
        return out
    if importance is not None:
        check_importance(importance, cols)
        importance = importance.contiguous()
    check(
        context.lib.dso_pack(
            context.handle,
            FORMATS[format_name],
            _SOURCES[weight.dtype],
            weight.data_ptr(),
            rows,
            cols,
            stride,
            None if importance is None else importance.data_ptr(),
            out.data_ptr(),
        )
    )
    return out


def _tiles_for(rows: int, cols: int, format_name: str, out: torch.Tensor | None) -> torch.Tensor:
    """`out` if it is the tiles of such a matrix, ValueError if not; fresh ones where it is None."""
    tile_bytes = get_format(format_name).tile_bytes
    if out is None:
        return empty_tiles(rows, cols, tile_bytes)
    if out.shape != (*tile_counts(rows, cols), tile_bytes) or out.dtype != torch.uint8 or not out.is_contiguous():
        raise ValueError(f"{out.dtype} {tuple(out.shape)} are not the tiles of a {rows} x {cols} matrix in {format_name}")
    return out


def weight_struct(matrix: PackedMatrix) -> Weight:
    """The C view of a packed matrix; the caller keeps `matrix.data` alive."""
    if matrix.format not in FORMATS:
        raise BackendError(f"the cpu backend has no kernels for format {matrix.format!r}; it knows {', '.join(FORMATS)}")
    data = matrix.data
    if data.dtype != torch.uint8 or not data.is_contiguous() or data.device.type != "cpu":
        raise BackendError(f"packed data must be contiguous uint8 on the CPU, not {data.dtype} on {data.device}")
    return Weight(FORMATS[matrix.format], matrix.rows, matrix.cols, 1, data.data_ptr(), data.numel())


def stack_struct(stack: PackedStack) -> Weight:
    """The C view of a stack of matrices; the caller keeps `stack.data` alive."""
    one = weight_struct(stack.matrix(0))
    if not stack.data.is_contiguous():
        raise BackendError("a stack of matrices must be contiguous")
    return Weight(one.format, stack.rows, stack.cols, stack.count, stack.data.data_ptr(), stack.nbytes)


def unpack(context: Context, matrix: PackedMatrix, begin: int = 0, end: int | None = None) -> torch.Tensor:
    """Rows [begin, end) as float32 [end - begin, cols]."""
    end = matrix.rows if end is None else end
    out = torch.empty(end - begin, matrix.cols, dtype=torch.float32, device="cpu")
    check(context.lib.dso_unpack(context.handle, C.byref(weight_struct(matrix)), begin, end, out.data_ptr()))
    return out


def linear(
    context: Context,
    x: torch.Tensor,
    matrix: PackedMatrix,
    bias: torch.Tensor | None = None,
    *,
    activation: str | None = None,
    decode_rows: int = 0,
) -> torch.Tensor:
    """x [..., K] -> float32 [..., N]: the same kernels and bits as a plan's product of that family.

    Args:
        activation: slot kind x is converted to first; None: what the format asks for.
        decode_rows: how many leading rows run the decode family.
    """
    kind = activation or get_format(matrix.format).activation
    flat = x.detach().reshape(-1, matrix.cols).float().contiguous()
    out = torch.empty(flat.shape[0], matrix.rows, dtype=torch.float32, device="cpu")
    bias32 = None if bias is None else bias.detach().float().contiguous()
    if bias32 is not None and bias32.shape != (matrix.rows,):
        raise ValueError(f"bias has shape {tuple(bias32.shape)}, the matrix has {matrix.rows} rows")
    if flat.shape[0]:
        check(
            context.lib.dso_linear(
                context.handle, C.byref(weight_struct(matrix)), None if bias32 is None else bias32.data_ptr(), SLOT_KINDS[kind],
                flat.data_ptr(), flat.shape[0], decode_rows, out.data_ptr(),
            )
        )  # fmt: skip
    return out.reshape(*x.shape[:-1], matrix.rows)


def linear_gradient(context: Context, grad: torch.Tensor, matrix: PackedMatrix) -> torch.Tensor:
    """grad [..., N] @ W -> float32 [..., K], the gradient of `linear` in x, with W dequantised by panels of rows.

    A gradient in bf16 is multiplied as that, with W rounded to it on the way; any other in fp32.
    """
    flat = grad.detach().reshape(-1, matrix.rows)
    flat = (flat if flat.dtype == torch.bfloat16 else flat.float()).contiguous()
    out = torch.zeros(flat.shape[0], matrix.cols, dtype=torch.float32, device="cpu")
    flags = ADD if flat.dtype == torch.bfloat16 else ADD | EXACT
    type_of, total = TYPES[str(flat.dtype).removeprefix("torch.")], Matrix(out.data_ptr(), matrix.cols, 0, TYPES["float32"], 0)
    for begin, end in panels(matrix.rows, matrix.cols):
        panel = unpack(context, matrix, begin, end)
        a = Matrix(flat.data_ptr() + begin * flat.element_size(), matrix.rows, 0, type_of, 0)
        b = Matrix(panel.data_ptr(), matrix.cols, 0, TYPES["float32"], 0)
        sizes = flat.shape[0], matrix.cols, end - begin
        check(
            context.lib.dso_train_product(
                context.handle, PRODUCT_FORMS["nn"], flags, *sizes, C.byref(a), C.byref(b), None, C.byref(total)
            )
        )
    return out.reshape(*grad.shape[:-1], matrix.cols)
