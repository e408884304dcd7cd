"""Plans of encoders against Transformers' forward of each sentence alone."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from deepseek_optimizer.backends import cpu
from deepseek_optimizer.backends.base import CompileOptions
from deepseek_optimizer.backends.cpu.native import isa_names, isa_runs_here
from deepseek_optimizer.backends.reference import ReferenceBackend
from deepseek_optimizer.errors import BackendError
from deepseek_optimizer.graph import rules
from deepseek_optimizer.graph.validate import check_graph
from deepseek_optimizer.models import build_encoder_graph
from support.encoders import CASES, embeddings_of, make_batch, random_encoder, random_sentences
from support.models import assert_close_rows

from .cpu.packing import packed_weights

NATIVE = cpu.unavailable_reason() is None
ISAS = [name for name in isa_names() if isa_runs_here(name)] if NATIVE else []
BACKENDS = ["reference", *ISAS]
LENGTHS = (1, 2, 31, 64, 65, 7, 130)


def backend_of(name, threads=2):
    return ReferenceBackend() if name == "reference" else cpu.CpuBackend(cpu.exact(name), threads=threads)


def plan_of(backend, model, names=None, weight_format="fp32", activation="auto"):
    graph, reports = rules.apply(build_encoder_graph(model.config), names)
    check_graph(graph)
    weights = {name: dict(model.base_model.named_parameters())[name].data for name in graph.weights()}
    given = weights if backend.name == "reference" else packed_weights(weights, weight_format)
    return backend.compile(graph, given, CompileOptions(activation=activation)), graph, reports


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", BACKENDS)
def test_equals_transformers(name, case):
    model, sentences = random_encoder(case), random_sentences(*LENGTHS)
    plan, graph, _ = plan_of(backend_of(name), model)
    made = plan.run(make_batch(embeddings_of(model, sentences), list(map(len, sentences))), None)
    assert made.hidden.shape == (graph.hidden_states, sum(LENGTHS), graph.hidden_size)
    for ids, rows in zip(sentences, made.hidden.split(LENGTHS, 1), strict=True):
        with torch.no_grad():
            expected = model(torch.tensor([ids]), output_hidden_states=True).hidden_states
        assert_close_rows(rows, torch.stack(expected)[:, 0])


@pytest.mark.parametrize("case", ["bert", "modernbert"])
@pytest.mark.parametrize("name", BACKENDS)
def test_without_rules(name, case):
    model, sentences = random_encoder(case), random_sentences(20, 3)
    step = make_batch(embeddings_of(model, sentences), [20, 3])
    plain, graph, _ = plan_of(backend_of(name), model, ())
    fused, _, reports = plan_of(backend_of(name), model)
    assert {report.rule: len(report.places) for report in reports}["qkv"] == model.config.num_hidden_layers
    assert_close_rows(fused.run(step, None).hidden, plain.run(step, None).hidden)


@pytest.mark.skipif(not NATIVE, reason="no native build")
@pytest.mark.parametrize("formats", [("fp32", "auto"), ("int8", "int8")], ids=["fp32", "int8"])
@pytest.mark.parametrize("case", ["bert", "bert-tanh", "modernbert-biases"])
def test_bits_do_not_depend_on_batch_threads_or_isa(case, formats):
    model = random_encoder(case)
    lengths = [40, 1, 64, 129, 600, 300, 257]
    sentences = random_sentences(*lengths)
    states = embeddings_of(model, sentences)
    whole = None
    for name in ISAS:
        for threads in (1, 3):
            plan, _, _ = plan_of(backend_of(name, threads), model, None, *formats)
            made = plan.run(make_batch(states, lengths), None).hidden
            whole = made if whole is None else whole
            assert torch.equal(made, whole), (name, threads)
    plan.timing()  # every step by itself, over all rows
    assert torch.equal(plan.run(make_batch(states, lengths), None).hidden, whole)
    plan.timing(False)
    for rows, expected in zip(states.split(lengths), whole.split(lengths, 1), strict=True):
        assert torch.equal(plan.run(make_batch(rows, [len(rows)]), None).hidden, expected)


@pytest.mark.parametrize("name", BACKENDS[:2])
def test_a_step_has_whole_sequences(name):
    model = random_encoder("bert")
    plan, _, _ = plan_of(backend_of(name), model)
    step = make_batch(embeddings_of(model, [[5, 6]]), [2])
    with pytest.raises((BackendError, ValueError), match=r"context_len.*must be 0"):
        plan.run(dataclasses.replace(step, context_len=np.ones(1, np.int32)), None)


@pytest.mark.parametrize("name", BACKENDS)
def test_attention_over_lengths_and_windows(name):
    """One layer over random rows, for every length around the sizes of tiles, and windows."""
    lengths = [1, 15, 16, 17, 63, 64, 65, 127, 128, 191, 256, 500]
    for window in (0, 2, 33, 64, 200):
        case = random_encoder("modernbert", num_hidden_layers=1, layer_types=["sliding_attention"], local_attention=400)
        graph, _ = rules.apply(build_encoder_graph(case.config), None)
        nodes = [n.with_(attrs={**n.attrs, "window": window}) if n.op == "encoder_attention" else n for n in graph.nodes]
        graph = dataclasses.replace(graph, nodes=nodes)
        weights = {n: dict(case.named_parameters())[n].data for n in graph.weights()}
        states = torch.randn(sum(lengths), 36, generator=torch.Generator().manual_seed(window))
        step = make_batch(states, lengths)
        expected = ReferenceBackend().compile(graph, weights).run(step, None).hidden
        backend = backend_of(name)
        given = weights if name == "reference" else packed_weights(weights, "fp32")
        assert_close_rows(backend.compile(graph, given).run(step, None).hidden, expected)
