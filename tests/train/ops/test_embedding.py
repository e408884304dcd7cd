"""Embeddings in training: gradients are torch's in fp64, rounded once; padding, accumulated gradients, reproducible bits."""

import pytest
import torch

from deepseek_optimizer.train.ops import native
from deepseek_optimizer.train.ops.embedding import embedding, embedding_reference
from support.op_checks import against_fp64

needs_native = pytest.mark.skipif(not native.built(), reason="no native library on this machine")


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_native_equals_fp64_up_to_rounding(dtype):
    torch.manual_seed(0)
    for rows, width, shape in ((1, 1, (3,)), (7, 5, (2, 40)), (5000, 48, (3, 100)), (300, 33, ()), (9, 16, (0,))):
        ids, weight = torch.randint(0, rows, shape), torch.randn(rows, width).to(dtype)
        for padding in (None, 0, -1):
            against_fp64(
                lambda w, i=ids, p=padding: embedding(i, w, p),
                lambda w, i=ids, p=padding: embedding_reference(i, w, p),
                (weight,),
            )


def test_fp64_uses_torch():
    weight = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w: embedding(torch.tensor([[1, 5, 1]]), w), (weight,))


def test_many_small_gradients_of_one_row_are_not_lost():
    weight = torch.zeros(3, 16, dtype=torch.bfloat16, requires_grad=True)
    embedding(torch.ones(4096, dtype=torch.int32), weight).backward(torch.full((4096, 16), 2**-12, dtype=torch.bfloat16))
    assert weight.grad[1].tolist() == [1.0] * 16 and not weight.grad[[0, 2]].any()


@needs_native
def test_accumulated_fp32_gradients_are_added_to():
    parameter = torch.nn.Parameter(torch.randn(50, 8).bfloat16())
    parameter.main_grad = torch.ones(50, 8)
    embedding(torch.tensor([3, 3, 7]), parameter).sum().backward()
    assert parameter.grad is None
    assert parameter.main_grad[:, 0].tolist() == [3.0 if i == 3 else 2.0 if i == 7 else 1.0 for i in range(50)]


def test_an_index_without_a_row_is_an_error():
    with pytest.raises(IndexError):
        embedding(torch.tensor([50]), torch.randn(50, 8))
