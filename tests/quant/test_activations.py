"""Activation rows: values against numpy's float32, bytes against dso.h's layout."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from deepseek_optimizer.errors import ConfigError
from deepseek_optimizer.quant import activations

WIDTHS = [1, 31, 32, 33, 64, 576, 1000]


def rows(width: int) -> torch.Tensor:
    return torch.randn(5, width, generator=torch.Generator().manual_seed(width)) * torch.logspace(-4, 4, 5).unsqueeze(1)


@pytest.mark.parametrize("kind", ["q8", "q16"])
@pytest.mark.parametrize("width", WIDTHS)
def test_row_layout(kind: str, width: int) -> None:
    x = rows(width)
    steps, padded = (127 if kind == "q8" else 32512), -(-width // 32) * 32
    actual = activations.convert(x, kind).numpy()
    assert actual.shape[1] == activations.row_bytes(kind, width) and actual.shape[1] % 64 == 0
    for t in range(5):
        at = padded
        q = actual[t, :padded].view(np.int8).astype(int)
        if kind == "q16":
            low = actual[t, padded : 2 * padded].view(np.int8).astype(int)
            q, at = 256 * q + low, 2 * padded
        scale = actual[t, at : at + padded // 8].view(np.float32)
        total = actual[t, at + padded // 8 : at + padded // 4].view(np.int32)
        for g in range(padded // 32):
            group = np.zeros(32, np.float32)
            group[: min(32, width - 32 * g)] = x[t, 32 * g : 32 * g + 32].numpy()
            top = np.abs(group).max()
            assert scale[g] == top / np.float32(steps)
            assert q[32 * g : 32 * g + 32].tolist() == np.rint(group * (np.float32(steps) / top)).astype(int).tolist()
            assert total[g] == q[32 * g : 32 * g + 32].sum()
        assert not actual[t, at + padded // 4 :].any()


@pytest.mark.parametrize("kind", activations.KINDS)
@pytest.mark.parametrize("width", WIDTHS)
def test_fake_quantize_stays_within_half_a_step(kind: str, width: int) -> None:
    x = rows(width)
    error = (activations.fake_quantize(x, kind).double() - x.double()).abs()
    top = torch.nn.functional.pad(x.abs(), (0, -width % 32)).view(5, -1, 32).amax(-1, keepdim=True).expand(-1, -1, 32)
    top = top.reshape(5, -1)[:, :width].double()
    relative = {"f32": 0.0, "bf16": 2.0**-8, "q8": 0.5 / 127, "q16": 0.5 / 32512}[kind]
    assert (error <= top * relative * 1.001 + 1e-7 * top * (relative > 0)).all()


def test_convert_floats() -> None:
    x = rows(40)
    assert torch.equal(activations.convert(x, "f32")[:, :160].contiguous().view(torch.float32), x)
    assert torch.equal(activations.convert(x, "bf16")[:, :80].contiguous().view(torch.bfloat16), x.bfloat16())
    assert activations.convert(x, "bf16").shape == (5, 128)


@pytest.mark.parametrize("kind", ["q8", "q16"])
def test_corner_cases(kind: str) -> None:
    x = torch.ones(1, 160)
    x[0, 0], x[0, 33], x[0, 64:96], x[0, 96:128] = torch.nan, torch.inf, 0.0, 1e-38
    actual = activations.quantize_rows(x, kind)
    assert actual.scale[0, :2].isnan().all() and actual.scale[0, 2:4].tolist() == [0, 0] and actual.scale[0, 4] > 0
    assert actual.q[0, :4].abs().sum() == 0 and actual.total[0, :4].abs().sum() == 0


def test_leading_dimensions_and_unknown_kinds() -> None:
    x = torch.randn(2, 3, 40)
    assert torch.equal(activations.fake_quantize(x, "q8")[1], activations.fake_quantize(x[1], "q8"))
    with pytest.raises(ConfigError, match="q4"):
        activations.fake_quantize(x, "q4")
