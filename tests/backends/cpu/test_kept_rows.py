"""Results of norms that are converted once for several products: the same bits, also after changes of the tensor."""

from __future__ import annotations

import copy
import gc

import pytest
import torch

from deepseek_optimizer.backends.base import CompileOptions
from deepseek_optimizer.backends.cpu import CpuBackend, unavailable_reason
from deepseek_optimizer.quant.packed import PackedMatrix

pytestmark = pytest.mark.skipif(unavailable_reason() is not None, reason="no native build")

INT8 = CompileOptions("int8")
ROWS, WIDTH = 1100, 240


@pytest.fixture
def cpu():
    backend = CpuBackend(threads=2)
    backend.context.kept_rows.clear()
    return backend


@pytest.fixture
def calls(cpu, monkeypatch):
    """Names of the native calls."""
    made, call = [], cpu.context.call

    def recorded(name, *arguments, **written):
        made.append(name)
        return call(name, *arguments, **written)

    monkeypatch.setattr(cpu.context, "call", recorded)
    return made


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def normed(cpu, rows=ROWS):
    return cpu.norm(random(2, rows // 2, WIDTH), random(WIDTH, seed=1), None, 1e-6)


def matrices(cpu, format="int8"):
    return [PackedMatrix(format, 48, WIDTH, cpu.pack(random(48, WIDTH, seed=i), format)) for i in range(3)]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("format", ["int8", "int4", "bf16", "fp32"])
def test_products_of_one_norm_convert_once(cpu, calls, format, mode):
    with mode():
        weights, x, bias = matrices(cpu, format), normed(cpu), random(48)
        calls.clear()
        results = [cpu.linear(x, weight, bias) for weight in weights]
        assert calls == (["dso_linear"] * 3 if format == "fp32" else ["dso_convert", *["dso_linear_rows"] * 3])
        for weight, result in zip(weights, results, strict=True):
            assert torch.equal(cpu.linear(x.clone(), weight, bias), result) and result.shape == (2, ROWS // 2, 48)
        assert not any(name == "dso_linear_rows" for name in calls[4:])


def replaced_data(x):
    x.data = random(2, ROWS, WIDTH, seed=9)  # more rows


def turned_data(x):
    x.data = x.data.view(WIDTH, 2, -1).permute(1, 2, 0)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(
    "change",
    [lambda x: x.mul_(2), lambda x: x[0, :3].zero_(), lambda x: x.view(-1)[7:9].fill_(3), replaced_data, turned_data],
)
def test_changed_tensors_are_converted_again(cpu, calls, change, mode):
    with mode():
        weight, x = matrices(cpu)[0], normed(cpu)
        before = cpu.linear(x, weight)
        change(x)
        calls.clear()
        after = cpu.linear(x, weight)
        assert calls == ["dso_convert", "dso_linear_rows"] and not torch.equal(before, after)
        assert torch.equal(after, cpu.linear(x.clone(), weight))


def test_kinds_of_rows_are_apart(cpu, calls):
    x, weight = normed(cpu), matrices(cpu)[0]
    calls.clear()
    coarse, fine = cpu.linear(x, weight, None, INT8), cpu.linear(x, weight)
    assert calls.count("dso_convert") == 2 and not torch.equal(coarse, fine)
    assert torch.equal(cpu.linear(x.clone(), weight, None, INT8), coarse)


def test_matrices_of_another_width_are_refused_each_time(cpu):
    """After as well as before rows of the right width were kept: the library must not read them as rows of another width."""
    x, weight = normed(cpu), matrices(cpu)[0]
    for width in (WIDTH // 2, 2 * WIDTH):
        with pytest.raises(RuntimeError, match="shape"):
            cpu.linear(x, PackedMatrix("int8", 48, width, cpu.pack(random(48, width), "int8")))
        assert torch.equal(cpu.linear(x, weight), cpu.linear(x.clone(), weight))


def test_copies_and_views_are_other_tensors(cpu, calls):
    x, weight = normed(cpu), matrices(cpu)[0]
    expected = cpu.linear(x, weight)
    calls.clear()
    for other in (copy.deepcopy(x), x[:], x.detach()):
        assert torch.equal(cpu.linear(other, weight), expected)
    assert calls == ["dso_linear"] * 3


def test_rows_are_dropped_with_the_tensor_and_after_a_forward(cpu):
    kept = cpu.context.kept_rows
    with cpu.thread_context():
        x, weight = normed(cpu), matrices(cpu)[0]
        cpu.linear(x, weight)
        assert len(kept._of) == 1
        del x
        gc.collect()
        assert len(kept._of) == 0
        x = normed(cpu)
        cpu.linear(x, weight)
        assert len(kept._of) == 1
    assert len(kept._of) == 0 and x.numel()


def test_small_results_are_converted_within_their_products(cpu, calls):
    x, weight = normed(cpu, rows=10), matrices(cpu)[0]
    calls.clear()
    cpu.linear(x, weight)
    assert calls == ["dso_linear"]
