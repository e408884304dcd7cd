"""The inputs of matrices and their second moments."""

from __future__ import annotations

import torch

from deepseek_optimizer.backends.registry import choose_backend
from deepseek_optimizer.calibration.inputs import Inputs, moment_of
from deepseek_optimizer.config import DeepSeekConfig


def test_moments_are_sums_of_products() -> None:
    rows = [torch.randn(5, 3), torch.randn(2, 3)]
    others = [torch.randn(5, 4), torch.randn(2, 4)]
    for name in ("auto", "reference"):
        backend, _ = choose_backend(DeepSeekConfig(backend=name), torch.device("cpu"))
        for y in (rows, others):
            exact = torch.cat(rows).bfloat16().float().t() @ torch.cat(y).bfloat16().float()
            assert torch.allclose(moment_of(rows, y, backend), exact, atol=1e-4)


def test_names_with_the_same_inputs_are_grouped() -> None:
    inputs, x, y = Inputs(), torch.randn(1, 6, 4), torch.randn(1, 6, 4)
    for name, rows in (("q", x), ("o", y), ("k", x)):
        inputs.add(name, rows)
    assert inputs.shared(["q", "k", "o"]) == [["q", "k"], ["o"]]
    assert inputs.rows["q"][0].shape == (6, 4)


def test_too_few_inputs() -> None:
    inputs = Inputs()
    inputs.add("w", torch.randn(3, 8))
    assert not inputs.enough("w", 8) and not inputs.enough("absent", 8)
    inputs.add("w", torch.randn(1, 8))
    assert inputs.enough("w", 8)
