"""grouped_linear: gradients of experts, including those without rows, against fp64."""

import pytest
import torch

from deepseek_optimizer.train.ops import native
from deepseek_optimizer.train.ops.grouped import grouped_linear, grouped_linear_reference
from support.op_checks import against_fp64

needs_native = pytest.mark.skipif(not native.built(), reason="no native library on this machine")
ENDS = ([0, 0, 9, 9, 50, 61], [0, 61], [0, 0, 0])


def parts(ends, dtype, N=24, K=40):
    weight = torch.randn(len(ends) - 1, N, K) / K**0.5
    return torch.randn(ends[-1], K).to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()


def test_gradients_of_the_reference():
    torch.manual_seed(0)
    offsets = torch.tensor([0, 2, 2, 5])
    x, weight = parts(offsets.tolist(), torch.float64, 3, 4)
    assert torch.autograd.gradcheck(lambda x, w: grouped_linear(x, w, offsets), (x, weight))


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_native_equals_fp64_up_to_rounding(dtype):
    torch.manual_seed(1)
    for ends in ENDS:
        offsets = torch.tensor(ends)
        against_fp64(
            lambda x, w, o=offsets: grouped_linear(x, w, o),
            lambda x, w, o=offsets: grouped_linear_reference(x, w, o),
            parts(ends, dtype),
        )


@needs_native
def test_gradients_add_up_in_main_grad():
    torch.manual_seed(2)
    offsets = torch.tensor(ENDS[0])
    x, weight = parts(ENDS[0], torch.bfloat16)
    weight.main_grad = torch.ones(weight.shape)
    for _ in range(2):
        grouped_linear(x, weight, offsets).sum().backward()
    assert weight.grad is None and (weight.main_grad[[0, 2]] == 1).all()
    rows = 2 * x.detach()[9:50].double().sum(0) + 1
    torch.testing.assert_close(weight.main_grad[3].double(), rows.expand(24, 40), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("offsets", [[0, 3], [0, 3, 4], [1, 3, 5], [0, 6, 5]])
def test_invalid_offsets_are_rejected(offsets):
    with pytest.raises(ValueError, match="offsets"):
        grouped_linear(torch.ones(5, 4), torch.ones(2, 3, 4), torch.tensor(offsets))
