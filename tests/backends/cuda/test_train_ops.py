"""Training by Triton's kernels, in its interpreter: against plain torch in fp64, and AdamW bit for bit."""

from __future__ import annotations

import copy

import pytest
import torch

from support import triton_interpreter

triton_interpreter.require()

from deepseek_optimizer.backends.cuda.kernels import train_rows
from deepseek_optimizer.train.ops import native, triton_ops
from deepseek_optimizer.train.ops.adamw import Rates, Update, adamw, adamw_reference, squares, squares_reference
from deepseek_optimizer.train.ops.cross_entropy import cross_entropy_, linear_cross_entropy
from deepseek_optimizer.train.ops.moments import Moments
from deepseek_optimizer.train.ops.random_bits import keys
from deepseek_optimizer.train.ops.rms_norm import rms_norm, rms_norm_of_dtype, rms_norm_reference, rms_norm_with_residual
from deepseek_optimizer.train.ops.rope import rope, rope_reference
from deepseek_optimizer.train.ops.swiglu import swiglu, swiglu_reference
from deepseek_optimizer.train.optimizer import DeepSeekAdamW
from deepseek_optimizer.train.prepare import prepare
from support.family_configs import llama
from support.models import random_model
from support.op_checks import against_fp64, contiguous_and_not

DTYPES = [torch.float32, torch.bfloat16]
EPS = 1e-5


@pytest.fixture(autouse=True)
def _kernels_instead_of_native(monkeypatch):
    """As on a card: the kernels support every tensor in bf16 and fp32, and the native library none."""
    monkeypatch.setattr(native, "usable", lambda *_: False)
    monkeypatch.setattr(triton_ops, "usable", lambda *ts: all(t is None or t.dtype in DTYPES for t in ts))
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm(dtype, monkeypatch):
    monkeypatch.setattr(train_rows, "_PARTS", 4)  # of three rows each, the last one with fewer
    for rows, n in ((1, 2), (3, 7), (11, 40), (2, 577)):
        for x in contiguous_and_not(torch.randn(rows, n).to(dtype)) if n == 40 else (torch.randn(rows, n).to(dtype),):
            weight = torch.randn(n).to(dtype)
            against_fp64(lambda x, w: rms_norm(x, w, EPS), lambda x, w: rms_norm_reference(x, w, EPS), (x, weight))
    x, weight = torch.randn(2, 3, 8).to(dtype), torch.randn(8).to(dtype)
    exact = lambda x, w: (rms_norm_reference(x, w, EPS), x)  # noqa: E731
    against_fp64(lambda x, w: rms_norm_with_residual(x, w, EPS), exact, (x, weight))


def test_norms_of_frozen_weights_empty_batches_and_two_dtypes():
    x, weight = torch.randn(4, 8, requires_grad=True), torch.randn(8)
    rms_norm(x, weight, EPS).sum().backward()
    assert x.grad is not None and weight.grad is None
    nothing, weight = torch.randn(0, 8, requires_grad=True), torch.randn(8, requires_grad=True)
    rms_norm(nothing, weight, EPS).sum().backward()
    assert nothing.grad.shape == (0, 8) and not weight.grad.any()
    x = torch.randn(5, 8).bfloat16().requires_grad_()
    y = rms_norm_of_dtype(x, weight, EPS)
    y.float().sum().backward()
    assert y.dtype == x.grad.dtype == torch.bfloat16 and weight.grad.dtype == torch.float32
    exact = rms_norm_reference(x.detach().double(), weight.detach().double(), EPS)
    assert (y.double() - exact).norm() <= 5e-3 * exact.norm()


@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu(dtype):
    for rows, n in ((1, 1), (3, 15), (40, 97)):
        for gate in contiguous_and_not((4 * torch.randn(rows, n)).to(dtype)):
            against_fp64(swiglu, swiglu_reference, (gate, torch.randn(rows, n).to(dtype)))


def test_large_gates_do_not_overflow():
    gate = torch.tensor([-1e4, -100.0, 100.0, 1e4, float("nan")], requires_grad=True)
    up = torch.ones(5, requires_grad=True)
    h = swiglu(gate, up)
    h.sum().backward()
    assert h[:4].tolist() == [0, 0, 100, 1e4] and h[4].isnan()
    assert gate.grad[:4].tolist() == [0, 0, 1, 1] and gate.grad[4].isnan()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
def test_rope(dtype, interleaved):
    for (batch, heads, tokens, width), rotated, angles in (((2, 3, 3, 8), 8, 2), ((1, 17, 2, 10), 6, 1)):
        cos, sin = (torch.randn(angles, tokens, rotated).to(dtype) for _ in range(2))
        form = lambda x, c=cos, s=sin: rope(x, c, s, interleaved)  # noqa: E731
        exact = lambda x, c=cos, s=sin: rope_reference(x, c, s, interleaved)  # noqa: E731
        x = torch.randn(batch, heads, tokens, width).to(dtype)
        for given in (x, x.transpose(1, 2).contiguous().transpose(1, 2), x.transpose(2, 3).contiguous().transpose(2, 3)):
            against_fp64(form, exact, (given,))
    assert rope(torch.randn(2, 0, 3, 4), torch.ones(1, 3, 4), torch.ones(1, 3, 4)).shape == (2, 0, 3, 4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [1, 7, 300, 9001])
def test_cross_entropy_of_logits(dtype, columns):
    logits, labels = 5 * torch.randn(6, columns), torch.randint(0, columns, (6,))
    logits[0, 0], logits[1] = 90.0, -1e4 + logits[1]
    logits[2, :-1], labels[2] = -torch.inf, columns - 1
    wide = logits.double().requires_grad_()
    exact = torch.nn.functional.cross_entropy(wide, labels, reduction="sum")
    (0.3 * exact).backward()
    loss, gradient = cross_entropy_(logits.clone(), labels, 0.3, dtype)
    assert loss == pytest.approx(exact.item(), rel=2e-6, abs=1e-5) and gradient.dtype == dtype
    bound = 1e-6 if dtype == torch.float32 else 2**-8
    assert (gradient.double() - wide.grad).abs().max() <= bound * wide.grad.abs().max().clamp(min=1e-3)
    before = logits.clone()
    assert cross_entropy_(logits, labels, None, dtype)[0] == pytest.approx(loss, rel=1e-6, abs=1e-5)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_loss_of_a_head_in_chunks(dtype):
    hidden, weight = torch.randn(21, 16).to(dtype), torch.randn(50, 16).to(dtype)
    labels = torch.randint(0, 50, (21,))
    labels[[2, 9]] = -100
    ours = [t.clone().requires_grad_() for t in (hidden, weight)]
    exact = [t.double().requires_grad_() for t in (hidden, weight)]
    loss = linear_cross_entropy(*ours, labels, chunk=8)
    expected = torch.nn.functional.cross_entropy(exact[0] @ exact[1].t(), labels)
    (2 * loss).backward()
    (2 * expected).backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for a, b in zip(ours, exact, strict=True):
        assert (a.grad.double() - b.grad).norm() <= (1e-5 if dtype == torch.float32 else 2e-2) * b.grad.norm()


def test_rows_with_nan_have_a_loss_of_nan():
    logits = torch.zeros(1, 9)
    logits[0, 4] = torch.nan
    assert torch.tensor(cross_entropy_(logits, torch.tensor([1]), None, torch.float32)[0]).isnan()


@pytest.mark.parametrize("kind", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("master", ["none", "split", "stochastic"])
def test_adamw_has_the_bits_of_the_reference(kind, master):
    for count in (255, 1300):
        parameter = torch.randn(count)
        low = torch.randint(-32768, 32767, (count,)).to(torch.int16) if master == "split" else None
        made = Update(
            parameter if master == "none" else parameter.bfloat16(),
            torch.zeros(count),
            Moments.zeros(torch.Size([count]), kind),
            Rates.at(1, lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1),
            master,
            low,
        )
        exact = copy.deepcopy(made)
        for step in range(1, 4):
            gradient = torch.randn(count) * 10.0 ** float(torch.randint(-6, 3, ()))
            gradient[::7] = 0
            rates = Rates.at(step, lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1, gradient_scale=0.3)
            for update in (made, exact):
                update.gradient, update.rates = gradient.bfloat16() if step % 2 else gradient, rates
                update.key = keys(5, step, 3)
            adamw([made])
            adamw_reference(exact)
            for a, b in zip(made.tensors(), exact.tensors(), strict=True):
                assert a.dtype == b.dtype and torch.equal(a, b)


def test_squares_of_gradients():
    tensors = [torch.randn(5000), torch.randn(3, 7).bfloat16(), torch.zeros(0), torch.randn(10, 6).t()]
    tensors[1][2, 3] = torch.inf
    tensors[3][0, 0] = torch.nan
    sums, bad = squares(tensors)
    for tensor, total, count in zip(tensors, sums, bad, strict=True):
        exact, found = squares_reference(tensor)
        assert total == pytest.approx(exact, rel=1e-12, nan_ok=True) and count == found


def test_a_step_of_a_whole_model(monkeypatch):
    """Loss, gradients and updated weights are those of plain torch, and every op with a kernel was computed by it."""
    used = set()
    for name in ("rms_norm", "swiglu", "rope", "cross_entropy_", "adamw", "squares"):
        own = getattr(triton_ops, name)
        monkeypatch.setattr(triton_ops, name, lambda *args, own=own, name=name: (used.add(name), own(*args))[1])
    kernels = triton_ops.usable
    results = []
    for usable in (kernels, lambda *_: False):
        monkeypatch.setattr(triton_ops, "usable", usable)
        model = random_model(llama(num_hidden_layers=1))
        optimizer = DeepSeekAdamW(model.parameters(), lr=1e-3, state="int8", max_norm=1.0)
        prepared = prepare(model)
        ids = torch.arange(2 * 5).view(2, 5) + 3
        with prepared.saved:
            loss = model.train()(input_ids=ids, labels=ids).loss
        loss.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
        optimizer.step()
        prepared.undo()
        results.append((loss.detach(), gradients, {name: p.detach() for name, p in model.named_parameters()}))
    (loss, gradients, weights), (exact, exact_gradients, exact_weights) = results
    torch.testing.assert_close(loss, exact, rtol=2e-6, atol=0)
    for name, gradient in exact_gradients.items():
        scale = gradient.abs().max().clamp(min=1e-3)
        torch.testing.assert_close(gradients[name] / scale, gradient / scale, rtol=0, atol=2e-5, msg=name)
    assert all((weights[name] - exact_weights[name]).abs().max() <= 2.1e-3 for name in weights)  # each step is at most lr
    assert used == {"rms_norm", "rope", "cross_entropy_", "adamw", "squares", "swiglu"}


def test_what_is_said_of_a_model_on_a_card(monkeypatch):
    card = torch.device("cuda", 0)
    monkeypatch.setattr(triton_ops, "missing", lambda device: None)
    assert "are Triton's kernels on cuda:0" in triton_ops.note_for(card)
    monkeypatch.setattr(triton_ops, "missing", lambda device: "Triton is not installed: pip install x")
    assert "PyTorch's own operations on cuda:0: Triton is not installed" in triton_ops.note_for(card)
    assert triton_ops.note_for(torch.device("cpu")) is None
