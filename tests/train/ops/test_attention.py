"""Packed attention: gradients of the reference by gradcheck, the native form against it in float64, and rejected inputs."""

import threading

import pytest
import torch

from deepseek_optimizer.train.ops import native
from deepseek_optimizer.train.ops.attention import _forward, attention, packed_attention, packed_attention_reference

needs_native = pytest.mark.skipif(not native.built(), reason="no native library on this machine")
# Relative to the norm: rounding of a weight to bf16, and of results that are summed over heads; fp32: a few roundings.
BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 1e-2}


def inputs(rows, tokens, heads, kv_heads, qk, v, dtype=torch.float64, by_head=False):
    """q, k, v as [rows, tokens, heads, width]; by_head: views of tensors with heads before tokens."""
    made = []
    for count, width in ((heads, qk), (kv_heads, qk), (kv_heads, v)):
        x = torch.randn((rows, count, tokens, width) if by_head else (rows, tokens, count, width), dtype=dtype)
        made.append((x.transpose(1, 2) if by_head else x).detach().requires_grad_())
    return made


def bounds(*pairs):
    return torch.tensor([a for a, _ in pairs]), torch.tensor([b for _, b in pairs])


def with_gradients(form, tensors, *rest):
    o = form(*tensors, *rest)
    g = torch.randn(o.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(o.dtype)
    return [o.detach(), *torch.autograd.grad(o, tensors, g)]


def by_definition(q, k, v, begin, end, scale, window=0):
    """Softmax with a dense mask over all tokens, where `packed_attention_reference` splits into sequences."""
    rows, tokens, heads, _ = q.shape
    text = torch.full((rows * tokens,), -1)
    for i, (a, b) in enumerate(zip(begin.tolist(), end.tolist(), strict=True)):
        text[a:b] = i
    t = torch.arange(rows * tokens)
    seen = (t[:, None] >= t) & (text[:, None] == text) & (text[:, None] >= 0)
    if window:
        seen &= t[:, None] - t < window
    group = heads // k.shape[2]
    q, k, v = (x.flatten(0, 1).transpose(0, 1) for x in (q, k, v))
    logits = (q @ k.repeat_interleave(group, 0).mT) * scale
    weights = logits.masked_fill(~seen, -1e30).softmax(-1) * seen
    return (weights @ v.repeat_interleave(group, 0)).transpose(0, 1).unflatten(0, (rows, tokens))


@pytest.mark.parametrize("window", [0, 3])
def test_the_reference_is_attention(window):
    torch.manual_seed(0)
    tensors = inputs(2, 9, 4, 2, 6, 4)
    begin, end = bounds((0, 5), (5, 5), (6, 9), (9, 18))
    actual = with_gradients(packed_attention_reference, tensors, begin, end, 0.7, window)
    expected = with_gradients(by_definition, tensors, begin, end, 0.7, window)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(lambda *t: packed_attention_reference(*t, begin, end, 0.7, window), tensors)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "qk", "v"), [(1, 1, 2, 2), (9, 3, 64, 64), (3, 3, 48, 32), (2, 2, 192, 128), (8, 1, 40, 256)]
)
def test_native_equals_the_reference(dtype, heads, kv_heads, qk, v):
    torch.manual_seed(0)
    for tokens, by_head in ((1, False), (61, True), (130, False)):
        tensors = inputs(2, tokens, heads, kv_heads, qk, v, dtype, by_head)
        third = tokens // 3
        for begin, end in (
            bounds((0, tokens), (tokens, 2 * tokens)),
            bounds((third, tokens), (tokens + 1, tokens + third + 1)),
        ):
            for window in (0, 50):
                actual = with_gradients(packed_attention, tensors, begin, end, qk**-0.5, window)
                wide = [t.detach().double().requires_grad_() for t in tensors]
                expected = with_gradients(packed_attention_reference, wide, begin, end, qk**-0.5, window)
                for name, a, b in zip("o q k v".split(), actual, expected, strict=True):
                    assert a.dtype == dtype and a.shape == b.shape
                    # A sequence of one token has zero gradients for q and k, up to rounding.
                    error = (a.double() - b).norm() / (4 * b.numel() ** 0.5 if tokens == 1 else b.norm())
                    assert error < BOUNDS[dtype], (name, tokens, window, float(error))


@needs_native
def test_the_native_form_is_used(monkeypatch):
    called = []
    monkeypatch.setattr(native, "call", lambda name, *_, **__: called.append(name))
    tensors = inputs(1, 4, 2, 1, 8, 8, torch.float32)
    packed_attention(*tensors, *bounds((0, 4)), 1.0).sum().backward()
    assert called == ["dso_train_attention_forward", "dso_train_attention_backward"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_padding_is_zero_and_has_no_gradient(dtype):
    torch.manual_seed(0)
    q, k, v = inputs(1, 12, 2, 2, 8, 8, dtype)
    o = attention(q[0], k[0], v[0], torch.tensor([0, 7, 12]), 0.3, used=torch.tensor([4, 5]))
    o.float().square().sum().backward()
    assert not o[4:7].any() and o[:4].all() and o[7:].all()
    for x in (q, k, v):
        assert not x.grad[0, 4:7].any() and x.grad[0, 7:].any()


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_sequence_is_bitwise_equal_to_one_alone(dtype):
    torch.manual_seed(0)
    tensors = [t[0].detach() for t in inputs(1, 300, 6, 2, 64, 64, dtype)]
    cuts = torch.tensor([0, 1, 65, 200, 200, 300])
    together = attention(*tensors, cuts, 0.125)
    for a, b in zip(cuts[:-1].tolist(), cuts[1:].tolist(), strict=True):
        alone = attention(*(t[a:b] for t in tensors), torch.tensor([0, b - a]), 0.125)
        assert torch.equal(together[a:b], alone)


@needs_native
def test_strides_need_no_copies():
    """Slices of one projection, and an expanded gradient."""
    torch.manual_seed(0)
    whole = torch.randn(2, 40, 8, 64, requires_grad=True)
    begin, end = bounds((0, 40), (40, 80))
    o = packed_attention(whole[:, :, :4], whole[:, :, 4:6], whole[:, :, 6:], begin, end, 0.125)
    (grad,) = torch.autograd.grad(o, whole, torch.ones(1, 1, 1, 1).expand_as(o))
    wide = whole.detach().double().requires_grad_()
    expected = packed_attention_reference(wide[:, :, :4], wide[:, :, 4:6], wide[:, :, 6:], begin, end, 0.125)
    torch.testing.assert_close(grad.double(), torch.autograd.grad(expected.sum(), wide)[0], rtol=1e-4, atol=1e-5)
    strided = torch.randn(1, 40, 64, 2).transpose(2, 3)  # a head's elements are not contiguous
    torch.testing.assert_close(
        packed_attention(strided, strided, strided, *bounds((0, 40)), 0.1),
        packed_attention_reference(strided, strided, strided, *bounds((0, 40)), 0.1),
    )


@needs_native
def test_large_logits_and_nan():
    torch.manual_seed(0)
    q, k, v = (t.detach() for t in inputs(1, 100, 2, 1, 64, 64, torch.bfloat16))
    o = packed_attention(q * 1e4, k, v, *bounds((0, 100)), 1.0)
    top = (q[0, 99, 1].double() @ k[0, :, 0].double().T).argmax()
    assert torch.equal(o[0, 99, 1], v[0, top, 0])
    k[0, 50, 0, 3] = float("nan")
    o = packed_attention(q, k, v, *bounds((0, 50), (50, 100)), 1.0)
    assert not o[0, :50].isnan().any() and o[0, 50:].isnan().all()


@needs_native
def test_the_op_passes_opcheck():
    tensors = inputs(2, 20, 4, 2, 16, 8, torch.float32)
    torch.library.opcheck(_forward, (*tensors, *bounds((0, 20), (22, 40)), 0.25, 0))


@needs_native
def test_concurrent_calls():
    torch.manual_seed(0)
    tensors = inputs(1, 90, 4, 2, 32, 32, torch.bfloat16)
    expected = with_gradients(packed_attention, tensors, *bounds((0, 90)), 0.2)
    wrong = []

    def work():
        for _ in range(5):
            actual = with_gradients(packed_attention, tensors, *bounds((0, 90)), 0.2)
            if not all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True)):
                wrong.append(actual)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


@needs_native
def test_autocast_and_inputs_without_gradients():
    torch.manual_seed(0)
    q, k, v = inputs(1, 20, 2, 2, 16, 16, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        o = packed_attention(q, k, v, *bounds((0, 20)), 0.25)
    assert o.dtype == torch.bfloat16
    o = packed_attention(q.detach(), k.detach(), v, *bounds((0, 20)), 0.25)
    o.sum().backward()
    assert q.grad is None and v.grad is not None


def test_rejected_inputs():
    q, k, v = inputs(2, 6, 4, 2, 8, 8, torch.float32)
    whole = bounds((0, 6), (6, 12))
    cases = [
        ("batch and tokens must be equal", (q[:1], k, v, *whole)),
        ("a multiple of k's heads", (q[:, :, :3], k, v, *whole)),
        ("heads of the same width", (q, k[..., :4], v, *whole)),
        ("the same floating-point dtype", (q, k.double(), v, *whole)),
        ("crosses the end of a row of 6", (q, k, v, *bounds((0, 7)))),
        ("in ascending order within 12 tokens", (q, k, v, *bounds((0, 6), (5, 8)))),
        ("in ascending order within 12 tokens", (q, k, v, *bounds((6, 13)))),
        ("int64 tensors", (q, k, v, *(x.int() for x in whole))),
    ]
    for says, arguments in cases:
        with pytest.raises(ValueError, match=says):
            packed_attention(*arguments, 1.0)
    with pytest.raises(ValueError, match="must not be negative, got -1"):
        packed_attention(q, k, v, *whole, 1.0, -1)
    for says, cuts, used in (
        ("from 0 to 6", [0, 5], None), ("from 0 to 6", [1, 6], None), ("from 0 to 6", [], None),
        ("must have 2 elements", [0, 3, 6], [3, 4]), ("in ascending order within", [0, 4, 3, 6], None),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=says):
            attention(q[0], k[0], v[0], torch.tensor(cuts), 1.0, used=None if used is None else torch.tensor(used))


@needs_native
def test_bounds_may_be_strided():
    torch.manual_seed(9)
    tensors, table = inputs(2, 16, 2, 2, 16, 16, torch.float32), torch.tensor([[0, 8], [8, 16], [16, 32]])
    actual = with_gradients(packed_attention, tensors, *table.unbind(1), 0.25)
    dense = with_gradients(packed_attention, tensors, *(t.clone() for t in table.unbind(1)), 0.25)
    assert all(map(torch.equal, actual, dense))
