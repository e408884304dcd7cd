"""RoPE in training: gradients of the reference, the native form against fp64, strides, Transformers' functions."""

import pytest
import torch
from transformers.models.deepseek_v3.modeling_deepseek_v3 import apply_rotary_pos_emb_interleave
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from deepseek_optimizer.train.ops import native
from deepseek_optimizer.train.ops.rope import rope, rope_reference
from support.op_checks import against_fp64

needs_native = pytest.mark.skipif(not native.built(), reason="no native library on this machine")
CASES = [(64, 64), (64, 32), (48, 48), (40, 16), (6, 2), (256, 128), (10, 0)]


def angles(batch: int, tokens: int, width: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    turned = torch.randn(batch, tokens, width // 2, dtype=torch.float64).repeat(1, 1, 2)
    return turned.cos().to(dtype), turned.sin().to(dtype)


@pytest.mark.parametrize("interleaved", [False, True])
def test_gradients_of_the_reference(interleaved):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, 10, dtype=torch.float64, requires_grad=True)
    cos, sin = angles(1, 4, 6, torch.float64)
    assert torch.autograd.gradcheck(lambda x: rope(x, cos, sin, interleaved), (x,))


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("interleaved", [False, True])
def test_native_equals_fp64_up_to_rounding(dtype, interleaved):
    torch.manual_seed(1)
    for (width, turned), batch in ((case, batch) for case in CASES for batch in (1, 2)):
        cos, sin = angles(batch, 7, turned, dtype)
        flat = torch.randn(2, 7, 3 * width + 5).to(dtype)
        for x in (
            flat[..., : 3 * width].unflatten(-1, (3, width)).transpose(1, 2),  # heads of a wider row
            torch.randn(2, 3, 7, width).to(dtype),
            torch.randn(2, 3, width, 7).to(dtype).transpose(2, 3),
        ):
            against_fp64(
                lambda x, c=cos, s=sin: rope(x, c, s, interleaved),
                lambda x, c=cos, s=sin: rope_reference(x, c.to(x.dtype), s.to(x.dtype), interleaved),
                (x,),
            )


@needs_native
def test_cosines_and_sines_that_differ_between_halves():
    torch.manual_seed(2)
    cos, sin = torch.randn(1, 5, 12), torch.randn(1, 5, 12)
    for interleaved in (False, True):
        against_fp64(
            lambda x, i=interleaved: rope(x, cos, sin, i),
            lambda x, i=interleaved: rope_reference(x, cos.to(x.dtype), sin.to(x.dtype), i),
            (torch.randn(1, 2, 5, 12),),
        )


def test_equals_transformers():
    torch.manual_seed(3)
    q, k = torch.randn(2, 4, 9, 16), torch.randn(2, 2, 9, 16)
    cos, sin = angles(2, 9, 16, torch.float32)
    for theirs, interleaved in ((apply_rotary_pos_emb, False), (apply_rotary_pos_emb_interleave, True)):
        for actual, expected in zip((rope(x, cos, sin, interleaved) for x in (q, k)), theirs(q, k, cos, sin), strict=True):
            torch.testing.assert_close(actual, expected)


def test_results_have_the_strides_of_their_operand():
    cos, sin = angles(1, 9, 16, torch.float32)
    x = torch.randn(2, 9, 4, 16).transpose(1, 2)
    assert rope(x, cos, sin).stride() == x.stride()
    assert rope(x.contiguous(), cos, sin).is_contiguous()


def test_mismatched_shapes_are_named():
    cos, sin = angles(1, 9, 16, torch.float32)
    for x in (torch.ones(2, 4, 8, 16), torch.ones(2, 4, 9, 8), torch.ones(4, 9, 16)):
        with pytest.raises(ValueError, match="cos"):
            rope(x, cos, sin)
