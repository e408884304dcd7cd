"""torch's `scaled_mm` in place of kernels: torch accepts the operands, and results are those of the kernels and the reference.

Its product is computed from its operands as cuBLASLt does it, for lack of a card.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from support import triton_interpreter

triton_interpreter.require()

from deepseek_optimizer.backends.base import DECODE, PREFILL, CompileOptions
from deepseek_optimizer.backends.cuda.alternative import Chosen
from deepseek_optimizer.backends.cuda.backend import CudaBackend
from deepseek_optimizer.backends.cuda.kernels import linear, scaled_product
from deepseek_optimizer.backends.cuda.matrices import DeviceMatrix
from deepseek_optimizer.backends.cuda.scaled_mm import SCALED_MM
from deepseek_optimizer.backends.reference import ReferenceBackend
from deepseek_optimizer.backends.reference.ops import swiglu
from deepseek_optimizer.quant import pack, unpack
from support.family_configs import llama
from support.models import assert_close_rows, random_ids, random_model, weights_of
from support.recording_device import RecordingDevice
from support.scaled_mm import scaled_mm_in_software
from support.steps import Part, Runner, run_step

from ..cpu.packing import packed_weights
from .plans import FORMAT_TOLERANCE, graph_of
from .test_coded_rows import assert_close, rounded, rows_of
from .values import random

CPU = torch.device("cpu")
SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 2,
         "num_key_value_heads": 1, "vocab_size": 40}  # fmt: skip


@pytest.fixture(autouse=True)
def calls(monkeypatch):
    """The operands of each call of `scaled_mm`."""
    made = []

    def scaled_mm(*args, **kwargs):
        made.append(args)
        return scaled_mm_in_software(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_mm", scaled_mm)
    return made


def matrix_of(packed, rows=1):
    matrix = DeviceMatrix(packed, CPU, True)
    matrix.alternatives = (Chosen(SCALED_MM, rows),)
    return matrix


@pytest.mark.parametrize(("count", "shape"), [(5, (128, 128)), (17, (128, 384))], ids=str)
def test_products(calls, count, shape):
    packed, x, bias = pack(random(*shape), "fp8"), rows_of(count, shape[1]), random(shape[0], seed=2)
    out = torch.full((count, shape[0]), torch.nan)
    exact = rounded(x) @ unpack(packed).double().T
    linear.linear(x, matrix_of(packed), bias, out)
    assert_close(out, exact + bias)
    linear.linear(x, matrix_of(packed), None, out)
    assert_close(out, exact)
    assert len(calls) == 2 and calls[0][0].shape == (-(-count // 16) * 16, shape[1])
    linear.linear(x, DeviceMatrix(packed, CPU, True), None, out)
    assert_close(out, exact)
    assert len(calls) == 2  # by the kernel


def test_a_matrix_in_rows():
    """Codes and scales of `quant.fp8`, bit for bit; columns 1 and 2 of four are exchanged."""
    packed = pack(random(256, 640), "fp8")
    codes, scales = scaled_product.rows_of(DeviceMatrix(packed, CPU, True))
    assert scales.shape == (8, 2) and scales.stride() == (1, 8)
    ordered = codes.float().unflatten(1, (-1, 4))[..., [0, 2, 1, 3]].flatten(1)
    factors = scales.t()[:, :5].repeat_interleave(128, 0).repeat_interleave(128, 1)
    assert torch.equal(ordered * factors, unpack(packed)) and not scales[5:].any()


def test_gate_and_up_of_a_part(calls):
    """A part that begins within a block is computed by the kernel."""
    gate, up = (pack(random(384, 128, seed=seed), "fp8") for seed in (3, 4))
    x, out = random(6, 128, seed=5), torch.empty(6, 128)
    for begin, used in ((128, 2), (144, 0)):
        calls.clear()
        first, second = (matrix_of(packed).part(begin, begin + 128) for packed in (gate, up))
        linear.gate_up(x, first, second, (None, None), out)
        exact = swiglu(*(rounded(x) @ unpack(packed)[begin : begin + 128].double().T for packed in (gate, up)))
        assert (out.double() - exact).abs().max() <= 1e-5 * exact.abs().max() and len(calls) == used


def test_few_rows_are_multiplied_by_kernels(calls):
    packed, x, out = pack(random(128, 128), "fp8"), rows_of(12, 128), torch.empty(12, 128)
    for count, fewest, used in ((4, 1, 0), (11, 12, 0), (12, 12, 1)):
        linear.linear(x[:count], matrix_of(packed, fewest), None, out[:count])
        assert len(calls) == used


def runner(backend, graph, weights):
    plan = backend.compile(graph, weights, CompileOptions("fp8"))
    return Runner(plan, backend.new_store(graph, "fp32", 24, 0), (None,) * graph.cache.groups)


def test_a_plan(calls):
    """Of a whole model beside the reference. The plan and the backend say what is used, and count its memory."""
    model = random_model(llama(**SIZES))
    graph, weights = graph_of(model), packed_weights(weights_of(model), "fp8")
    alternatives = (Chosen(SCALED_MM, 16),)
    made = runner(CudaBackend(CPU, alternatives=alternatives), graph, weights)
    exact, plain = runner(ReferenceBackend(), graph, weights), runner(CudaBackend(CPU), graph, weights)
    ids = random_ids(model.config, 20)
    logits = [run_step(each.plan, each.store, [Part(each.sequence(), ids, PREFILL)]).logits for each in (made, exact)]
    assert_close_rows(*logits, FORMAT_TOLERANCE["bf16"])  # a code may be the next one
    assert calls
    rows = {row["op"]: row for row in made.plan.describe() if "alternative" in row}
    assert rows["gate_up"]["alternative"] == "scaled_mm from 16 rows" and "lm_head" not in rows
    assert not any("alternative" in row for row in plain.plan.describe())
    assert made.plan.fits(SCALED_MM) and not made.plan.fits(replace(SCALED_MM, fits=lambda shape: False))
    assert made.plan.buffer_bytes(4096, 1) > plain.plan.buffer_bytes(4096, 1)


def test_captured_steps(calls):
    """They have the bits of plain ones: nothing that a replay needs is outside of the graph."""
    model = random_model(llama(**SIZES))
    graph, weights = graph_of(model), packed_weights(weights_of(model), "fp8")
    made = [
        runner(CudaBackend(CPU, captured, RecordingDevice(), alternatives=(Chosen(SCALED_MM, 5),)), graph, weights)
        for captured in (True, False)
    ]
    sequences = [[each.sequence() for _ in range(5)] for each in made]
    for step in range(2):
        tokens = [(token + step) % 40 for token in random_ids(model.config, 5)]
        plain, replayed = (
            run_step(each.plan, each.store, [Part(s, tokens[i : i + 1], DECODE) for i, s in enumerate(own)]).logits
            for each, own in zip(reversed(made), reversed(sequences), strict=True)
        )
        assert torch.equal(plain, replayed)
    assert calls and "replay 0" in made[0].plan._device.events
