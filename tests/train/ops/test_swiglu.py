"""SwiGLU in training: gradients of the reference, the native form against fp64."""

import pytest
import torch

from deepseek_optimizer.train.ops import native
from deepseek_optimizer.train.ops.swiglu import swiglu, swiglu_reference
from support.op_checks import against_fp64, contiguous_and_not

needs_native = pytest.mark.skipif(not native.built(), reason="no native library on this machine")


def test_gradients_of_the_reference():
    torch.manual_seed(0)
    gate, up = (torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(swiglu, (gate, up))


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_native_equals_fp64_up_to_rounding(dtype):
    torch.manual_seed(1)
    for rows, n in ((1, 1), (3, 15), (5, 16), (40, 97), (300, 128)):
        for gate in contiguous_and_not((4 * torch.randn(rows, n)).to(dtype)):
            against_fp64(swiglu, swiglu_reference, (gate, torch.randn(rows, n).to(dtype)))


@needs_native
def test_large_gates_do_not_overflow():
    gate = torch.tensor([-1e4, -100.0, 100.0, 1e4, float("nan")], requires_grad=True)
    up = torch.ones(5, requires_grad=True)
    h = swiglu(gate, up)
    h.sum().backward()
    assert h[:4].tolist() == [0, 0, 100, 1e4] and h[4].isnan()
    assert gate.grad[:4].tolist() == [0, 0, 1, 1]


def test_mismatched_shapes_are_named():
    with pytest.raises(ValueError, match="gate is"):
        swiglu(torch.ones(2, 3), torch.ones(3))
