"""Native recurrent ops: within fp32's rounding of float64, the same bits on every ISA, in both phases and at any cut."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from deepseek_optimizer.backends.base import DECODE, PREFILL
from deepseek_optimizer.backends.cpu import CpuBackend, exact, native
from deepseek_optimizer.backends.reference import recurrent
from deepseek_optimizer.graph import rules
from deepseek_optimizer.graph.ir import CacheSpec, Graph, Node, StateSpec, Value
from deepseek_optimizer.models import build_graph
from support.models import CASES, assert_close_rows, random_ids, random_model, weights_of
from support.steps import Part, Runner, make_batch, run_step, runner

from .packing import packed_weights

HYBRID = ["lfm2-mixed", "lfm2-biases", "qwen3_5_text-mixed", "qwen3_5_text-equal"]


def run_of(case: str, backend: CpuBackend) -> tuple[Any, Runner]:
    model = random_model(CASES[case]())
    graph = rules.apply(build_graph(model.config))[0]
    return model, runner(backend, graph, packed_weights(weights_of(model), "fp32"))


def delta_graph(k_heads: int, heads: int, k_dim: int, v_dim: int, channels: bool) -> Graph:
    """The hidden state is delta_rule(x), then some of x, where x are the rows that the caller gives as `states`."""
    decays = heads * (k_dim if channels else 1)
    widths = {"qkv": 2 * k_heads * k_dim + heads * v_dim, "a": decays, "b": heads}
    x, begin, parts, nodes = Value("x", sum(widths.values())), 0, {}, []
    for name, width in widths.items():
        parts[name] = Value(name, width)
        nodes.append(Node("columns", (x,), (parts[name],), attrs={"groups": 1, "begin": begin, "end": begin + width}))
        begin += width
    o, rest, all_columns = Value("o", heads * v_dim), Value("rest", x.width - heads * v_dim), Value("all", x.width)
    shape = {"heads": heads, "k_heads": k_heads, "k_dim": k_dim, "v_dim": v_dim, "channels": channels}
    nodes = [
        Node("state_in", (), (x,)),
        *nodes,
        Node("delta_rule", tuple(parts.values()), (o,), ("A_log", "dt_bias"), {"state": 0, **shape}),
        Node("columns", (x,), (rest,), attrs={"groups": 1, "begin": 0, "end": rest.width}),
        Node("concat", (o, rest), (all_columns,)),
        Node("hidden_out", (all_columns,), attrs={"index": 0}),
    ]
    return Graph("delta", nodes, 3, x.width, 1, CacheSpec(1, 1, 8), 64, (StateSpec((heads, k_dim, v_dim)),))


def outputs_of(backend: Any, sizes: tuple[int, ...], x: torch.Tensor, vectors: dict[str, torch.Tensor]) -> tuple[Any, bytes]:
    """The delta rule's outputs, the first 40 rows in prefill and the others in decode, and the slot with the last state."""
    run = runner(backend, delta_graph(*sizes), vectors)
    blocks, parts = run.sequence(), []
    for rows, phase in ((x[:40], PREFILL), (x[40:], DECODE)):
        part = Part(blocks, [0] * len(rows), phase, rows=[])
        parts.append(run_step(run.plan, run.store, [part], states=rows, last_hidden=True).last_hidden)
    assert blocks.states is not None
    return torch.cat(parts)[:, : sizes[1] * sizes[3]], run.store.read_state(blocks.states.stored[len(x)])


def delta_inputs(
    k_heads: int, heads: int, k_dim: int, v_dim: int, channels: bool
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    g, decays = torch.Generator().manual_seed(1), heads * (k_dim if channels else 1)
    x = torch.randn(70, 2 * k_heads * k_dim + heads * (v_dim + 1) + decays, generator=g)
    a_log = torch.randn((1, 1, heads, 1) if channels else (heads,), generator=g) - 3
    return x, {"A_log": a_log, "dt_bias": torch.randn(decays, generator=g)}


@pytest.mark.parametrize(
    "sizes", [(2, 6, 20, 18, False), (1, 1, 128, 128, False), (3, 3, 7, 33, False), (2, 4, 64, 5, True), (3, 3, 7, 33, True)]
)
def test_delta_rule_against_double(backend, sizes):
    k_heads, heads, k_dim, v_dim, channels = sizes
    x, vectors = delta_inputs(*sizes)
    found, slot = outputs_of(backend, sizes, x, vectors)
    keys = k_heads * k_dim
    decays = heads * (k_dim if channels else 1)
    q, k, v, alpha, beta = x.double().split((keys, keys, heads * v_dim, decays, heads), -1)
    q, k = (recurrent.unit_length(rows.unflatten(-1, (k_heads, -1))) for rows in (q, k))
    expected, state = recurrent.delta_rule(
        q * k_dim**-0.5, k, v.unflatten(-1, (heads, -1)),
        recurrent.log_decay(alpha, vectors["A_log"].double().flatten(), vectors["dt_bias"].double()), beta.sigmoid(),
        torch.zeros(heads, k_dim, v_dim, dtype=torch.float64),
    )  # fmt: skip
    assert_close_rows(found.double(), expected.flatten(1), 1e-5)
    tiles = torch.frombuffer(bytearray(slot), dtype=torch.float32).view(heads, -1, k_dim, 16)
    stored = tiles.transpose(1, 2).flatten(2)[..., :v_dim]
    assert_close_rows(stored.double().flatten(1), state.flatten(1), 1e-5)


@pytest.mark.parametrize("sizes", [(2, 6, 20, 18, False), (1, 1, 128, 128, False), (2, 4, 64, 5, True)])
def test_the_same_bits_on_every_isa(sizes):
    names = [name for name in native.isa_names() if native.isa_runs_here(name)]
    if len(names) < 2:
        pytest.skip("this host runs one instruction set only")
    results = [outputs_of(CpuBackend(isa=exact(name), threads=2), sizes, *delta_inputs(*sizes)) for name in names]
    for outputs, slot in results[1:]:
        assert torch.equal(outputs, results[0][0]) and slot == results[0][1]


@pytest.mark.parametrize("case", HYBRID)
def test_the_same_bits_at_any_cut_in_both_phases(backend, case):
    model, run = run_of(case, backend)
    ids = random_ids(model.config, 100)
    whole = run.logits(ids, phase=DECODE)
    assert torch.equal(run.logits(ids, chunks=(1, 2, 3, 40, 1), phase=DECODE), whole)
    first, twin = run.sequence(), run.sequence()
    run_step(run.plan, run.store, [Part(first, ids[:64])])
    parts = [Part(first, ids[64:70], DECODE, undo=5), Part(twin, ids[:30], PREFILL)]
    logits = run_step(run.plan, run.store, parts).logits
    alone = run.logits(ids[:64]), run.sequence()
    run_step(run.plan, run.store, [Part(alone[1], ids[:64])])
    assert torch.equal(run_step(run.plan, run.store, [Part(alone[1], ids[64:70], DECODE)]).logits, logits[:6])
    assert torch.equal(run.logits(ids[:30]), logits[6:])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"state_from": [0, 1]}, r"state_from\[1\] is 1"),
        ({"state_from": [-1, -1]}, r"state_from\[0\] is -1"),
        ({"state_from": [32, -1]}, r"state_from\[0\] is 32"),
        ({"state_to": [[2, 3]]}, "lacks row 1, the last of sequence 0"),
        ({"state_to": [[1, 3]]}, "lacks row 2, the last of sequence 1"),
        ({"state_to": [[1, 3], [1, 4]]}, r"state_to\[1\]: row 1, must ascend"),
        ({"state_to": [[1, 3], [2, 32]]}, r"state_to\[1\]: slot 32"),
        ({"state_to": [[1, 3], [2, 3]]}, "slot 3 twice"),
        ({"state_to": [[0, 0], [1, 1], [2, 3]]}, "slot 0 is read by sequence 0"),
        ({"state_to": [[1, 1], [2, 0]]}, "slot 0 is read by sequence 0"),
        ({"state_from": None}, "are missing"),
    ],
)
def test_states_of_a_step_are_checked(backend, fields, message):
    _, run = run_of("lfm2-mixed", backend)
    first, second = run.sequence(), run.sequence()
    run_step(run.plan, run.store, [Part(first, [1, 2])])
    batch = make_batch([Part(first, [3, 4]), Part(second, [5])], run.store)
    for name, value in fields.items():
        setattr(batch, name, None if value is None else np.array(value, np.int32))
    with pytest.raises(ValueError, match=message):
        run.plan.run(batch, run.store)


def test_a_store_without_slots_or_with_other_states_is_refused(backend):
    model, run = run_of("lfm2-mixed", backend)
    graph = build_graph(random_model(CASES["lfm2-biases"]()).config)
    for store, message in (
        (backend.new_store(build_graph(model.config), "fp32", 4), "recurrent is NULL"),
        (backend.new_store(graph, "fp32", 4, 4), "another shape"),
    ):
        batch = make_batch([Part(run.sequence(), [1])], store)
        with pytest.raises(ValueError, match=message):
            run.plan.run(batch, store)
