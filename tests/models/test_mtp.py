"""MTP layers: their graphs against Transformers' layers, and against a trained one."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from transformers import AutoConfig
from transformers.modeling_layers import MtpLayer

from deepseek_optimizer.backends.base import StepOutput
from deepseek_optimizer.backends.reference import ReferenceBackend
from deepseek_optimizer.cache import SequenceBlocks
from deepseek_optimizer.errors import BackendError, ConfigError
from deepseek_optimizer.graph import rules
from deepseek_optimizer.graph.analysis import weight_shapes
from deepseek_optimizer.graph.min_formats import exact_weights
from deepseek_optimizer.graph.validate import check_graph
from deepseek_optimizer.models import build_graph, build_mtp_graph, draft_vocab_size, mtp_layers
from support import tiny_v3
from support.family_configs import deepseek_v3, deepseek_v4, deepseek_v32, llama, mistral, qwen2, qwen3, youtu
from support.models import CASES, assert_close_rows, random_ids, random_model, randomize, weights_of
from support.mtp_files import mtp_tensors
from support.steps import Part, Runner, run_step, runner
from support.v4_mtp import mtp_layer, published_name

WITH_LAYERS: dict[str, Callable[[], Any]] = {
    "v3": lambda: deepseek_v3(num_nextn_predict_layers=2),
    "v3 without a query latent": lambda: deepseek_v3(num_nextn_predict_layers=2, q_lora_rank=None),
    "v3 of dense layers": lambda: deepseek_v3(num_nextn_predict_layers=2, first_k_dense_replace=3),
    "v32": lambda: deepseek_v32(num_nextn_predict_layers=2),
    "llama": lambda: llama(num_nextn_predict_layers=2),
    "qwen2": lambda: qwen2(num_nextn_predict_layers=2),
    "qwen3": lambda: qwen3(num_nextn_predict_layers=2),
    "mistral with windows": lambda: mistral(num_nextn_predict_layers=2, sliding_window=16),
}


def run_mtp(plan: Any, store: Any, blocks: SequenceBlocks, ids: list[int], states: torch.Tensor, **wanted: bool) -> StepOutput:
    """A step of an MTP layer: row t has state t and the token after it."""
    return run_step(plan, store, [Part(blocks, ids)], states=states, **wanted)


def transformers_layer(model: Any, depth: int) -> tuple[MtpLayer, dict[str, torch.Tensor]]:
    """A random layer of Transformers, and its weights under checkpoint names."""
    config, last = model.config, model.model.layers[-1]
    kinds = getattr(config, "mlp_layer_types", None)
    # The index determines the experts or the kind of attention, and the place in a cache.
    index = kinds.index("sparse") if kinds else 0 if hasattr(config, "layer_types") else config.num_hidden_layers + depth
    layer = randomize(MtpLayer(config, type(last), type(model.model.norm), index).eval(), seed=7 + depth)
    path = f"model.layers.{config.num_hidden_layers + depth}"
    names = {"mtp_block.": "", "post_norm.": "shared_head.norm."}
    weights = {f"{path}.embed_tokens.weight": model.get_input_embeddings().weight}
    weights[f"{path}.shared_head.head.weight"] = model.lm_head.weight
    for name, tensor in layer.state_dict().items():
        for old, new in names.items():
            name = new + name.removeprefix(old) if name.startswith(old) else name
        weights[f"{path}.{name}"] = tensor
    return layer, weights


@torch.no_grad()
def transformers_states(model: Any, layer: MtpLayer, ids: list[int], states: torch.Tensor) -> torch.Tensor:
    embeds = model.get_input_embeddings()(torch.tensor([ids]))
    positions = torch.arange(len(ids))[None]
    mask = torch.full((len(ids), len(ids)), torch.finfo(torch.float32).min).triu(1)[None, None]
    return layer(embeds, states[None], model.model.rotary_emb(embeds, positions), mask, positions, None)[0]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", WITH_LAYERS)
def test_equals_a_chain_of_transformers_layers(name: str, fused: bool) -> None:
    """The second layer's inputs are the first's normalized result and the next token; both use the model's blocks."""
    model = random_model(WITH_LAYERS[name]())
    config, count = model.config, mtp_layers(model.config)
    ids, backend = random_ids(config, 60), ReferenceBackend()
    main = runner(backend, build_graph(config, mtp_layers=count), weights_of(model))
    blocks, in_chunks = main.sequence(), main.sequence()
    states = run_step(main.plan, main.store, [Part(blocks, ids)], hidden=True).hidden[-1]
    cached = main.store.read(0, blocks.table(), 60)[0]
    for depth in range(count):
        graph = build_mtp_graph(config, depth)
        graph = rules.apply(graph)[0] if fused else graph
        check_graph(graph)
        layer, weights = transformers_layer(model, depth)
        assert weight_shapes(graph) == {name: tuple(w.shape) for name, w in weights.items()}
        plan, ids, before = backend.compile(graph, weights), ids[1:], states[:-1]
        expected = transformers_states(model, layer, ids, before)
        blocks.crop(0)
        in_chunks.crop(0)
        made = run_mtp(plan, main.store, blocks, ids, before, last_hidden=True)
        parts = [run_mtp(plan, main.store, in_chunks, ids[p], before[p]).logits for p in (slice(0, 33), slice(33, None))]
        assert made.hidden is None
        assert_close_rows(made.last_hidden, expected)
        for logits in (made.logits, torch.cat(parts)):
            assert_close_rows(logits, F.linear(expected, model.lm_head.weight).detach())
        states = made.last_hidden
    assert torch.equal(main.store.read(0, blocks.table(), 58)[0], cached[..., :58, :])  # the model's own layers are unchanged


def test_layers_in_the_cache() -> None:
    config = deepseek_v3(num_nextn_predict_layers=2)
    assert build_graph(config).cache.layers == 3
    assert build_graph(config, mtp_layers=1).cache == build_mtp_graph(config, 0, 1).cache
    assert build_graph(config, mtp_layers=2).cache == build_mtp_graph(config, 0).cache == build_mtp_graph(config, 1).cache
    writes = [n.attrs["layer"] for depth in (0, 1) for n in build_mtp_graph(config, depth).nodes if n.op == "latent_write"]
    assert writes == [3, 4]


def test_families_without_layers() -> None:
    assert mtp_layers(llama()) == mtp_layers(youtu()) == mtp_layers(CASES["deepseek_v2-greedy"]()) == 0
    raw = json.loads(deepseek_v3(num_nextn_predict_layers=2).to_json_string(use_diff=False))
    assert mtp_layers(raw) == 2
    with pytest.raises(ConfigError, match="num_nextn_predict_layers: 1 MTP layers requested, but the config has 0"):
        build_graph(youtu(), mtp_layers=1)
    for count in (-1, 3):
        with pytest.raises(ConfigError, match=f"{count} MTP layers requested, but the config has 2"):
            build_graph(raw, mtp_layers=count)
    with pytest.raises(ConfigError, match="no MTP layer 0 among 0"):
        build_mtp_graph(llama(), 0)
    for depth in (-1, 2):
        with pytest.raises(ConfigError, match="no MTP layer"):
            build_mtp_graph(raw, depth)


@pytest.mark.parametrize("family", [llama, deepseek_v3])
def test_a_draft_vocabulary_has_the_logits_of_its_tokens(family: Callable[..., Any]) -> None:
    model = random_model(family(num_nextn_predict_layers=1))
    tokens = torch.arange(5, 60, 4)
    weights = transformers_layer(model, 0)[1]
    name = f"model.layers.{model.config.num_hidden_layers}.shared_head.head.weight"
    main = runner(ReferenceBackend(), build_graph(model.config, 1), weights_of(model))
    ids, states, made = random_ids(model.config, 20), torch.randn(20, model.config.hidden_size), []
    for size, head in ((None, weights[name]), (len(tokens), weights[name][tokens])):
        model.config.draft_vocab_size = size
        graph = build_mtp_graph(model.config, 0)
        check_graph(graph)
        assert weight_shapes(graph)[name] == tuple(head.shape)
        plan = ReferenceBackend().compile(graph, weights | {name: head})
        made.append(run_mtp(plan, main.store, main.sequence(), ids, states).logits)
    torch.testing.assert_close(made[1], made[0][:, tokens])
    assert build_graph(model.config).logits_width == model.config.vocab_size


@pytest.mark.parametrize("value", [0, -1, 1.5, "1", True, 1 << 20])
def test_bad_draft_vocabulary(value: Any) -> None:
    raw = json.loads(llama(num_nextn_predict_layers=1).to_json_string(use_diff=False)) | {"draft_vocab_size": value}
    with pytest.raises(ConfigError, match="config.draft_vocab_size: expected an integer from 1 to"):
        build_mtp_graph(raw, 0)
    raw["num_nextn_predict_layers"] = 0
    assert draft_vocab_size(raw) is None  # nothing drafts


@pytest.mark.parametrize("value", [-1, 65, 1.5, "1", True])
def test_bad_count_of_layers(value: Any) -> None:
    raw = json.loads(deepseek_v3().to_json_string(use_diff=False)) | {"num_nextn_predict_layers": value}
    with pytest.raises(ConfigError, match="num_nextn_predict_layers"):
        mtp_layers(raw)


def test_a_v4_layer_equals_deepseeks_own_code() -> None:
    """The second layer's inputs are the first's streams. The rows of both follow the model's in the cache."""
    config = deepseek_v4(num_nextn_predict_layers=2)
    model = random_model(config)
    ids, backend, depths = random_ids(config, 70), ReferenceBackend(), range(2)
    main = runner(backend, build_graph(config, mtp_layers=2), weights_of(model))
    blocks, in_chunks = main.sequence(), main.sequence()
    states = run_step(main.plan, main.store, [Part(blocks, ids)], draft_states=True).draft_states
    cached = main.store.read(0, blocks.table(), 70)[0]
    for depth in depths:
        graph = rules.apply(build_mtp_graph(config, depth))[0]
        check_graph(graph)
        stored = mtp_tensors(config, depth)
        own = {published_name(name, 4).partition(".")[2].partition(".")[2]: value for name, value in stored.items()}
        embedding, head = model.get_input_embeddings().weight.detach(), model.lm_head.weight.detach()
        ids, before = ids[1:], states[:-1]
        streams, normed = mtp_layer(own, config, embedding[torch.tensor(ids)], before.unflatten(-1, (3, -1)))
        plan = backend.compile(graph, {**merged_experts(stored, config), **shared_weights(model, depth)})
        blocks.crop(0)
        in_chunks.crop(0)
        made = run_mtp(plan, main.store, blocks, ids, before, draft_states=True, last_hidden=True)
        parts = [run_mtp(plan, main.store, in_chunks, ids[p], before[p]).logits for p in (slice(0, 33), slice(33, None))]
        assert_close_rows(made.draft_states, streams.flatten(1))
        assert_close_rows(made.last_hidden, normed)
        for logits in (made.logits, torch.cat(parts)):
            assert_close_rows(logits, normed @ head.T)
        states = made.draft_states
    assert torch.equal(main.store.read(0, blocks.table(), 68)[0], cached[..., :68, :])  # the model's own rows are unchanged


def merged_experts(stored: dict[str, torch.Tensor], config: Any) -> dict[str, torch.Tensor]:
    """The tensors of an MTP layer with the stacks of experts that its graph names."""
    rest = {name: value for name, value in stored.items() if ".mlp.experts." not in name}
    path = next(name for name in stored if ".mlp.experts." in name).partition(".experts.")[0] + ".experts"
    gate, up, down = (
        torch.stack([stored[f"{path}.{e}.{role}_proj.weight"] for e in range(config.n_routed_experts)])
        for role in ("gate", "up", "down")
    )
    return {**rest, f"{path}.gate_up_proj": torch.cat((gate, up), 1), f"{path}.down_proj": down}


def shared_weights(model: Any, depth: int) -> dict[str, torch.Tensor]:
    """The model's embedding and head under the names that an MTP layer's graph has for them."""
    path = f"model.layers.{model.config.num_hidden_layers + depth}"
    return {
        f"{path}.embed_tokens.weight": model.get_input_embeddings().weight,
        f"{path}.shared_head.head.weight": model.lm_head.weight,
    }


def test_rows_of_v4_layers_in_the_cache() -> None:
    config = deepseek_v4(num_nextn_predict_layers=2)
    rows = build_graph(config).cache.rows
    for count in (1, 2):
        cache = build_graph(config, mtp_layers=count).cache
        assert cache == build_mtp_graph(config, count - 1, count).cache == build_mtp_graph(config, 0, count).cache
        assert cache.rows[: len(rows)] == rows and [kind.window for kind in cache.rows[len(rows) :]] == [21] * count
    writes = [n.attrs["layer"] for depth in (0, 1) for n in build_mtp_graph(config, depth).nodes if n.op == "rows_write"]
    assert writes == [len(rows), len(rows) + 1]
    assert "model.layers.4.hc_head.hc_fn" in exact_weights(build_mtp_graph(config, 0))


def test_states_are_checked() -> None:
    model = random_model(deepseek_v3())
    main = runner(ReferenceBackend(), build_graph(model.config, mtp_layers=1), weights_of(model))
    plan = ReferenceBackend().compile(build_mtp_graph(model.config, 0), transformers_layer(model, 0)[1])
    for states in (None, torch.zeros(3, 72), torch.zeros(4, 71)):
        with pytest.raises(BackendError, match=r"step.states: must have shape \(4, 72\)"):
            run_mtp(plan, main.store, main.sequence(), [1, 2, 3, 4], states)
    with pytest.raises(BackendError, match="step.states: must be None"):
        run_mtp(main.plan, main.store, main.sequence(), [1, 2, 3, 4], torch.zeros(4, 72))


def test_trained_layer() -> None:
    """Its loss and agreement with the model are close to the published values, so names, order and states are right."""
    path = tiny_v3.tiny_v3()
    config, weights, backend = AutoConfig.from_pretrained(path), tiny_v3.weights(path), ReferenceBackend()
    graph = build_graph(config, mtp_layers(config))
    stored = set(safe_open(path / "model.safetensors", "pt").keys())
    mtp = build_mtp_graph(config, 0)
    assert {n for n in mtp.weights() if "experts." not in n or "shared" in n} <= stored
    main = Runner(backend.compile(rules.apply(graph)[0], weights), backend.new_store(graph, "fp32", 64))
    plan = backend.compile(rules.apply(mtp)[0], weights)
    own, loss, agree = [], [], []
    for document in tiny_v3.documents(path, 12, 256):
        blocks, drafted = main.sequence(), main.sequence()
        output = run_step(main.plan, main.store, [Part(blocks, document)], hidden=True)
        logits = run_mtp(plan, main.store, drafted, document[1:], output.hidden[-1][:-1]).logits
        tokens = torch.tensor(document)
        own.append(F.cross_entropy(output.logits[:-1], tokens[1:]))
        loss.append(F.cross_entropy(logits[:-1], tokens[2:]))
        agree.append((logits[:-1].argmax(-1) == output.logits[1:-1].argmax(-1)).float().mean())
        blocks.free()
        drafted.free()
    assert abs(float(torch.stack(own).mean()) - 3.18) < 0.35
    assert abs(float(torch.stack(loss).mean()) - 3.04) < 0.35
    assert abs(float(torch.stack(agree).mean()) - 0.78) < 0.04
