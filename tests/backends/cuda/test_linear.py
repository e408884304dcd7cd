"""Products with packed matrices equal those with the dequantized weights in float64, for every format and odd shapes."""

from __future__ import annotations

import pytest
import torch

from support import triton_interpreter

triton_interpreter.require()

from deepseek_optimizer.backends.cuda.division import MOST_ROWS, splits_of
from deepseek_optimizer.backends.cuda.kernels import linear, rows
from deepseek_optimizer.backends.cuda.layouts import LAYOUTS
from deepseek_optimizer.backends.cuda.matrices import DeviceMatrix
from deepseek_optimizer.backends.reference.ops import swiglu
from deepseek_optimizer.quant import FORMATS, SUPERBLOCKS, pack, unpack
from deepseek_optimizer.quant.blocks import IQ4_VALUES
from deepseek_optimizer.quant.packed import PackedMatrix

from .values import random

CPU = torch.device("cpu")
BASIC = ("fp32", "bf16", "int8", "int4")
# Of the largest output. Few rows are multiplied in fp32; on tensor cores rows and scaled weights are rounded to bf16.
VECTOR_BOUND = 2e-6
TILE_BOUND = dict.fromkeys(LAYOUTS, 2**-7) | {"fp32": 2e-6}


def bound_of(format_name: str, count: int) -> float:
    return VECTOR_BOUND if count <= MOST_ROWS else TILE_BOUND[format_name]


def width(format_name: str, columns: int) -> int:
    """Columns that the format has: superblocks are whole."""
    return 512 if format_name in SUPERBLOCKS else columns


def assert_close(made: torch.Tensor, exact: torch.Tensor, bound: float) -> None:
    assert made.shape == exact.shape and made.isfinite().all()
    assert (made.double() - exact).abs().max() <= bound * exact.abs().max()


SHAPES = [(1, (40, 72)), (3, (17, 130)), (5, (33, 40)), (35, (70, 33))]
# One product of each kernel for the other formats, with odd shapes where they are not of whole superblocks.
FEW = [(name, *SHAPES[i]) for name in LAYOUTS if name not in BASIC for i in (1, 2)]


@pytest.mark.parametrize(("format_name", "count", "shape"), [(name, *each) for name in BASIC for each in SHAPES] + FEW, ids=str)
def test_products(format_name, count, shape):
    shape = shape[0], width(format_name, shape[1])
    packed, x, bias = pack(random(*shape), format_name), random(count, shape[1], seed=1), random(shape[0], seed=2)
    matrix, out = DeviceMatrix(packed, CPU), torch.full((count, shape[0]), torch.nan)
    exact = x.double() @ unpack(packed).double().T
    linear.linear(x, matrix, None, out)
    assert_close(out, exact, bound_of(format_name, count))
    linear.linear(x, matrix, bias, out)
    assert_close(out, exact + bias, bound_of(format_name, count))


def test_no_rows():
    linear.linear(torch.empty(0, 32), DeviceMatrix(pack(random(16, 32), "fp32"), CPU), None, torch.empty(0, 16))


GATED = [("fp32", "fp32"), ("int4", "int4"), ("bf16", "int8"), ("q5_k", "q5_k"), ("mxfp4", "mxfp4"), ("int3", "int3")]


@pytest.mark.parametrize("count", [2, 6])
@pytest.mark.parametrize("formats", GATED, ids="-".join)
def test_gate_and_up(formats, count):
    columns = max(width(name, 40) for name in formats)
    gate, up = (pack(random(40, columns, seed=i), name) for i, name in enumerate(formats))
    x, bias, out = random(count, columns, seed=3), random(40, seed=4), torch.empty(count, 40)
    exact = swiglu(x.double() @ unpack(gate).double().T, x.double() @ unpack(up).double().T + bias)
    linear.gate_up(x, DeviceMatrix(gate, CPU), DeviceMatrix(up, CPU), (None, bias), out)
    assert_close(out, exact, 2 * max(bound_of(name, count) for name in formats))


@pytest.mark.parametrize("gated", [False, True])
def test_columns_are_split_where_a_matrix_has_few_rows(gated):
    """With biases, which must be added once."""
    shape, x = (20, 700), random(2, 700, seed=1)
    packed = [pack(random(*shape, seed=seed), "fp32") for seed in (2, 3)]
    first, second = (DeviceMatrix(matrix, CPU) for matrix in packed)
    assert splits_of(first.words.shape[0], first.row_words) > 1
    biases, out = (random(20, seed=4), random(20, seed=5)), torch.empty(2, 20)
    exact, raised = (x.double() @ unpack(m).double().T + bias for m, bias in zip(packed, biases, strict=True))
    if gated:
        linear.gate_up(x, first, second, biases, out)
    else:
        linear.linear(x, first, biases[0], out)
    assert_close(out, swiglu(exact, raised) if gated else exact, VECTOR_BOUND)


def test_splits_depend_on_the_shape_and_leave_no_part_small():
    assert splits_of(512, 10**6) == 1 and splits_of(96, 64) == 1
    assert splits_of(96, 768) == 4 and splits_of(4, 10**6) == 8


def test_rows_of_a_matrix():
    """A part that begins at a tile is a view."""
    packed, x, out = pack(random(80, 48), "int8"), random(2, 48, seed=1), torch.empty(2, 30)
    matrix = DeviceMatrix(packed, CPU)
    part = matrix.part(32, 62)
    assert part.words.data_ptr() == matrix.words[2].data_ptr() and part.rows == 30
    linear.linear(x, part, None, out)
    assert_close(out, x.double() @ unpack(packed)[32:62].double().T, VECTOR_BOUND)


@pytest.mark.parametrize("format_name", LAYOUTS)
def test_embeddings_are_exact(format_name):
    columns = width(format_name, 70)
    packed, ids = pack(random(50, columns), format_name), torch.tensor([3, 49, 0, 16, 17, 3, 31, 48, 5, 15], dtype=torch.int32)
    out = torch.full((10, columns), torch.nan)
    rows.embedding(ids, DeviceMatrix(packed, CPU), 1.0, out)
    assert torch.equal(out, unpack(packed)[ids.long()])
    rows.embedding(ids, DeviceMatrix(packed, CPU), 2.5, out)
    torch.testing.assert_close(out, unpack(packed)[ids.long()] * 2.5, rtol=1e-6, atol=0)


@pytest.mark.parametrize("format_name", ["fp8", "mxfp4", "iq4_nl", "int3"])
def test_all_codes_and_the_smallest_and_largest_scales(format_name):
    """Every value of E4M3 but NaN, which is not stored, with its subnormals; E2M1 with powers of two, subnormal ones too;
    all values of IQ4; all bytes of int3, which any path consists of."""
    made = pack(torch.ones(16, 256), format_name).data
    if format_name == "fp8":
        made[..., :512] = torch.arange(256).where(torch.arange(256) % 128 != 127, 0).to(torch.uint8).repeat(2)
    elif format_name == "int3":
        generator = torch.Generator().manual_seed(0)
        made[..., :192] = torch.randint(0, 256, made[..., :192].shape, generator=generator, dtype=torch.uint8)
        made[..., 192:] = torch.linspace(0, 247, 128).to(torch.uint8).view(8, 16)
    else:
        made[..., :256] = torch.arange(256).to(torch.uint8)
    if format_name == "mxfp4":
        powers = torch.cat((torch.arange(8), torch.linspace(8, 250, 120)))  # 2^-128, 2^-127 and so on to 2^122
        made[..., 256:] = powers.to(torch.uint8).view(8, 16)
    packed, out = PackedMatrix(format_name, 16, 256, made), torch.empty(16, 256)
    exact = unpack(packed)
    assert len(exact.unique()) >= {"fp8": 253, "mxfp4": 200, "iq4_nl": len(IQ4_VALUES), "int3": 1000}[format_name]
    rows.embedding(torch.arange(16, dtype=torch.int32), DeviceMatrix(packed, CPU), 1.0, out)
    assert torch.equal(out, exact)


def test_layouts_fill_the_tiles():
    """What a layout describes of a tile are its bytes; only fp8's are padded."""
    for name, layout in LAYOUTS.items():
        scale = {"": 0, "fp32": 32, "fp16": 32, "power": 16, "upper": 16, "int8": 16, "nibbles": 16}[layout.scale]
        numbers = scale * (32 // layout.group) * (1 + (layout.minimum and layout.scale != "nibbles"))
        assert layout.code_words * 4 + numbers + layout.head_words * 4 / 8 == FORMATS[name].tile_bytes, name


def test_the_device_has_the_packed_bytes():
    packed = pack(random(20, 40), "int4")
    matrix = DeviceMatrix(packed, CPU)
    assert torch.equal(matrix.words.view(torch.uint8), packed.data) and matrix.words.data_ptr() == packed.data.data_ptr()
