"""The reference backend against Transformers' logits and hidden states, in fp32."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from deepseek_optimizer.backends.base import DECODE, PREFILL
from deepseek_optimizer.backends.reference import ReferenceBackend
from deepseek_optimizer.errors import BackendError
from deepseek_optimizer.graph import rules
from deepseek_optimizer.models import build_graph
from deepseek_optimizer.quant import get_format, pack
from support.family_configs import llama
from support.models import (
    CASES,
    assert_close_rows,
    random_ids,
    random_model,
    transformers_hidden,
    transformers_logits,
    weights_of,
)
from support.steps import Part, Runner, make_batch, run_step, runner

FAMILIES = ["llama-biases", "qwen2-windows", "qwen3-tied", "deepseek_v2-greedy", "deepseek_v3-groups", "deepseek_v32-types"]
FAMILIES += ["lfm2-mixed", "qwen3_5_text-mixed"]
LONG = ["llama-llama3", "llama-yarn", "qwen2-windows", "qwen3-gqa", "qwen3_5_text-mixed"]


def fused(model: object) -> object:
    return rules.apply(build_graph(model.config))[0]  # type: ignore[attr-defined]


@pytest.mark.parametrize("case", CASES)
def test_equals_transformers(case: str) -> None:
    model = random_model(CASES[case]())
    ids = random_ids(model.config, 77)
    expected = transformers_logits(model, ids)
    for graph in (build_graph(model.config), fused(model)):
        run = runner(ReferenceBackend(), graph, weights_of(model))
        assert_close_rows(run.logits(ids), expected)
        assert_close_rows(run.logits(ids, chunks=[1, 31, 2, 33]), expected)
        assert run.manager.free_blocks == 128


@pytest.mark.parametrize("case", FAMILIES)
@pytest.mark.parametrize("count", [1, 2, 31, 32, 33, 64, 65])
def test_prompt_lengths_around_block_boundaries(case: str, count: int) -> None:
    model = random_model(CASES[case]())
    ids = random_ids(model.config, count)
    run = runner(ReferenceBackend(), fused(model), weights_of(model))
    assert_close_rows(run.logits(ids), transformers_logits(model, ids))


@pytest.mark.parametrize("case", LONG)
def test_long_prompts_in_chunks_and_at_once(case: str) -> None:
    model = random_model(CASES[case]())
    ids = random_ids(model.config, 2000)
    run = runner(ReferenceBackend(), fused(model), weights_of(model))
    expected = transformers_logits(model, ids)
    assert_close_rows(run.logits(ids), expected)
    assert_close_rows(run.logits(ids, chunks=[500, 1, 700]), expected)


@pytest.mark.parametrize("case", FAMILIES)
def test_decode_equals_transformers(case: str) -> None:
    model = random_model(CASES[case]())
    prompt = random_ids(model.config, 30)
    tokens, logits = runner(ReferenceBackend(), fused(model), weights_of(model)).decode(prompt, 40)
    assert_close_rows(logits, transformers_logits(model, prompt + tokens[:-1])[29:])


@pytest.mark.parametrize("case", CASES)
def test_hidden_states_equal_transformers(case: str) -> None:
    model = random_model(CASES[case]())
    ids = random_ids(model.config, 45)
    run = runner(ReferenceBackend(), fused(model), weights_of(model))
    assert_close_rows(run.hidden(ids), transformers_hidden(model, ids))


@pytest.mark.parametrize("case", FAMILIES)
def test_ragged_batches_equal_each_sequence_alone(case: str) -> None:
    """Decode rows, a chunk that continues a sequence and new prompts in one step, with scattered blocks."""
    model = random_model(CASES[case]())
    prompts = [random_ids(model.config, n, seed=n) for n in (40, 3, 70, 33, 1)]
    run = runner(ReferenceBackend(), fused(model), weights_of(model))
    blocks = [run.sequence() for _ in prompts]
    before = [39, 2, 50, 0, 0]  # tokens in the cache before the mixed step
    for i, count in enumerate(before):
        for begin in range(0, count, 16):  # alternating, so that blocks of different sequences are interleaved
            run_step(run.plan, run.store, [Part(blocks[i], prompts[i][begin : min(count, begin + 16)])])
    parts = [Part(blocks[i], prompts[i][before[i] :], DECODE if i < 2 else PREFILL) for i in range(len(prompts))]
    output = run_step(run.plan, run.store, parts, hidden=True)
    expected = [transformers_logits(model, ids)[n:] for ids, n in zip(prompts, before, strict=True)]
    assert_close_rows(output.logits, torch.cat(expected))
    hidden = [transformers_hidden(model, ids)[:, n:] for ids, n in zip(prompts, before, strict=True)]
    assert_close_rows(output.hidden, torch.cat(hidden, 1))


def test_forked_sequences_are_independent() -> None:
    model = random_model(CASES["qwen3-gqa"]())
    run = runner(ReferenceBackend(), fused(model), weights_of(model))
    prompt = random_ids(model.config, 40)
    first = run.sequence()
    run_step(run.plan, run.store, [Part(first, prompt)])
    second = first.fork()
    for token in (5, 6, 7):
        run_step(run.plan, run.store, [Part(first, [token], DECODE), Part(second, [token + 100], DECODE)])
    last = run_step(run.plan, run.store, [Part(first, [8], DECODE), Part(second, [108], DECODE)]).logits
    assert_close_rows(last[0], transformers_logits(model, [*prompt, 5, 6, 7, 8])[-1])
    assert_close_rows(last[1], transformers_logits(model, [*prompt, 105, 106, 107, 108])[-1])


def test_cropped_tokens_are_dropped() -> None:
    model = random_model(llama())
    run = runner(ReferenceBackend(), fused(model), weights_of(model))
    ids, blocks = random_ids(model.config, 50), run.sequence()
    run_step(run.plan, run.store, [Part(blocks, ids)])
    blocks.crop(20)
    again = random_ids(model.config, 15, seed=9)
    output = run_step(run.plan, run.store, [Part(blocks, again)])
    assert_close_rows(output.logits, transformers_logits(model, ids[:20] + again)[20:])


@torch.no_grad()
def test_input_embeddings_and_explicit_positions() -> None:
    """As in Transformers' call for a left-padded row: positions differ from the places in the cache."""
    model = random_model(llama())
    ids = random_ids(model.config, 20)
    embeds = model.get_input_embeddings()(torch.tensor(ids)) + 0.1
    positions = torch.arange(20) + 13
    run = runner(ReferenceBackend(), fused(model), weights_of(model))
    expected = model(inputs_embeds=embeds[None], position_ids=positions[None], use_cache=False).logits[0]
    part = Part(run.sequence(), [-1] * 20, positions=positions.tolist())
    assert_close_rows(run_step(run.plan, run.store, [part], inputs_embeds=embeds).logits, expected)


@pytest.mark.parametrize("kv", ["bf16", "int8"])
def test_smaller_caches_stay_close(kv: str) -> None:
    """A cache of 8 bits per element: the error is that of its rounding."""
    model = random_model(CASES["qwen3-gqa"]())
    ids = random_ids(model.config, 200)
    run = runner(ReferenceBackend(), fused(model), weights_of(model), kv=kv)
    logits, expected = run.logits(ids, chunks=[77]), transformers_logits(model, ids)
    assert_close_rows(logits, expected, 0.05)
    assert (logits - expected).abs().max() > 1e-4 * expected.abs().max()


@pytest.mark.parametrize("case", FAMILIES)
def test_bf16_rounds_like_transformers(case: str) -> None:
    """Both are bf16: their errors against fp32 are similar, and their difference at most twice that."""
    exact = random_model(CASES[case]())
    rounded = random_model(CASES[case](), dtype=torch.bfloat16)
    for source, target in zip(exact.parameters(), rounded.parameters(), strict=True):
        source.data.copy_(target.data.float())
    ids = random_ids(exact.config, 100)
    expected = transformers_logits(exact, ids)
    theirs = (transformers_logits(rounded, ids) - expected).square().mean().sqrt()
    run = runner(ReferenceBackend(dtype=torch.bfloat16), fused(exact), weights_of(rounded), kv="bf16")
    ours = (run.logits(ids) - expected).square().mean().sqrt()
    assert 0 < ours <= 1.25 * theirs


@pytest.mark.parametrize("name", ["fp32", "bf16", "int8", "int4", "q4_1", "fp8"])
def test_packed_weights_equal_their_dequantized_model(name: str) -> None:
    model = random_model(CASES["qwen3-tied"]())
    packed = {n: pack(w, name) if w.ndim == 2 else w for n, w in weights_of(model).items()}
    run = runner(ReferenceBackend(), fused(model), packed)
    for n, parameter in model.named_parameters():
        if parameter.ndim == 2:
            matrix = packed[n]
            parameter.data.copy_(get_format(name).unpack(matrix.data, matrix.rows, matrix.cols))
    ids = random_ids(model.config, 50)
    assert_close_rows(run.logits(ids), transformers_logits(model, ids))
    formats = {row["format"] for row in run.plan.describe() if row["op"] == "lm_head"}
    assert formats == {name}


def test_rounded_activations() -> None:
    """Rounding rows to 8 bits has a larger error than to 16, and "format" means the kind that the weight's format reads."""
    model = random_model(llama())
    ids = random_ids(model.config, 60)
    packed = {n: pack(w, "int4") if w.ndim == 2 else w for n, w in weights_of(model).items()}

    def logits(activation: str | None) -> torch.Tensor:
        return runner(ReferenceBackend(rounding=activation), fused(model), packed).logits(ids)

    exact = logits(None)
    error = {kind: float((logits(kind) - exact).abs().mean()) for kind in ("bf16", "q8", "q16")}
    assert 0 < error["q16"] < error["bf16"] / 4 and error["bf16"] < error["q8"]
    assert torch.equal(logits("format"), logits(get_format("int4").activation))
    with pytest.raises(BackendError, match="q4"):
        logits("q4")


def test_missing_weight_is_named() -> None:
    model = random_model(llama())
    weights = weights_of(model)
    del weights["model.norm.weight"]
    with pytest.raises(BackendError, match="model.norm.weight"):
        ReferenceBackend().compile(build_graph(model.config), weights)


def test_wrong_shape_is_named() -> None:
    model = random_model(llama())
    weights = {**weights_of(model), "model.layers.1.mlp.down_proj.weight": torch.zeros(72, 135)}
    with pytest.raises(BackendError, match=r"layers.1.mlp.down_proj.weight.*\(72, 135\).*\(72, 136\)"):
        ReferenceBackend().compile(build_graph(model.config), weights)


def small_run() -> Runner:
    model = random_model(llama(num_hidden_layers=1))
    return runner(ReferenceBackend(), fused(model), weights_of(model), blocks=4)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("token_ids", [1, 2, 211]),
        ("token_ids", [1, -1, 2]),
        ("token_ids", [1, 2]),
        ("positions", [0, -1, 2]),
        ("query_len", [4]),
        ("query_len", [3, 0]),
        ("context_len", [-1]),
        ("context_len", [30]),
        ("phase", [2]),
        ("block_table", [[4]]),
        ("block_table", [[-1]]),
        ("logit_rows", [3]),
        ("logit_rows", [-1]),
        ("logit_rows", [1, 1]),
        ("logit_rows", [2, 0]),
    ],
)
def test_an_invalid_step_is_rejected_before_writing(field: str, value: list[int]) -> None:
    run = small_run()
    good = make_batch([Part(run.sequence(), [1, 2, 3])], run.store)
    with pytest.raises(BackendError, match="step"):
        run.plan.run(replace(good, **{field: np.asarray(value, dtype=np.int32)}), run.store)
    with pytest.raises(BackendError, match="never written"):
        run.store.read(0, np.zeros(1, np.int32), 1)
    assert run.plan.run(good, run.store).logits.isfinite().all()


def test_prefill_before_decode_is_rejected() -> None:
    run = small_run()
    parts = [Part(run.sequence(), [1]), Part(run.sequence(), [2], DECODE)]
    with pytest.raises(BackendError, match="phase"):
        run_step(run.plan, run.store, parts)


def test_embeddings_of_a_wrong_shape_are_rejected() -> None:
    run = small_run()
    with pytest.raises(BackendError, match="inputs_embeds"):
        run_step(run.plan, run.store, [Part(run.sequence(), [1, 2])], inputs_embeds=torch.zeros(2, 71))


def test_logits_are_written_to_the_given_buffer() -> None:
    run = small_run()
    batch = make_batch([Part(run.sequence(), [1, 2, 3])], run.store)
    fresh = run.plan.run(batch, run.store).logits
    room = torch.full_like(fresh, torch.nan)
    assert run.plan.run(replace(batch, logits=room), run.store).logits is room
    assert torch.equal(room, fresh)
