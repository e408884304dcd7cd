"""Native plans against Transformers and the reference backend: every family, rule and format, on every ISA."""

from __future__ import annotations

import pytest
import torch

from deepseek_optimizer.backends.base import DECODE, PREFILL
from deepseek_optimizer.backends.reference import ReferenceBackend
from deepseek_optimizer.graph import rules
from deepseek_optimizer.models import build_graph
from support.models import (
    CASES,
    assert_close_rows,
    native_cases,
    random_ids,
    random_model,
    transformers_hidden,
    transformers_logits,
    weights_of,
)  # fmt: skip
from support.steps import Part, run_step, runner

from .packing import dequantized, packed_weights

LATENT_RULES = ("mla_absorb", "experts")  # apply only to families with latent attention or experts
ALL = [name for name in rules.RULES if name not in LATENT_RULES]
RULE_SETS = {
    "all": ("qwen3-windows", ALL),
    "none": ("qwen3-windows", []),
    **{f"only {r}": ("qwen3-windows", [r]) for r in ALL},
    **{f"without {r}": ("qwen3-windows", [x for x in ALL if x != r]) for r in ALL},
    "position scale, none": ("mistral4-groups", []),
    "position scale, only mla_absorb": ("mistral4-groups", ["mla_absorb"]),
    "experts, none": ("deepseek_v3-groups", []),
    **{f"experts, only {r}": ("deepseek_v3-groups", [r]) for r in LATENT_RULES},
    **{f"experts, without {r}": ("deepseek_v3-groups", [x for x in rules.RULES if x != r]) for r in LATENT_RULES},
}


@pytest.mark.parametrize("case", native_cases())
def test_fp32_equals_transformers(backend, case):
    model = random_model(CASES[case]())
    graph, _ = rules.apply(build_graph(model.config), None)
    ids = random_ids(model.config, 131)
    r = runner(backend, graph, packed_weights(weights_of(model), "fp32"))
    expected = transformers_logits(model, ids)
    assert_close_rows(r.logits(ids), expected)
    assert_close_rows(r.logits(ids, chunks=(1, 7, 64)), expected)
    assert_close_rows(r.logits(ids, phase=DECODE), expected)
    assert_close_rows(r.hidden(ids).flatten(0, 1), transformers_hidden(model, ids).flatten(0, 1))


@pytest.mark.parametrize("case, names", RULE_SETS.values(), ids=RULE_SETS.keys())
def test_every_rule_alone_and_disabled(backend, case, names):
    model = random_model(CASES[case]())
    graph, _ = rules.apply(build_graph(model.config), names)
    ids = random_ids(model.config, 77)
    r = runner(backend, graph, packed_weights(weights_of(model), "fp32"))
    assert_close_rows(r.logits(ids, chunks=(33,)), transformers_logits(model, ids))


def test_long_prompts(backend):
    model = random_model(CASES["llama-gqa"]())
    graph, _ = rules.apply(build_graph(model.config), None)
    r = runner(backend, graph, packed_weights(weights_of(model), "fp32"))
    for length in (1, 2, 31, 32, 33, 257, 600, 2000):
        ids = random_ids(model.config, length, seed=length)
        assert_close_rows(r.logits(ids), transformers_logits(model, ids))


# Tolerance of a format's arithmetic against the same values in fp32: a property of its activations.
FORMAT_TOLERANCE = {
    "fp32": 1e-5,
    "bf16": 2e-2,
    "int8": 1e-3,
    "int8_nested": 1e-3,
    "int4_nested": 6e-2,
    "q4_1": 1e-3,
    "int4": 6e-2,
    "int3": 6e-2,
    "fp8": 2e-2,
}


@pytest.mark.parametrize("format_name", FORMAT_TOLERANCE)
@pytest.mark.parametrize("case", ["llama-biases", "qwen2-tied", "qwen3-gqa"])
def test_formats_against_their_dequantized_values(backend, case, format_name):
    """Only the kernels' error: the reference runs the dequantized weights in fp32."""
    model = random_model(CASES[case]())
    graph, _ = rules.apply(build_graph(model.config), None)
    weights = packed_weights(weights_of(model), format_name)
    ids = random_ids(model.config, 70)
    expected = runner(ReferenceBackend(), graph, dequantized(weights)).logits(ids)
    r = runner(backend, graph, weights)
    assert_close_rows(r.logits(ids), expected, FORMAT_TOLERANCE[format_name])
    assert_close_rows(r.logits(ids, phase=DECODE), expected, FORMAT_TOLERANCE[format_name])


@pytest.mark.parametrize("kv, tolerance", [("fp32", 1e-5), ("bf16", 2e-2), ("int8", 5e-2)])
def test_cache_types(backend, kv, tolerance):
    model = random_model(CASES["llama-gqa"]())
    graph, _ = rules.apply(build_graph(model.config), None)
    weights = packed_weights(weights_of(model), "fp32")
    ids = random_ids(model.config, 300)
    expected = runner(ReferenceBackend(), graph, dequantized(weights)).logits(ids)
    r = runner(backend, graph, weights, kv=kv)
    assert_close_rows(r.logits(ids), expected, tolerance)
    assert_close_rows(r.logits(ids, phase=DECODE), expected, tolerance)


@pytest.mark.parametrize("kv", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("format_name", FORMAT_TOLERANCE)
@pytest.mark.parametrize("case, phase", [("qwen2-gqa", DECODE), ("qwen2-gqa", PREFILL), ("deepseek_v3-groups", DECODE)])
def test_a_row_does_not_depend_on_the_batch(backend, format_name, kv, case, phase):
    """Within a kernel family, rows are torch.equal for any chunks, positions and other sequences."""
    model = random_model(CASES[case]())
    graph, _ = rules.apply(build_graph(model.config), None)
    r = runner(backend, graph, packed_weights(weights_of(model), format_name), kv=kv)
    ids = random_ids(model.config, 90)
    alone = r.logits(ids, phase=phase)
    assert torch.equal(alone, r.logits(ids, chunks=(1, 30, 5, 40), phase=phase))
    others = [r.sequence() for _ in range(3)]
    lengths = (40, 3, 60)
    for other, n in zip(others, lengths, strict=True):
        run_step(r.plan, r.store, [Part(other, random_ids(model.config, n, seed=n))])
    mine, rows = r.sequence(), []
    for begin, end in ((0, 50), (50, 53), (53, 90)):
        company = [
            Part(others[0], [5], DECODE),
            Part(others[1], [7, 8, 9], DECODE),
            Part(others[2], random_ids(model.config, 35, seed=begin), PREFILL),
        ]
        part = Part(mine, ids[begin:end], phase)
        parts = [*company[:2], part, company[2]] if phase == DECODE else [*company, part]
        first = sum(len(p.ids) for p in parts[: parts.index(part)])
        rows.append(run_step(r.plan, r.store, parts).logits[first : first + len(part.ids)])
    assert torch.equal(alone, torch.cat(rows))


def test_selected_rows_equal_all_rows(backend):
    model = random_model(CASES["llama-tied"]())
    graph, _ = rules.apply(build_graph(model.config), None)
    r = runner(backend, graph, packed_weights(weights_of(model), "int8"))
    ids = random_ids(model.config, 50)
    whole = r.logits(ids)
    some = run_step(r.plan, r.store, [Part(r.sequence(), ids, rows=[0, 7, 49])]).logits
    assert torch.equal(some, whole[[0, 7, 49]])
