"""Attention to all tokens of a sequence, and hidden states of encoders, equal those of the reference."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from support import triton_interpreter

DEVICE = triton_interpreter.require_device()

from deepseek_optimizer import DeepSeekConfig, DynamicGraphOptimizer
from deepseek_optimizer.backends import cuda
from deepseek_optimizer.backends.cuda.backend import CudaBackend
from deepseek_optimizer.backends.cuda.division import query_rows
from deepseek_optimizer.backends.cuda.kernels import attention
from deepseek_optimizer.backends.cuda.step import StepIntegers
from deepseek_optimizer.backends.reference import ReferenceBackend, ops
from deepseek_optimizer.graph import rules
from deepseek_optimizer.models import build_encoder_graph
from support.encoders import CASES, embeddings_of, make_batch, padded, random_encoder, random_sentences
from support.models import assert_close_rows

from ..cpu.packing import dequantized, packed_weights
from .plans import FORMAT_TOLERANCE
from .values import random

LENGTHS = (1, 14)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head", "window", "narrow"),
    [
        (3, 3, 12, 0, False),
        (6, 2, 20, 0, True),
        (6, 2, 20, 2, False),
        (2, 2, 16, 31, True),
        (1, 1, 70, 200, False),
        (1, 1, 130, 2, False),
    ],
)
def test_attention(heads, kv_heads, head, window, narrow):
    """Sequences of fewer rows than a tile, of exactly one, and of several; of keys more than are read at a time."""
    lengths = [1, 33, 64, 65]
    q, k, v = (random(sum(lengths), count * head, seed=i) for i, count in enumerate((heads, kv_heads, kv_heads)))
    batch = make_batch(q, lengths)
    batch.visible_to = np.repeat(batch.query_len, lengths)
    integers = StepIntegers.of(batch, 1, query_rows(heads // kv_heads))
    memory = torch.empty(integers.size, dtype=torch.int32)
    integers.write(memory.numpy())
    (tiles,), ends, out = integers.on(memory).phases, integers.on(memory).ends, torch.full_like(q, torch.nan)
    sizes = {"heads": heads, "kv_heads": kv_heads, "scale": 0.3, "window": window, "narrow": narrow}
    moved = (x.to(DEVICE) for x in (q, k, v))
    attention.step_attention(*moved, tiles, ends, out, **sizes)
    begin = 0
    for length in lengths:
        rows, begin = slice(begin, begin + length), begin + length
        mask = ops.visible_both_sides(length, window, q.device)
        split = (x[rows].double().unflatten(-1, shape) for x, shape in (
            (q, (kv_heads, -1, head)), (k, (kv_heads, head)), (v, (kv_heads, head)),
        ))  # fmt: skip
        exact = ops.attention(*split, mask, 0.3).flatten(1)
        assert (out[rows].double() - exact).abs().max() <= (2**-7 if narrow else 3e-6) * exact.abs().max()


def check(case, format_name, tolerance):
    layers = "n_layers" if case == "distilbert" else "num_hidden_layers"
    model = random_encoder(case, **{layers: 2 if case.startswith("modernbert") else 1})
    sentences = random_sentences(*LENGTHS)
    graph, _ = rules.apply(build_encoder_graph(model.config), None)
    weights = packed_weights({name: model.base_model.get_parameter(name).data for name in graph.weights()}, format_name)
    step = make_batch(embeddings_of(model, sentences), list(LENGTHS))
    made = CudaBackend(DEVICE).compile(graph, weights).run(step, None).hidden
    exact = ReferenceBackend().compile(graph, dequantized(weights)).run(step, None).hidden
    assert made.shape == exact.shape
    assert_close_rows(made.flatten(0, 1).cpu(), exact.flatten(0, 1), tolerance)


@pytest.mark.parametrize("case", CASES)
def test_families(case):
    check(case, "fp32", FORMAT_TOLERANCE["fp32"])


def test_a_loaded_encoder(monkeypatch):
    """Its plan runs on the backend, and serves padded batches."""
    spec = replace(cuda.SPEC, device_types=("cpu",), create=lambda where, settings: CudaBackend(where, False))
    monkeypatch.setattr(cuda, "SPEC", spec)
    model, call = random_encoder("bert", num_hidden_layers=1), padded(random_sentences(9, 4))
    ours = DynamicGraphOptimizer(copy.deepcopy(model), config=DeepSeekConfig(precision="fp32", backend="cuda")).optimize()
    assert ours.report().backend == "cuda" and ours.report().ops["encoder_attention"] == 1
    with torch.no_grad():
        made, exact = (each(**call).last_hidden_state[call["attention_mask"] != 0] for each in (ours, model))
    assert_close_rows(made, exact, FORMAT_TOLERANCE["fp32"])


def test_rounded_weights():
    check("bert", "int8", FORMAT_TOLERANCE["int8"])
