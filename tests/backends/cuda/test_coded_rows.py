"""Products of FP8 weights with rows in FP8 equal those of the codes in float64, as `reference/scaled_rows.py` defines them."""

from __future__ import annotations

import pytest
import torch

from support import triton_interpreter
from support.pretended_card import pretend

triton_interpreter.require()

from deepseek_optimizer.backends.base import PREFILL, CompileOptions
from deepseek_optimizer.backends.cuda.backend import CudaBackend, rounds_to_fp8
from deepseek_optimizer.backends.cuda.gates import SILU
from deepseek_optimizer.backends.cuda.kernels import experts, linear
from deepseek_optimizer.backends.cuda.kernels.heads import HeadInputs
from deepseek_optimizer.backends.cuda.matrices import DeviceMatrix, DeviceStack
from deepseek_optimizer.backends.reference import ReferenceBackend
from deepseek_optimizer.backends.reference.ops import swiglu
from deepseek_optimizer.backends.reference.scaled_rows import dequantized_groups, quantized_groups
from deepseek_optimizer.errors import BackendError
from deepseek_optimizer.quant import pack, unpack
from deepseek_optimizer.quant.packed import PackedStack
from support.family_configs import llama
from support.models import assert_close_rows, random_ids, random_model, weights_of
from support.steps import Part, Runner, run_step

from ..cpu.packing import packed_weights
from .plans import FORMAT_TOLERANCE, graph_of
from .values import random

CPU = torch.device("cpu")
BOUND = 2e-6  # of the largest output: sums in fp32


def rounded(x: torch.Tensor) -> torch.Tensor:
    return dequantized_groups(*quantized_groups(x, "fp8"), "fp8").double()


def rows_of(count: int, columns: int, seed: int = 1) -> torch.Tensor:
    """Of different magnitudes, also within a row; a group of zeros."""
    x = random(count, columns, seed=seed) * torch.logspace(-3, 3, count)[:, None]
    x[:, columns // 2 :] *= 1e-3
    x[0, :128] = 0
    return x


def assert_close(made: torch.Tensor, exact: torch.Tensor) -> None:
    assert made.shape == exact.shape and made.isfinite().all()
    errors = (made.double() - exact).abs().amax(-1)
    assert (errors <= BOUND * exact.abs().amax(-1)).all()


@pytest.mark.parametrize(("count", "shape"), [(5, (17, 130)), (35, (200, 300)), (70, (33, 40))], ids=str)
def test_products(count, shape):
    packed, x, bias = pack(random(*shape), "fp8"), rows_of(count, shape[1]), random(shape[0], seed=2)
    out = torch.full((count, shape[0]), torch.nan)
    exact = rounded(x) @ unpack(packed).double().T + bias
    linear.linear(x, DeviceMatrix(packed, CPU, True), bias, out)
    assert_close(out, exact)
    linear.linear(x, DeviceMatrix(packed, CPU), bias, out)
    with pytest.raises(AssertionError):  # rows in bf16
        assert_close(out, exact)


@pytest.mark.parametrize("unusual", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_rows_that_are_not_finite_have_no_finite_products(unusual):
    """They are errors of the model, which an engine reports."""
    packed, x = pack(random(17, 130), "fp8"), rows_of(6, 130)
    x[2, 129] = unusual
    out = torch.zeros(6, 17)
    linear.linear(x, DeviceMatrix(packed, CPU, True), None, out)
    finite = out.isfinite()
    assert not finite[2].any() and finite[[0, 1, 3, 4, 5]].all()


def test_few_rows_are_not_rounded():
    packed, x, out = pack(random(33, 140), "fp8"), rows_of(3, 140), torch.empty(3, 33)
    linear.linear(x, DeviceMatrix(packed, CPU, True), None, out)
    assert_close(out, x.double() @ unpack(packed).double().T)


def test_gate_and_up_of_a_part_of_a_matrix():
    gate, up = (pack(random(80, 160, seed=seed), "fp8") for seed in (3, 4))
    x, out = random(6, 160, seed=5), torch.empty(6, 40)
    first, second = (DeviceMatrix(packed, CPU, True).part(32, 72) for packed in (gate, up))
    linear.gate_up(x, first, second, (None, None), out)
    exact = swiglu(*(rounded(x) @ unpack(packed)[32:72].double().T for packed in (gate, up)))
    assert (out.double() - exact).abs().max() <= 4 * BOUND * exact.abs().max()


def test_experts_and_heads():
    """The rows of pairs, and those of heads, are found among the rounded rows."""
    tokens, columns, inner, count = 12, 144, 24, 3
    weights = random(2 * count, inner, columns, seed=6)
    packed = [pack(weights[i], "fp8") for i in range(2 * count)]
    matrices = DeviceStack(
        PackedStack("fp8", 2 * count, inner, columns, torch.stack([each.data for each in packed])), CPU, True
    )
    x, dense = random(tokens, columns, seed=7), [unpack(each).double() for each in packed]
    routes = torch.tensor([[0.0, 2.0, 0.5, 0.5], [1.0, 2.0, 0.5, 0.5]]).repeat(6, 1)
    out = torch.empty(2 * tokens, inner)
    tiles = experts.group_for(routes, count, matrices)
    experts.gate_up(x, routes, tiles, matrices, out, gate=SILU)
    for token in range(tokens):
        for j in range(2):
            e, row = int(routes[token, j]), rounded(x[token : token + 1])
            exact = swiglu(row @ dense[2 * e].T, row @ dense[2 * e + 1].T)
            assert (out[2 * token + j].double() - exact[0]).abs().max() <= 4 * BOUND * exact.abs().max()
    q, mapped = random(tokens, 2 * count, columns, seed=8), torch.empty(tokens, 2 * count, inner)
    HeadInputs(q, matrices).products(matrices, 0, mapped)
    exact = torch.stack([rounded(q[:, h]) @ dense[h].T for h in range(2 * count)], 1)
    assert_close(mapped.flatten(0, 1), exact.flatten(0, 1))


def test_the_setting_chooses_them():
    packed, x = pack(random(33, 140), "fp8"), rows_of(6, 140)
    backend = CudaBackend(CPU)
    assert "fp8" in backend.capabilities.activations
    assert_close(backend.linear(x, packed, options=CompileOptions("fp8")), rounded(x) @ unpack(packed).double().T)
    with pytest.raises(AssertionError):
        assert_close(backend.linear(x, packed), rounded(x) @ unpack(packed).double().T)


def test_a_card_that_cannot_multiply_fp8(monkeypatch):
    pretend(monkeypatch, capability=(8, 6))
    card = torch.device("cuda", 0)
    assert not rounds_to_fp8(card, CompileOptions())
    with pytest.raises(BackendError, match=r'activation="fp8" needs .* 8\.9 .* a card has 8\.6; with activation="auto"'):
        rounds_to_fp8(card, CompileOptions("fp8"))
    pretend(monkeypatch, capability=(8, 9))
    assert rounds_to_fp8(card, CompileOptions("fp8"))


def test_a_plan():
    """Prompts of a whole model beside the reference with the same setting; the report names the rounding."""
    model, options, runners = random_model(llama()), CompileOptions("fp8"), []
    graph, weights = graph_of(model), packed_weights(weights_of(model), "fp8")
    for backend in (CudaBackend(CPU), ReferenceBackend()):
        compiled = backend.compile(graph, weights, options)
        runners.append(Runner(compiled, backend.new_store(graph, "fp32", 24, 0), (None,) * graph.cache.groups))
    ids = random_ids(model.config, 20)
    made, exact = (run_step(each.plan, each.store, [Part(each.sequence(), ids, PREFILL)]).logits for each in runners)
    assert_close_rows(made, exact, FORMAT_TOLERANCE["bf16"])  # a code may be the next one
    rounded_products = [row for row in runners[0].plan.describe() if row.get("activation") == "e4m3"]
    assert rounded_products and all("fp8" in row["format"] for row in rounded_products)
