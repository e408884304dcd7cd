"""Every format against float64, element by element, and against the layout that dso.h describes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from deepseek_optimizer import quant
from deepseek_optimizer.errors import ConfigError

SHAPES = [(1, 1), (1, 32), (3, 31), (16, 32), (17, 33), (16, 96), (33, 64), (211, 72), (5, 997), (1040, 640)]
ANY_SHAPE = [name for name in quant.FORMATS if name not in quant.SUPERBLOCKS]  # tests/quant/test_kquants.py has the others
SOURCES = [torch.float32, torch.bfloat16, torch.float16]


def matrix(rows: int, cols: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Rows of different magnitude, so that no scale fits all, with an outlier and zeros."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, cols, generator=generator) * torch.logspace(-3, 1, rows).unsqueeze(1)
    w[rows // 2, cols // 2] *= 50
    w[rows // 3, : cols // 2] = 0
    return w.to(dtype)


def importance_of(cols: int) -> torch.Tensor:
    """Column weights of several magnitudes, some of them zero."""
    generator = torch.Generator().manual_seed(cols)
    found = torch.randn(cols, generator=generator).exp() ** 2
    return found * (torch.rand(cols, generator=generator) > 0.2)


@pytest.mark.parametrize("name", ANY_SHAPE)
@pytest.mark.parametrize("dtype", SOURCES)
@pytest.mark.parametrize("shape", SHAPES)
def test_error_stays_within_the_bound(name: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    weight, fmt = matrix(*shape, dtype), quant.get_format(name)
    packed = fmt.pack(weight)
    assert packed.dtype == torch.uint8
    assert packed.shape == (math.ceil(shape[0] / 16), math.ceil(shape[1] / 32), fmt.tile_bytes)
    for importance in (None, importance_of(shape[1])):
        error = (fmt.unpack(fmt.pack(weight, importance), *shape).double() - weight.double()).abs()
        bound = fmt.error_bound(weight, importance).double()
        assert error.shape == bound.shape == weight.shape
        assert (error <= bound).all(), (error - bound).max()


@pytest.mark.parametrize("name", ["int8", "int4", "q4_1", "fp8"])
def test_the_bound_is_tight(name: str) -> None:
    """A bound twice as large as necessary would hide a format that wastes a bit."""
    weight, fmt = torch.randn(256, 256), quant.get_format(name)
    error = (fmt.unpack(fmt.pack(weight), 256, 256) - weight).abs()
    assert (error / fmt.error_bound(weight)).max() > 0.8


def test_fp32_and_bf16_are_exact_or_rounded_once() -> None:
    weight = matrix(37, 70)
    assert torch.equal(quant.unpack(quant.pack(weight, "fp32")), weight)
    assert torch.equal(quant.unpack(quant.pack(weight, "bf16"), torch.bfloat16), weight.bfloat16())


def code(tile: np.ndarray, name: str, row: int, col: int) -> int:
    """The stored code of one element, located by dso.h's description."""
    if name == "int8":
        return int(tile[(col // 4) * 64 + row * 4 + col % 4])
    j, within = divmod(col, 8)
    byte = int(tile[j * 64 + row * 4 + within % 4])
    return byte & 15 if within < 4 else byte >> 4


def numbers(tile: np.ndarray, name: str, row: int) -> list[float]:
    """The fp16 values of one row of a tile."""
    start = 512 if name == "int8" else 256
    halves = tile[start:].view(np.float16)
    return [float(halves[i * 16 + row]) for i in range(len(halves) // 16)]


f32 = np.float32


def ggml_choice(name: str, group: np.ndarray) -> tuple[np.float32, np.float32]:
    """ggml's scale and minimum of one group, rounded to fp16."""
    if name == "int4":
        return f32(np.float16(group[np.abs(group).argmax()] / f32(-8))), f32(0)
    return f32(np.float16((group.max() - group.min()) / f32(15))), f32(np.float16(group.min()))


def try_numbers(name: str, group: np.ndarray, c: np.ndarray, s: np.float32, m: np.float32) -> tuple[np.float32, np.ndarray]:
    """Weighted error and codes in float32, as in docs/contracts.md; c: the weights of the errors."""
    low, high = (-8, 7) if name == "int4" else (0, 15)
    y = group - m
    q = np.clip(np.rint(y * (f32(1) / s)), low, high).astype(np.float32) if s else np.zeros_like(y)
    error = f32(0)
    for term in ((y - q * s) * (y - q * s)) * c:
        error = f32(error + term)
    return error, q


def search(name: str, group: np.ndarray, importance: np.ndarray | None) -> tuple[np.float32, np.float32]:
    """docs/contracts.md, "Packing, bit for bit": the scale and minimum of int4 and q4_1."""

    def half(x: np.float32) -> np.float32:
        return f32(np.float16(x))

    def total(terms: np.ndarray) -> np.float32:
        found = f32(0)
        for term in terms:
            found = f32(found + term)
        return found

    c = np.abs(group) if importance is None else importance
    low, high, e = group.min(), group.max(), group[np.abs(group).argmax()]
    choices = [ggml_choice(name, group)]
    if name == "int4" and importance is not None:
        ends = (-6.5, -7, -7.5, -8.5, -9, -9.5, 6.5, 7, 7.5, 8, 8.5, 9, 9.5)
        choices += [(half(e / f32(d)), f32(0)) for d in ends]
    if name == "q4_1":
        r = f32(high - low)
        for a, b in [(a, b) for a in range(4) for b in range(4)][1:]:
            lo, hi = low + r * f32(a / 32), high - r * f32(b / 32)
            choices.append((half((hi - lo) / f32(15)), half(lo)))
    s, m = choices[0]
    if s == 0:
        return s, m
    best, q = try_numbers(name, group, c, s, m)
    for s2, m2 in choices[1:]:
        error, codes = try_numbers(name, group, c, s2, m2)
        if error < best:
            best, q, s, m = error, codes, s2, m2
    y = group - m
    w, sq, sqq, sy, sqy = total(c), total(c * q), total((c * q) * q), total(c * y), total((c * q) * y)
    with np.errstate(all="ignore"):
        d = w * sqq - sq * sq
        new, moved = (sqy / sqq, f32(0)) if name == "int4" else ((w * sqy - sq * sy) / d, (sqq * sy - sq * sqy) / d)
    s2 = half(s + np.clip(new - s, -abs(s) / f32(16), abs(s) / f32(16)))
    m2 = half(m + np.clip(moved, -abs(s) / f32(2), abs(s) / f32(2)))
    return (s2, m2) if try_numbers(name, group, c, s2, m2)[0] < best else (s, m)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", ["int8", "int4", "q4_1"])
@pytest.mark.parametrize("shape", [(16, 32), (19, 50)])
def test_codes_follow_the_definition(name: str, shape: tuple[int, int], weighted: bool) -> None:
    """One group at a time in numpy's float32: same scale, same codes, at the places given in dso.h."""
    weight, importance = matrix(*shape, seed=3), importance_of(shape[1]) if weighted else None
    packed = quant.get_format(name).pack(weight, importance).numpy()
    for row in range(shape[0]):
        for first in range(0, shape[1], 32):
            group = weight[row, first : first + 32].numpy()
            tile = packed[row // 16, first // 32]
            minimum = f32(0)
            zero = {"int8": 128, "int4": 8, "q4_1": 0}[name]
            if name == "int8":
                scale = f32(np.float16(np.abs(group).max() / f32(127)))
                q = np.clip(np.rint(group / scale), -127, 127) if scale else np.zeros_like(group)
            else:
                c = None if importance is None else importance[first : first + 32].numpy()
                scale, minimum = search(name, group, c)
                q = try_numbers(name, group, np.ones_like(group), scale, minimum)[1]
            stored = numbers(tile, name, row % 16)
            assert stored == ([float(scale), float(minimum)] if name == "q4_1" else [float(scale)])
            q = q.astype(int) + zero
            assert [code(tile, name, row % 16, c) for c in range(len(group))] == q.tolist()
            assert {code(tile, name, row % 16, c) for c in range(len(group), 32)} <= {zero}, "padding is codes of zero"
    for row in range(shape[0] % 16 or 16, 16):
        assert all(n == 0 for n in numbers(packed[-1, -1], name, row))
        assert {code(packed[-1, -1], name, row, c) for c in range(32)} == {zero}


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", ["int4", "q4_1"])
def test_no_group_has_a_larger_weighted_error_than_in_ggml(name: str, weighted: bool) -> None:
    weight, importance = matrix(65, 332), importance_of(332) if weighted else None
    got = quant.get_format(name)
    ours = (got.unpack(got.pack(weight, importance), 65, 332) - weight).double().square().numpy()
    better = 0
    for row in range(65):
        for first in range(0, 332, 32):
            group = weight[row, first : first + 32].numpy()
            c = np.abs(group) if importance is None else importance[first : first + 32].numpy()
            theirs, _ = try_numbers(name, group, c, *ggml_choice(name, group))
            found = (ours[row, first : first + 32] * c).sum()
            assert found <= theirs * (1 + 1e-5), (row, first)
            better += bool(found < 0.98 * theirs)
    assert better > 65 * 10 / 2, "and most groups have a smaller one"


@pytest.mark.parametrize("name", ["int3", "int4", "q4_1"])
def test_importance_reduces_the_error_of_important_columns(name: str) -> None:
    weight, importance = torch.randn(64, 256, generator=torch.Generator().manual_seed(1)), torch.ones(256)
    importance[::4] = 100
    fmt = quant.get_format(name)
    plain, weighted = ((fmt.unpack(fmt.pack(weight, i), 64, 256) - weight).square() for i in (None, importance))
    assert weighted[:, ::4].mean() < 0.7 * plain[:, ::4].mean()
    assert torch.equal(fmt.pack(weight, importance), fmt.pack(weight, importance * 4)), "only proportions count"


@pytest.mark.parametrize("name", ["int3", "int4", "q4_1"])
def test_invalid_importance(name: str) -> None:
    weight, fmt = torch.ones(3, 40), quant.get_format(name)
    for wrong in (torch.ones(39), torch.ones(40, 1), torch.ones(40).double()):
        with pytest.raises(ValueError, match=r"importance must be float32 \[40\]"):
            fmt.pack(weight, wrong)
    for value in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="finite and not negative"):
            fmt.pack(weight, torch.full((40,), value))


def test_float_layouts() -> None:
    weight = matrix(20, 40)
    tile = quant.get_format("fp32").pack(weight)[1, 1].view(torch.float32).view(32, 16)
    assert tile[5, 2] == weight[18, 37] and tile[8:].abs().sum() == 0 and tile[:, 4:].abs().sum() == 0
    pairs = quant.get_format("bf16").pack(weight)[1, 1].view(torch.bfloat16).view(16, 16, 2)
    assert pairs[2, 3, 1] == weight[19, 37].bfloat16()


@pytest.mark.parametrize("name", ["int8", "int4", "q4_1"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_groups_become_nan(name: str, bad: float) -> None:
    weight = torch.ones(16, 64)
    weight[3, 40] = bad
    packed = quant.get_format(name).pack(weight)
    got = quant.get_format(name).unpack(packed, 16, 64)
    assert got[3, 32:].isnan().all() and got[3, :32].isfinite().all() and got[4].isfinite().all()
    tile = packed[0, 1].numpy()
    assert tile[512 if name == "int8" else 256 :].view(np.uint16)[3] == 0x7E00
    assert {code(tile, name, 3, c) for c in range(32)} == {{"int8": 128, "int4": 8, "q4_1": 0}[name]}


@pytest.mark.parametrize("name", ["int8", "int4", "q4_1"])
def test_too_large_for_fp16_is_nan_and_too_small_is_zero(name: str) -> None:
    fmt = quant.get_format(name)
    huge, tiny = torch.zeros(2, 32), torch.zeros(2, 32)
    huge[0, 3], tiny[0, 3], tiny[1, 3] = 1e30, 1e-30, -1e-30
    assert fmt.unpack(fmt.pack(huge), 2, 32)[0].isnan().all()
    packed = fmt.pack(tiny)
    assert torch.equal(packed, fmt.pack(torch.zeros(2, 32))), "one zero, whatever its sign"
    assert torch.equal(fmt.pack(-torch.zeros(2, 32)), packed)


def test_int4_uses_the_first_of_equal_magnitudes() -> None:
    weight = torch.zeros(2, 32)
    weight[0, 1], weight[0, 7] = 8.0, -8.0
    weight[1, 1], weight[1, 7] = -8.0, 8.0
    got = quant.unpack(quant.pack(weight, "int4"))
    assert got[0, 1] * 7 == got[0, 7] * -8 > 0 and got[1, 1] * 7 == got[1, 7] * -8 < 0, "8 steps, and 7 for the second"


@pytest.mark.parametrize("name", ANY_SHAPE)
def test_rows_do_not_depend_on_other_rows(name: str) -> None:
    """Panels are an implementation detail: rows packed alone equal rows packed together."""
    weight = matrix(2048, 544)
    whole = quant.get_format(name).pack(weight)
    assert torch.equal(whole[48:64], quant.get_format(name).pack(weight[768:1024])), "from a multiple of PANEL_ROWS on"
    assert torch.equal(whole, quant.get_format(name).pack(torch.cat([weight, weight], 1)[:, :544])), "strided sources too"


@pytest.mark.parametrize("name", ANY_SHAPE)
def test_take_rows(name: str) -> None:
    packed = quant.pack(matrix(70, 50), name)
    index = torch.tensor([[0, 69, 17], [17, 16, 3]])
    assert torch.equal(quant.take_rows(packed, index), quant.unpack(packed)[index])
    assert quant.take_rows(packed, torch.empty(0, dtype=torch.long)).shape == (0, 50)
    with pytest.raises(IndexError):
        quant.take_rows(packed, torch.tensor([70]))


def test_unknown_names() -> None:
    with pytest.raises(ConfigError, match="did you mean 'int4'"):
        quant.get_format("int_4")
    with pytest.raises(ConfigError, match="fp32, bf16"):
        quant.get_format(None)  # type: ignore[arg-type]


def test_inputs_that_pack_rejects() -> None:
    for wrong in (torch.zeros(3), torch.zeros(2, 2, dtype=torch.int32)):
        with pytest.raises(ValueError, match="matrix"):
            quant.pack(wrong.reshape(wrong.shape[0], -1) if wrong.dim() == 2 else wrong.unsqueeze(0).unsqueeze(0), "int8")
    with pytest.raises(ValueError, match="packed must be tiles of a"):
        quant.get_format("int8").unpack(torch.zeros(1, 1, 544, dtype=torch.uint8), 17, 32)


def test_formats_describe_themselves() -> None:
    for name, fmt in quant.FORMATS.items():
        assert fmt.name == name and fmt.tile_bytes * 8 == fmt.bits * 16 * 32
    assert [quant.get_format(n).activation for n in ("fp32", "bf16", "int8", "int4", "q4_1", "fp8")] == [
        "f32",
        "bf16",
        "q16",
        "q8",
        "q16",
        "bf16",
    ]
