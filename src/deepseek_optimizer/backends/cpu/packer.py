"""Packing and single products with the native library, for loaders and for the forward of packed modules."""

from __future__ import annotations

import ctypes as C
from collections.abc import Sequence

import torch

from ...errors import BackendError
from ...graph.ops import OPS
from ...quant import fp8, get_format, ggml, reference_packer
from ...quant.blocks import BlockFormat
from ...quant.packed import PackedMatrix, PackedStack
from ...quant.search import check_importance
from ...quant.tiles import empty_tiles, panels, tile_counts
from ..base import Norm
from .buffers import address, optional, strided
from .native import FORMATS, SLOT_KINDS, Context, number
from .native_train import ADD, EXACT, PRODUCT_FORMS, TYPES, Matrix
from .structs import FeedForward, Weight

_SOURCES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.uint8: 3}  # uint8: ggml blocks


def pack(
    context: Context,
    weight: torch.Tensor,
    format_name: str,
    out: torch.Tensor | None = None,
    importance: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Packs float [N, K] (fp32, bf16 or fp16), ggml blocks, or E4M3 to uint8 tiles, bitwise equal to `quant.reference_packer`.

    Args:
        context: the library's context.
        weight: the matrix.
        format_name: the target format.
        out: contiguous tiles to fill; None: newly allocated.
        importance: float32 [K], see `quant.Packer`.
        scale: block scales of an E4M3 matrix, see `quant.Packer`.

    Raises:
        ValueError: `out`, `importance` or `scale` has the wrong dtype, shape or values.
    """
    weight = weight.detach()
    if isinstance(get_format(format_name), BlockFormat) and weight.dtype != torch.uint8:  # rare: files store these formats
        return reference_packer(weight, format_name, out, importance, scale)
    if weight.dtype not in (*_SOURCES, torch.float8_e4m3fn):
        weight = weight.float()
    rows, cols = weight.shape
    if weight.stride(1) != 1 or weight.stride(0) < cols or weight.dtype == torch.uint8:  # transposed, or a broadcast row
        weight = weight.contiguous()
    stride = max(weight.stride(0), cols)  # the stride of a single row is arbitrary
    if weight.dtype == torch.uint8:
        cols = stride = ggml.blocks_for(format_name, cols)[1]
    out = _tiles_for(context, rows, cols, format_name, out)
    source = strided(weight, "weight", weight.dtype, tuple(weight.shape))
    target = address(out, "tiles", torch.uint8, tuple(out.shape))
    if weight.dtype == torch.float8_e4m3fn:
        fp8.check_target(format_name)
        scale = fp8.check_scale(weight, scale).contiguous()
        scales = address(scale, "scale", torch.float32, fp8.scale_shape(rows, cols))
        context.call("dso_pack_fp8", context.handle, source, scales, rows, cols, stride, target, tiles=out)
        return out
    if importance is not None:
        check_importance(importance, cols)
        importance = importance.contiguous()
    columns = optional(importance, "importance", torch.float32, (cols,))
    kinds = FORMATS[format_name], _SOURCES[weight.dtype]
    context.call("dso_pack", context.handle, *kinds, source, rows, cols, stride, columns, target, tiles=out)
    return out


def _tiles_for(context: Context, rows: int, cols: int, format_name: str, out: torch.Tensor | None) -> torch.Tensor:
    """`out` after checking that it fits such a matrix (ValueError if not), or newly allocated tiles if it is None."""
    tile_bytes = get_format(format_name).tile_bytes
    shape = (*tile_counts(rows, cols), tile_bytes)
    if out is None:
        return context.outputs.empty(shape, torch.uint8) if context.outputs.checked else empty_tiles(rows, cols, tile_bytes)
    if out.shape != shape or out.dtype != torch.uint8 or not out.is_contiguous():
        raise ValueError(
            f"out must be contiguous torch.uint8 {shape} for a {rows} x {cols} matrix in {format_name}, got {out.dtype} "
            f"{tuple(out.shape)}"
        )
    return out


def weight_struct(matrix: PackedMatrix) -> Weight:
    """The C view of a packed matrix; the caller keeps `matrix.data` alive."""
    if matrix.order is not None:
        raise BackendError("the native library reads columns in their stored order; pass matrix.as_stored, and its input alike")
    if matrix.format not in FORMATS:
        raise BackendError(f"the cpu backend does not support format {matrix.format!r}; choose one of {', '.join(FORMATS)}")
    shape = (*tile_counts(matrix.rows, matrix.cols), get_format(matrix.format).tile_bytes)
    data = _tiles_address(matrix.data, shape)
    return Weight(FORMATS[matrix.format], matrix.rows, matrix.cols, 1, data, matrix.data.numel())


def stack_struct(stack: PackedStack) -> Weight:
    """The C view of a stack of matrices; the caller keeps `stack.data` alive."""
    one = weight_struct(stack.matrix(0))
    shape = (stack.count, *tile_counts(stack.rows, stack.cols), get_format(stack.format).tile_bytes)
    return Weight(one.format, stack.rows, stack.cols, stack.count, _tiles_address(stack.data, shape), stack.data.numel())


def _tiles_address(tiles: torch.Tensor, shape: tuple[int, ...]) -> int:
    try:
        return address(tiles, "packed data", torch.uint8, shape)
    except ValueError as error:
        raise BackendError(str(error)) from error


def unpack(context: Context, matrix: PackedMatrix, begin: int = 0, end: int | None = None) -> torch.Tensor:
    """Rows [begin, end) as float32 [end - begin, cols]."""
    end = matrix.rows if end is None else end
    shape = max(end - begin, 0), matrix.cols
    out = context.outputs.empty(shape, torch.float32)
    target = address(out, "out", torch.float32, shape)
    context.call("dso_unpack", context.handle, C.byref(weight_struct(matrix.as_stored)), begin, end, target, out=out)
    return out if matrix.order is None else matrix.order.restored(out)


def linear(
    context: Context,
    x: torch.Tensor,
    matrix: PackedMatrix,
    bias: torch.Tensor | None = None,
    *,
    activation: str | None = None,
    decode_rows: int = 0,
) -> torch.Tensor:
    """x [..., K] @ W.T (+ bias) as float32 [..., N], bitwise equal to a plan's product of the same kernel family.

    Args:
        activation: slot kind that x is converted to first; None: the default of the format.
        decode_rows: number of leading rows computed by the decode family; the others: prefill.
    """
    kind = activation or get_format(matrix.format).activation
    if matrix.order is not None:
        x, matrix = matrix.order.stored(x), matrix.as_stored
    flat = x.detach().reshape(-1, matrix.cols).float().contiguous()
    rows, f32 = flat.shape[0], torch.float32
    out = context.outputs.empty((rows, matrix.rows), f32, short_lived=True)
    bias32 = None if bias is None else bias.detach().float().contiguous()
    added = optional(bias32, "bias", f32, (matrix.rows,))
    target = address(out, "out", f32, (rows, matrix.rows))
    kept = None if kind == "f32" else context.kept_rows.of(x, kind, flat.shape, lambda: _converted(context, flat, kind))
    if kept is not None:
        context.call(
            "dso_linear_rows", context.handle, C.byref(weight_struct(matrix)), added, SLOT_KINDS[kind],
            address(kept, "rows", torch.uint8, tuple(kept.shape)), rows, decode_rows, target, out=out,
        )  # fmt: skip
    elif rows:
        context.call(
            "dso_linear", context.handle, C.byref(weight_struct(matrix)), added, SLOT_KINDS[kind],
            address(flat, "x", f32, (rows, matrix.cols)), rows, decode_rows, target, out=out,
        )  # fmt: skip
    return out.reshape(*x.shape[:-1], matrix.rows)


def _converted(context: Context, x: torch.Tensor, kind: str) -> torch.Tensor:
    """The rows of x [T, width] in this kind."""
    rows, width = x.shape
    out = context.outputs.empty(
        (rows, number(context.lib.dso_row_bytes(SLOT_KINDS[kind], width))), torch.uint8, short_lived=True
    )
    source, target = address(x, "x", torch.float32, (rows, width)), address(out, "rows", torch.uint8, tuple(out.shape))
    context.call("dso_convert", context.handle, SLOT_KINDS[kind], source, rows, width, target, rows=out)
    return out


def feed_forward(
    context: Context,
    x: torch.Tensor,
    first: Sequence[tuple[PackedMatrix, torch.Tensor | None]],
    op: str,
    down: tuple[PackedMatrix, torch.Tensor | None],
    *,
    activation: str,
    inner: str,
    norm: Norm | None = None,
    residual: bool = False,
) -> torch.Tensor:
    """`Backend.feed_forward`, bitwise equal to `norm`, `linear`, the op, `linear` and an addition one after the other.

    Args:
        first: matrix and bias of each product that the op reads: one, or gate and up.
        op: an element-wise op of graphs.
        down: matrix and bias of the product of its result.
        activation, inner: slot kinds that x and the op's result are converted to.
    """
    *gate, up = first
    f32 = torch.float32
    flat = x.detach().reshape(-1, up[0].cols).float().contiguous()
    rows, width = flat.shape[0], down[0].rows
    out = context.outputs.empty((rows, width), f32, short_lived=True)
    biases = [None if bias is None else bias.detach().float().contiguous() for _, bias in (*first, down)]
    places = [optional(bias, "bias", f32, (matrix.rows,)) for bias, (matrix, _) in zip(biases, (*first, down), strict=True)]
    weights = [C.pointer(weight_struct(matrix)) for matrix, _ in (*first, down)]
    weight, shift, eps = norm or (None, None, 0.0)
    call = FeedForward(
        gate=weights[0] if gate else None, up=weights[-2], down=weights[-1], gate_bias=places[0] if gate else None,
        up_bias=places[-2], down_bias=places[-1], op=OPS[op].code, activation=SLOT_KINDS[activation],
        inner=SLOT_KINDS[inner], residual=residual, eps=eps, norm_weight=optional(weight, "weight", f32, (up[0].cols,)),
        norm_bias=optional(shift, "bias", f32, (up[0].cols,)),
    )  # fmt: skip
    if rows:
        context.call(
            "dso_run_feed_forward", context.handle, C.byref(call), address(flat, "x", f32, (rows, up[0].cols)), rows,
            address(out, "out", f32, (rows, width)), out=out,
        )  # fmt: skip
    return out.reshape(*x.shape[:-1], width)


def norm(context: Context, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    """Layer norm of x [..., N] with weight and bias [N], or RMS norm without a bias; all float32."""
    f32, width = torch.float32, x.shape[-1]
    flat = x.detach().reshape(-1, width).contiguous()
    with torch.inference_mode(False):  # where tensors have a version
        out = context.outputs.empty(flat.shape, f32, short_lived=True)
        result = out.view(x.shape)
    context.call(
        "dso_norm", context.handle, address(flat, "x", f32, tuple(flat.shape)), flat.shape[0], width,
        address(weight, "weight", f32, (width,)), optional(bias, "bias", f32, (width,)), eps,
        address(out, "out", f32, tuple(flat.shape)), out=out,
    )  # fmt: skip
    context.kept_rows.expect(result)
    return result


def linear_gradient(context: Context, grad: torch.Tensor, matrix: PackedMatrix) -> torch.Tensor:
    """grad [..., N] @ W -> float32 [..., K], the gradient of `linear` with respect to x. W is dequantized in panels of rows.

    A bf16 gradient is multiplied in bf16, with W rounded to it; any other in fp32.
    """
    flat = grad.detach().reshape(-1, matrix.rows)
    flat = (flat if flat.dtype == torch.bfloat16 else flat.float()).contiguous()
    rows, f32 = flat.shape[0], torch.float32
    out = context.outputs.empty((rows, matrix.cols), f32).zero_()
    flags = ADD if flat.dtype == torch.bfloat16 else ADD | EXACT
    type_of = TYPES[str(flat.dtype).removeprefix("torch.")]
    total = Matrix(address(out, "out", f32, (rows, matrix.cols)), matrix.cols, 0, TYPES["float32"], 0)
    for begin, end in panels(matrix.rows, matrix.cols):
        part, panel = flat[:, begin:end], unpack(context, matrix, begin, end)
        a = Matrix(strided(part, "grad", flat.dtype, (rows, end - begin)), matrix.rows, 0, type_of, 0)
        b = Matrix(address(panel, "panel", f32, (end - begin, matrix.cols)), matrix.cols, 0, TYPES["float32"], 0)
        sizes = rows, matrix.cols, end - begin
        operands = C.byref(a), C.byref(b), None, C.byref(total)
        context.call("dso_train_product", context.handle, PRODUCT_FORMS["nn"], flags, *sizes, *operands, out=out)
    return out.reshape(*grad.shape[:-1], matrix.cols)
