"""Recurrent ops of the reference backend: against float64, Transformers' functions, and across cuts, forks and rollbacks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers.models.kimi_linear import modeling_kimi_linear as kimi
from transformers.models.qwen3_next import modeling_qwen3_next as qwen

from deepseek_optimizer.backends.base import DECODE, PREFILL
from deepseek_optimizer.backends.cpu import CpuBackend, unavailable_reason
from deepseek_optimizer.backends.reference import ReferenceBackend, recurrent
from deepseek_optimizer.errors import BackendError, StateMissingError
from deepseek_optimizer.graph import rules
from deepseek_optimizer.models import build_graph
from support.models import CASES, assert_close_rows, random_ids, random_model, transformers_logits, weights_of
from support.steps import Part, Runner, make_batch, run_step, runner

from .cpu.packing import packed_weights

HYBRID = ["lfm2-mixed", "qwen3_5_text-mixed", "kimi_linear-experts"]


def inputs(tokens: int, k_heads: int, heads: int, k_dim: int, v_dim: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random arguments of the delta rule, in float64, and the raw ones that Transformers' functions take."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    q, k = draw(tokens, k_heads, k_dim), draw(tokens, k_heads, k_dim)
    return {
        "q": q, "k": k, "v": draw(tokens, heads, v_dim), "gate": -draw(tokens, heads).exp() * 0.1,
        "rate": draw(tokens, heads).sigmoid(), "state": draw(heads, k_dim, v_dim),
    }  # fmt: skip


def normalized(given: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    unit = {name: recurrent.unit_length(given[name]) for name in "qk"}
    unit["q"] = unit["q"] * given["q"].shape[-1] ** -0.5
    return {name: value.to(dtype) for name, value in {**given, **unit}.items()}


@pytest.mark.parametrize("tokens", [1, 2, 63, 64, 65, 200])
@pytest.mark.parametrize("form", [recurrent.delta_rule, recurrent.chunked_delta_rule])
def test_both_forms_equal_the_recurrence_in_double(form: Any, tokens: int) -> None:
    given = inputs(tokens, 2, 6, 20, 12)
    exact, last = recurrent.delta_rule(**normalized(given, torch.float64))
    out, state = form(**normalized(given, torch.float32))
    assert_close_rows(out.double().flatten(1), exact.flatten(1), 1e-5)
    assert_close_rows(state.double().flatten(1), last.flatten(1), 1e-5)


@pytest.mark.parametrize("theirs", [qwen.torch_recurrent_gated_delta_rule, qwen.torch_chunk_gated_delta_rule])
def test_forms_equal_transformers(theirs: Any) -> None:
    given = inputs(130, 2, 6, 20, 12)
    q, k, v, g, beta, state = (given[name].float()[None] for name in ("q", "k", "v", "gate", "rate", "state"))
    expected, last = theirs(q, k, v, g=g, beta=beta, initial_state=state, output_final_state=True, use_qk_l2norm_in_kernel=True)
    for form in (recurrent.delta_rule, recurrent.chunked_delta_rule):
        out, after = form(**normalized(given, torch.float32))
        assert_close_rows(out.flatten(1), expected[0].flatten(1), 1e-5)
        assert_close_rows(after.flatten(1), last[0].flatten(1), 1e-5)


def test_a_decay_per_row_of_a_state_equals_transformers() -> None:
    given = inputs(40, 3, 3, 8, 12)
    given["gate"] = -torch.randn(40, 3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(5)).exp() * 0.1
    q, k, v, g, beta, state = (given[name].float()[None] for name in ("q", "k", "v", "gate", "rate", "state"))
    for theirs in (kimi.recurrent_kimi_delta_attention, kimi.chunk_kimi_delta_attention):
        expected, last = theirs(
            q, k, v, g=g, beta=beta, initial_state=state, output_final_state=True, use_qk_l2norm_in_kernel=True
        )
        out, after = recurrent.delta_rule(**normalized(given, torch.float32))
        assert_close_rows(out.flatten(1), expected[0].flatten(1), 1e-5)
        assert_close_rows(after.flatten(1), last[0].flatten(1), 1e-5)


@pytest.mark.parametrize("cut", [1, 63, 64, 100])
def test_chunked_form_continues_from_a_state(cut: int) -> None:
    given = normalized(inputs(130, 3, 3, 8, 8), torch.float32)
    whole, last = recurrent.chunked_delta_rule(**given)
    state, parts = given.pop("state"), []
    for rows in (slice(0, cut), slice(cut, None)):
        out, state = recurrent.chunked_delta_rule(**{name: x[rows] for name, x in given.items()}, state=state)
        parts.append(out)
    assert_close_rows(torch.cat(parts).flatten(1), whole.flatten(1), 1e-5)
    assert_close_rows(state.flatten(1), last.flatten(1), 1e-5)


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("cut", [1, 2, 3, 9])
def test_short_conv_equals_transformers(cut: int, activation: str | None) -> None:
    g = torch.Generator().manual_seed(cut)
    x, weight, bias = torch.randn(20, 7, generator=g), torch.randn(7, 4, generator=g), torch.randn(7, generator=g)
    expected = qwen.causal_conv1d_fn(x.T[None], weight, bias, activation)[0].T
    state, parts = torch.zeros(3, 7), []
    for rows in (x[:cut], x[cut:]):
        out, state = recurrent.short_conv(rows, state, weight, bias, activation or "none")
        parts.append(out)
    assert_close_rows(torch.cat(parts), expected, 1e-6)
    assert torch.equal(state, x[-3:])


NATIVE = pytest.param("cpu", marks=pytest.mark.skipif(unavailable_reason() is not None, reason="no native build"))


@pytest.fixture(params=["reference", NATIVE])
def backend(request: Any) -> Any:
    return ReferenceBackend() if request.param == "reference" else CpuBackend(threads=2)


def hybrid(case: str, backend: Any) -> tuple[Any, Runner]:
    model = random_model(CASES[case]())
    weights = packed_weights(weights_of(model), "fp32") if backend.name == "cpu" else weights_of(model)
    return model, runner(backend, rules.apply(build_graph(model.config))[0], weights)


@pytest.mark.parametrize("case", HYBRID)
def test_rejected_drafts_are_rolled_back(case: str, backend: Any) -> None:
    model, run = hybrid(case, backend)
    ids, blocks = random_ids(model.config, 60), run.sequence()
    run_step(run.plan, run.store, [Part(blocks, ids[:40])])
    run_step(run.plan, run.store, [Part(blocks, [ids[40], ids[41], 7, 8], DECODE, undo=2)])
    blocks.crop(42)
    rest = run_step(run.plan, run.store, [Part(blocks, ids[42:])]).logits
    assert_close_rows(rest, transformers_logits(model, ids)[42:])
    with pytest.raises(StateMissingError, match="cropped to 50 tokens.*recurrent states"):
        blocks.crop(50)
    assert blocks.tokens == 60
    blocks.free()
    assert run.manager.slots is not None and run.manager.slots.high_water == 0


@pytest.mark.parametrize("case", HYBRID)
def test_forks_have_states_of_their_own(case: str, backend: Any) -> None:
    model, run = hybrid(case, backend)
    prompt, first = random_ids(model.config, 40), run.sequence()
    run_step(run.plan, run.store, [Part(first, prompt)])
    second = first.fork()
    for token in (5, 6):
        run_step(run.plan, run.store, [Part(first, [token], DECODE), Part(second, [token + 100], DECODE)])
    last = run_step(run.plan, run.store, [Part(first, [8], DECODE), Part(second, [108], DECODE)]).logits
    assert_close_rows(last[0], transformers_logits(model, [*prompt, 5, 6, 8])[-1])
    assert_close_rows(last[1], transformers_logits(model, [*prompt, 105, 106, 108])[-1])


@pytest.mark.parametrize("case", HYBRID)
def test_a_sequence_continues_from_anothers_stored_states(case: str, backend: Any) -> None:
    """As with a prefix cache: blocks and states up to token 64 of a sequence that has 100."""
    model, run = hybrid(case, backend)
    ids, first = random_ids(model.config, 100), run.sequence(interval=32)
    run_step(run.plan, run.store, [Part(first, ids)])
    assert first.states is not None and list(first.states.stored) == [32, 64, 96, 100]
    slots, second = run.manager.slots, run.sequence()
    assert slots is not None
    for block in first.blocks[:2]:
        run.manager.retain(block)
    slots.retain(first.states.stored[64])
    second.adopt([first.blocks[:2]], first.states.stored[64])
    first.free()
    out = run_step(run.plan, run.store, [Part(second, ids[64:])]).logits
    assert_close_rows(out, transformers_logits(model, ids)[64:])


def test_slots_can_be_saved_and_restored(backend: Any) -> None:
    model, run = hybrid("qwen3_5_text-mixed", backend)
    ids, blocks = random_ids(model.config, 50), run.sequence()
    run_step(run.plan, run.store, [Part(blocks, ids[:40])])
    assert blocks.states is not None
    slot = blocks.states.stored[40]
    data = run.store.read_state(slot)
    assert len(data) == run.store.state_bytes == backend.state_bytes(build_graph(model.config))
    run.store.release_states(0)
    run.store.write_state(30, data)
    run.store.copy_state(30, slot)
    out = run_step(run.plan, run.store, [Part(blocks, ids[40:])]).logits
    assert_close_rows(out, transformers_logits(model, ids)[40:])
    with pytest.raises(ValueError, match="a slot has"):
        run.store.write_state(0, data[1:])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"state_from": None}, "state_from: is missing"),
        ({"state_from": [0, 1]}, "state_from: must be -1 for new sequences"),
        ({"state_from": [-1, -1]}, "state_from: must be -1 for new sequences"),
        ({"state_from": [32, -1]}, r"state_from: must lie in \[-1, 32\)"),
        ({"state_to": [[2, 3]]}, "state_to: must have the last row of every sequence"),
        ({"state_to": [[2, 3], [1, 4]]}, "state_to: must have ascending rows"),
        ({"state_to": [[1, 3], [2, 32]]}, r"state_to: has slots outside \[0, 32\)"),
        ({"state_to": [[1, 3], [2, 3]]}, "state_to: has a slot twice"),
        ({"state_to": [[0, 0], [1, 1], [2, 3]]}, "state_to: overwrites a slot that is read"),
        ({"state_to": [[1, 1], [2, 0]]}, "state_to: overwrites a slot that is read"),
    ],
)
def test_states_of_a_step_are_checked(fields: dict[str, Any], message: str) -> None:
    _, run = hybrid("lfm2-mixed", ReferenceBackend())
    first, second = run.sequence(), run.sequence()
    run_step(run.plan, run.store, [Part(first, [1, 2])])
    batch = make_batch([Part(first, [3, 4], PREFILL), Part(second, [5], PREFILL)], run.store)
    assert batch.state_from is not None and batch.state_from.tolist() == [0, -1]
    for name, value in fields.items():
        setattr(batch, name, None if value is None else np.array(value, np.int32))
    with pytest.raises(BackendError, match=message):
        run.plan.run(batch, run.store)
