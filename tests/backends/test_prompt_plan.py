"""Prompts in models whose last layers share the cache of others: the same bits, while few rows run through those layers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from deepseek_optimizer.backends.base import DECODE, PREFILL, StepBatch
from deepseek_optimizer.backends.cpu import CpuBackend, unavailable_reason
from deepseek_optimizer.backends.prompt_plan import PromptPlan, _part
from deepseek_optimizer.backends.reference import ReferenceBackend
from deepseek_optimizer.backends.wrapped_plan import WrappedPlan
from deepseek_optimizer.cache import HOLE, Forgetting
from deepseek_optimizer.graph import rules
from deepseek_optimizer.graph.adapters import UNFUSED, with_adapters
from deepseek_optimizer.graph.cache_groups import group_layers, group_spans
from deepseek_optimizer.graph.partial_graph import writing_graph
from deepseek_optimizer.graph.validate import check_graph
from deepseek_optimizer.models import build_graph
from support.models import CASES, random_ids, random_model, weights_of
from support.steps import Part, Runner, run_step

from .cpu.packing import packed_weights

BACKENDS: dict[str, Any] = {"reference": ReferenceBackend, "cpu": CpuBackend}
SHARED = ["gemma4_text-shared", "gemma4_unified_text-shared"]


class Counted(WrappedPlan):
    """Records the number of rows of each step."""

    def __init__(self, plan: Any) -> None:
        super().__init__(plan)
        self.rows: list[int] = []

    def run(self, batch: StepBatch, store: Any) -> Any:
        self.rows.append(len(batch.token_ids))
        return super().run(batch, store)


def runners(name: str, case: str, kv: str, grouped: bool = False) -> tuple[Runner, Runner, Counted, Counted, Any]:
    """One that runs whole steps, and one that divides prompts, with its plans."""
    if name == "cpu" and (reason := unavailable_reason()) is not None:
        pytest.skip(reason)
    backend, model = BACKENDS[name](), random_model(CASES[case]())
    graph, _ = rules.apply(build_graph(model.config))
    if grouped:
        graph = group_layers(graph)
    weights = packed_weights(weights_of(model), "fp32")
    beginning = writing_graph(graph)
    assert beginning is not None
    check_graph(beginning)
    whole, writing = Counted(backend.compile(graph, weights)), Counted(backend.compile(beginning, weights))
    groups = tuple(None if span is None else Forgetting(*span, 0) for span in group_spans(graph)) if grouped else (None,)
    plain = Runner(backend.compile(graph, weights), backend.new_store(graph, kv, 64, 0), groups)
    return plain, Runner(PromptPlan(whole, writing), backend.new_store(graph, kv, 64, 0), groups), whole, writing, model.config


@pytest.mark.parametrize("case", SHARED)
@pytest.mark.parametrize("kv", ["fp32", "int8"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_same_bits(backend: str, case: str, kv: str) -> None:
    """A decode step beside prompts of several lengths, one of which needs an earlier row too, and one that needs none. The
    reference, whose matrix products depend on the number of rows, is close."""
    plain, divided, whole, writing, config = runners(backend, case, kv)
    texts = [random_ids(config, n, seed=n) for n in (90, 70, 50, 1)]

    def steps(r: Runner) -> list[torch.Tensor]:
        old, *new = (r.sequence() for _ in range(4))
        results = [run_step(r.plan, r.store, [Part(old, texts[0], rows=[89])]).logits]
        parts = [
            Part(old, texts[3], DECODE), Part(new[0], texts[1], rows=[60, 69]), Part(new[1], texts[2], rows=[]),
            Part(new[2], texts[0][:40], rows=[39]),
        ]  # fmt: skip
        results.append(run_step(r.plan, r.store, parts).logits)
        results.append(run_step(r.plan, r.store, [Part(new[1], texts[1], rows=[69]), Part(new[2], texts[2][:9])]).logits)
        return results

    for got, expected in zip(steps(divided), steps(plain), strict=True):
        assert torch.equal(got, expected) if backend == "cpu" else torch.allclose(got, expected, rtol=1e-4, atol=1e-4)
    assert writing.rows == [89, 60 + 49 + 39, 69] and whole.rows == [1, 1 + 10 + 1 + 1, 1 + 9]


@pytest.mark.parametrize("backend", BACKENDS)
def test_whole_steps_where_all_rows_are_needed(backend: str) -> None:
    plain, divided, whole, writing, config = runners(backend, SHARED[0], "fp32")
    ids = random_ids(config, 60)
    assert torch.equal(divided.logits(ids), plain.logits(ids))
    assert torch.equal(divided.hidden(ids), plain.hidden(ids))
    short = [run_step(r.plan, r.store, [Part(r.sequence(), ids[:30], PREFILL, rows=[29])]).logits for r in (divided, plain)]
    assert torch.allclose(*short, rtol=1e-4, atol=1e-4) and writing.rows == [] and whole.rows == [60, 60, 30]


@pytest.mark.parametrize("backend", BACKENDS)
def test_released_blocks(backend: str) -> None:
    """In the second case of `SHARED`, the sliding layers that write have no attention in the first plan."""
    plain, divided, _, writing, config = runners(backend, SHARED[1], "fp32", grouped=True)
    ids, results = random_ids(config, 400), []
    for r in (plain, divided):
        sequence = r.sequence()
        for begin in (0, 100, 200, 300):
            logits = run_step(r.plan, r.store, [Part(sequence, ids[begin : begin + 100], rows=[99])]).logits
            sequence.forget()
        assert HOLE in sequence.table(1)
        results.append(logits)
    assert torch.allclose(*results, rtol=1e-4, atol=1e-4) and writing.rows == [99] * 4


@pytest.mark.parametrize("case", ["llama-gqa", "gemma4_text-dense", "qwen3_5_text-mixed", "deepseek_v3-groups"])
def test_models_that_are_not_divided(case: str) -> None:
    assert writing_graph(build_graph(CASES[case]())) is None


def test_adapters_are_not_divided() -> None:
    """Their sites are numbered within a graph."""
    graph, _ = rules.apply(build_graph(CASES[SHARED[0]]()), tuple(name for name in rules.RULES if name not in UNFUSED))
    assert writing_graph(graph) is not None and writing_graph(with_adapters(graph, 4)) is None


def test_embeddings_and_adapters_go_with_their_rows() -> None:
    """Of the second part: the rows of one sequence, and of the other all."""

    def numbers(*values: int) -> Any:
        return np.array(values, np.int32)

    batch = StepBatch(
        numbers(*range(8)), numbers(*range(8)), numbers(5, 3), numbers(2, 0), numbers(PREFILL, PREFILL),
        np.arange(4, dtype=np.int32).reshape(2, 2), numbers(4, 6), torch.arange(8.0)[:, None], reach=numbers(7, 3),
        adapter_of=numbers(1, -1), axes=np.arange(24, dtype=np.int32).reshape(8, 3),
        features=torch.arange(16.0).reshape(2, 8, 1),
    )  # fmt: skip
    part = _part(batch, numbers(3, 0), numbers(5, 3))
    assert part.token_ids.tolist() == [3, 4, 5, 6, 7] and part.inputs_embeds is not None
    assert part.inputs_embeds[:, 0].tolist() == [3, 4, 5, 6, 7] and part.logit_rows.tolist() == [1, 3]
    assert part.axes[:, 0].tolist() == [9, 12, 15, 18, 21] and part.features[1, :, 0].tolist() == [11, 12, 13, 14, 15]
    assert part.context_len.tolist() == [5, 0] and part.query_len.tolist() == [2, 3] and part.adapter_of.tolist() == [1, -1]
    first = _part(batch, numbers(0, 0), numbers(3, 0))
    assert first.token_ids.tolist() == [0, 1, 2] and first.block_table.tolist() == [[0, 1]] and first.logit_rows.tolist() == []
    assert first.reach.tolist() == [7] and first.adapter_of.tolist() == [1]


@pytest.mark.parametrize("case", SHARED)
def test_steps_whose_pictures_see_each_other_are_not_divided(case: str) -> None:
    plain, divided, whole, writing, config = runners("reference", case, "fp32")
    ids = random_ids(config, 50)
    visible = np.maximum(np.arange(1, 51), np.where((np.arange(50) >= 20) & (np.arange(50) < 45), 45, 0)).astype(np.int32)
    outputs = [
        run_step(runner.plan, runner.store, [Part(runner.sequence(), ids, rows=[49])], visible_to=visible).logits
        for runner in (plain, divided)
    ]
    assert torch.equal(*outputs) and whole.rows == [50] and not writing.rows
