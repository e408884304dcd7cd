"""A graph without a head: hidden states, no logits, and none of the head's weights."""

from __future__ import annotations

import pytest

from deepseek_optimizer.backends import cpu
from deepseek_optimizer.backends.reference import ReferenceBackend
from deepseek_optimizer.errors import BackendError
from deepseek_optimizer.graph import rules
from deepseek_optimizer.graph.validate import check_graph
from deepseek_optimizer.models import build_graph
from support.models import CASES, assert_close_rows, random_ids, random_model, transformers_hidden, weights_of
from support.steps import Part, run_step, runner

from .cpu.packing import packed_weights

BACKENDS = [
    "reference",
    pytest.param("cpu", marks=pytest.mark.skipif(cpu.unavailable_reason() is not None, reason="no native build")),
]


@pytest.mark.parametrize("names", [(), None], ids=["no rules", "all rules"])
@pytest.mark.parametrize("case", ["llama-biases", "deepseek_v3-groups"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_hidden_states_alone(backend, case, names):
    model = random_model(CASES[case]())
    ids, weights = random_ids(model.config, 45), weights_of(model)
    graph, _ = rules.apply(build_graph(model.config).without_head(), names)
    check_graph(graph)
    assert not graph.has_head and "lm_head.weight" not in graph.weights()
    del weights["lm_head.weight"]
    if backend == "cpu":
        run = runner(cpu.CpuBackend(threads=2), graph, packed_weights(weights, "fp32"))
    else:
        run = runner(ReferenceBackend(), graph, weights)
    expected = transformers_hidden(model, ids)
    made = run_step(run.plan, run.store, [Part(run.sequence(), ids, rows=[])], last_hidden=True)
    assert_close_rows(made.last_hidden, expected[-1])
    made = run_step(run.plan, run.store, [Part(run.sequence(), ids, rows=[])], hidden=True)
    assert_close_rows(made.hidden, expected)
    assert made.logits.shape == (0, model.config.vocab_size)
    with pytest.raises((ValueError, BackendError), match="no head"):
        run_step(run.plan, run.store, [Part(run.sequence(), ids, rows=[0])])
    assert not any(row["op"] == "lm_head" for row in run.plan.describe())


def test_names_of_weights_are_changed_everywhere():
    graph = build_graph(CASES["llama-biases"]()).renamed(lambda name: f"outer.{name}")
    assert all(name.startswith("outer.") for name in graph.weights())
    check_graph(graph)
