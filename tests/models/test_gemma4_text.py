"""Gemma 4: its config, and logits across chunks, batches, rollbacks and windows, of the reference and of every native ISA."""

from __future__ import annotations

import json
from typing import Any

import pytest
from transformers import Gemma4TextConfig

from deepseek_optimizer.backends import cpu
from deepseek_optimizer.backends.base import DECODE, PREFILL, Backend
from deepseek_optimizer.backends.cpu import native
from deepseek_optimizer.backends.reference import ReferenceBackend
from deepseek_optimizer.errors import ConfigError, UnsupportedModelError
from deepseek_optimizer.graph import rules
from deepseek_optimizer.graph.ir import CacheSpec, Graph
from deepseek_optimizer.integration.configs import check_config, with_defaults
from deepseek_optimizer.models import build_graph
from support.family_configs import gemma4_shared, gemma4_text
from support.models import CASES, assert_close_rows, random_ids, random_model, transformers_logits, weights_of
from support.steps import Part, Runner, run_step, runner

from ..backends.cpu.packing import packed_weights

KINDS = [name for name in CASES if name.startswith("gemma4")]
ISAS = [] if cpu.unavailable_reason() else [name for name in native.isa_names() if native.isa_runs_here(name)]


@pytest.fixture(params=["reference", *ISAS])
def backend(request: Any) -> Backend:
    return ReferenceBackend() if request.param == "reference" else cpu.CpuBackend(isa=cpu.exact(request.param), threads=2)


def model_and_runner(case: str, backend: Any, kv: str = "fp32") -> tuple[Any, Runner]:
    model = random_model(CASES[case]())
    weights = packed_weights(weights_of(model), "fp32") if backend.name == "cpu" else weights_of(model)
    return model, runner(backend, rules.apply(build_graph(model.config))[0], weights, kv=kv)


@pytest.mark.parametrize("case", KINDS)
def test_mixed_batches_and_rollbacks(case: str, backend: Any) -> None:
    """Windows are 37 tokens: the first sequence decodes beyond one, the second's prompt reaches its end, the third is new."""
    model, run = model_and_runner(case, backend)
    prompts = [random_ids(model.config, n, seed=n) for n in (80, 75, 33)]
    first, second, third = (run.sequence() for _ in prompts)
    run_step(run.plan, run.store, [Part(second, prompts[1][:36]), Part(first, prompts[0][:70])])
    run_step(run.plan, run.store, [Part(first, [*prompts[0][70:72], 7, 8], DECODE, undo=2)])
    first.crop(72)
    parts = [Part(first, prompts[0][72:], DECODE), Part(second, prompts[1][36:], PREFILL), Part(third, prompts[2], PREFILL)]
    logits = run_step(run.plan, run.store, parts).logits
    expected = [transformers_logits(model, ids) for ids in prompts]
    assert_close_rows(logits[:8], expected[0][72:])
    assert_close_rows(logits[8:47], expected[1][36:])
    assert_close_rows(logits[47:], expected[2])


@pytest.mark.parametrize("case", KINDS)
def test_decoding_across_the_window(case: str, backend: Any) -> None:
    model, run = model_and_runner(case, backend)
    prompt = random_ids(model.config, 30)
    tokens, logits = run.decode(prompt, 40)
    assert_close_rows(logits, transformers_logits(model, prompt + tokens[:-1])[29:])


@pytest.mark.parametrize("kv", ["fp32", "bf16", "int8"])
def test_saved_blocks_of_layers_of_different_sizes(kv: str, backend: Any) -> None:
    """A sequence continues from copies of another's blocks, which went through bytes; block sizes are the sums of layers."""
    model, run = model_and_runner("gemma4_text-shared", backend, kv)
    ids, first, second = random_ids(model.config, 70), run.sequence(), run.sequence()
    run_step(run.plan, run.store, [Part(first, ids[:64])])
    expected = run_step(run.plan, run.store, [Part(first, ids[64:])]).logits
    blocks = run.manager.allocate(2)
    for source, target in zip(first.blocks, blocks, strict=False):
        run.store.write_block(target, run.store.read_block(source))
    second.adopt([blocks])
    assert (run_step(run.plan, run.store, [Part(second, ids[64:])]).logits == expected).all()
    spec = build_graph(model.config).cache
    layers = [backend.block_bytes(_with_cache(CacheSpec(1, *heads)), kv) for heads in spec.heads]
    assert backend.block_bytes(build_graph(model.config), kv) == sum(layers)


def _with_cache(cache: CacheSpec) -> Graph:
    return Graph("none", [], 8, 8, 1, cache, 64)


def test_layers_that_share_keys_have_no_place_in_the_cache() -> None:
    graph = build_graph(gemma4_shared())
    assert graph.cache == CacheSpec(3, (2, 2, 2), (20, 44, 20))
    assert [n.attrs["layer"] for n in graph.nodes if n.op == "attention"] == [0, 1, 2, 2, 2, 1]
    assert [n.attrs["layer"] for n in graph.nodes if n.op == "cache_write"] == [0, 1, 2]
    widths = [n.outputs[0].width for n in graph.nodes if n.op == "geglu" and ".mlp" in n.outputs[0].name]
    assert widths == [136] * 3 + [272] * 3


def test_every_form_of_a_config_gives_the_same_graph() -> None:
    """A config object; its file, which has `per_layer_config`; a published file, with the fields for full layers."""
    config = gemma4_text()
    saved = json.loads(config.to_json_string(use_diff=False))
    published = {name: value for name, value in saved.items() if name not in ("per_layer_config", "rope_parameters")}
    published |= {"global_head_dim": 44, "num_global_key_value_heads": 1}
    graph = build_graph(config)
    for raw in (saved, published):
        other = build_graph(with_defaults(raw))
        assert other.cache == graph.cache and other.weights() == graph.weights()
        assert [n.attrs.get("window") for n in other.nodes] == [n.attrs.get("window") for n in graph.nodes]
        check_config(raw)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"use_bidirectional_attention": "all"}, UnsupportedModelError, "use_bidirectional_attention 'all'"),
        ({"num_kv_shared_layers": 4}, ConfigError, "num_kv_shared_layers: the first 0 of 4 layers"),
        ({"num_kv_shared_layers": 3}, ConfigError, "num_kv_shared_layers: the first 1 of 4 layers"),
        ({"num_kv_shared_layers": 5}, ConfigError, "num_kv_shared_layers: the first -1 of 4 layers"),
        ({"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 100}, ConfigError, "vocab_size_per_layer_input"),
        ({"hidden_size_per_layer_input": 1 << 19}, ConfigError, "exceed the maximum width"),
        (
            {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 5, "moe_intermediate_size": 8},
            ConfigError,
            "top_k_experts",
        ),
        ({"enable_moe_block": True}, ConfigError, "num_experts"),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
            ConfigError,
            "rope_parameters: expected an object for",
        ),
        ({"hidden_activation": "silu"}, UnsupportedModelError, "hidden_activation 'silu'"),
        ({"num_global_key_value_heads": 4}, ConfigError, "4 does not divide num_attention_heads 6"),
        ({"per_layer_config": {"9": {"head_dim": 8}}}, ConfigError, "per_layer_config: expected fields by number of a layer"),
        ({"per_layer_config": {"0": {"head_dim": 8}}}, UnsupportedModelError, "layers of one type must have the same"),
        ({"per_layer_config": {"1": {"hidden_size": 8}}}, UnsupportedModelError, "layers differ in hidden_size"),
    ],
)
def test_configs_that_cannot_be_served(fields: dict[str, Any], error: type[Exception], message: str) -> None:
    raw = {**json.loads(gemma4_text().to_json_string(use_diff=False)), "global_head_dim": 44}
    if "per_layer_config" not in fields:
        del raw["per_layer_config"]
    with pytest.raises(error, match=message):
        check_config({**raw, **fields})


def test_layers_of_a_config_object_that_differ_in_other_fields() -> None:
    config = Gemma4TextConfig(num_hidden_layers=2, per_layer_config={0: {"intermediate_size": 8}})
    with pytest.raises(UnsupportedModelError, match="layers differ in intermediate_size"):
        build_graph(config)
