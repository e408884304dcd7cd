"""RopeSpec against the rotary module of Transformers' models, bit for bit."""

from __future__ import annotations

import math
import pickle

import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from deepseek_optimizer import ConfigError, DeepSeekConfig
from deepseek_optimizer.backends.reference import ReferenceBackend
from deepseek_optimizer.integration.bind.context_extension import extend_context
from deepseek_optimizer.models import build_graph
from deepseek_optimizer.models.rope import RopeSpec
from deepseek_optimizer.models.rope_scaling import frequencies
from support.family_configs import llama, rope
from support.models import CASES, random_ids, random_model, transformers_logits, weights_of
from support.models import assert_close_rows as close
from support.steps import runner

LATENT = ["deepseek_v2-groups", "deepseek_v3-direct", "deepseek_v32-types", "youtu-tied"]


def spec_of(config: object) -> RopeSpec:
    return next(n.attrs["rope"] for n in build_graph(config).nodes if n.op == "rope_table")


@pytest.mark.parametrize("case", CASES)
def test_frequencies_equal_transformers(case: str) -> None:
    model = random_model(CASES[case]())
    rotary = next((m for name, m in model.model.named_children() if name in ("rotary_emb", "pos_emb")), None)
    specs = [n.attrs["rope"] for n in build_graph(model.config).nodes if n.op == "rope_table"]
    if rotary is None:  # Kimi Linear rotates nothing
        assert not any(spec.inv_freq.any() for spec in specs)
        return
    prefixes = ["full_attention_", "sliding_attention_"] if hasattr(rotary, "full_attention_inv_freq") else [""]
    if hasattr(rotary, "main_inv_freq"):  # DeepSeek-V4: forwards, then backwards, of those that a layer uses
        for spec, back in zip(specs[::2], specs[1::2], strict=True):
            assert np.array_equal(back.inv_freq, -spec.inv_freq) and back.scaling == spec.scaling
        specs = specs[::2]
        prefixes = ["main_"] * ("sliding_attention" in model.config.layer_types) + ["compress_"]
    assert len(specs) == len(prefixes)
    for spec, prefix in zip(specs, prefixes, strict=True):
        assert spec.inv_freq.dtype == np.float32
        assert torch.equal(torch.from_numpy(spec.inv_freq), getattr(rotary, f"{prefix}inv_freq"))
        assert spec.scaling == getattr(rotary, f"{prefix}attention_scaling")
        assert spec.rot == 2 * len(spec.inv_freq)


def test_every_type_has_a_case() -> None:
    kinds = {spec_of(make()).kind for make in CASES.values()}
    assert kinds == {"default", "linear", "dynamic", "yarn", "llama3", "longrope", "proportional"}


@pytest.mark.parametrize("length", [1, 256, 257, 300, 1000])
def test_longrope_has_other_frequencies_beyond_the_trained_length(length: int) -> None:
    model = random_model(CASES["phi3-longrope"]())
    rotary, spec = model.model.rotary_emb, spec_of(model.config)
    rotary(torch.zeros(1), torch.arange(length)[None])
    assert torch.equal(torch.from_numpy(spec.inv_freq_at(length)), rotary.inv_freq)
    assert np.array_equal(spec.inv_freq_at(length), spec.inv_freq) == (length <= 256)
    assert spec.scaling == rotary.attention_scaling > 1


@pytest.mark.parametrize("length", [200, 300])
def test_longrope_equals_transformers(length: int) -> None:
    model = random_model(CASES["phi3-longrope"]())
    ids = random_ids(model.config, length)
    close(runner(ReferenceBackend(), build_graph(model.config), weights_of(model)).logits(ids), transformers_logits(model, ids))


@pytest.mark.parametrize("length", [1, 64, 65, 100, 1000])
def test_dynamic_frequencies_follow_the_length(length: int) -> None:
    model = random_model(llama(max_position_embeddings=64, **rope("dynamic", factor=4.0)))
    rotary, spec = model.model.rotary_emb, spec_of(model.config)
    rotary(torch.zeros(1), torch.arange(length)[None])
    assert torch.equal(torch.from_numpy(spec.inv_freq_at(length)), rotary.inv_freq)
    assert np.array_equal(spec.inv_freq_at(length), spec.inv_freq) == (length <= 64)
    assert np.array_equal(pickle.loads(pickle.dumps(spec)).inv_freq_at(length), spec.inv_freq_at(length))


@pytest.mark.parametrize("kind", ["yarn", "dynamic"])
@pytest.mark.parametrize("case", ["llama-gqa", "qwen2-tied", "qwen3-gqa", *LATENT])
def test_an_extended_config_equals_transformers(case: str, kind: str) -> None:
    config = CASES[case]()
    config.max_position_embeddings = 64
    extend_context(config, DeepSeekConfig(context_extension=kind, context_length=300))
    model, graph = random_model(config), build_graph(config)
    rotary, spec = model.model.rotary_emb, spec_of(config)
    assert (spec.kind, spec.room, graph.max_positions) == (kind, 300, 300)
    assert spec.scaling == rotary.attention_scaling
    for length in (1, 64, 65, 300):  # ascending, since Transformers' frequencies only grow
        rotary(torch.zeros(1), torch.arange(length)[None])
        assert torch.equal(torch.from_numpy(spec.inv_freq_at(length)), rotary.inv_freq)
    scales = {n.attrs["scale"] for n in graph.nodes if n.op in ("attention", "mla_attention")}
    assert scales == {layer.self_attn.scaling for layer in model.model.layers}
    grown = (0.1 * math.log(300 / 64) + 1) ** 2  # scales the scores: through cos and sin of a whole head, or directly
    if kind == "dynamic":
        assert spec.scaling == spec.attention_scale == 1
    elif case in LATENT:
        assert spec.scaling == 1 and spec.attention_scale == pytest.approx(grown)
    else:
        assert spec.attention_scale == 1 and spec.scaling**2 == pytest.approx(grown)


@pytest.mark.parametrize("factor", [1.0, 1.5, 4])
def test_context_of_dynamic_rope(factor: float) -> None:
    assert build_graph(llama(max_position_embeddings=64, **rope("dynamic", factor=factor))).max_positions == 64 * factor


@pytest.mark.parametrize(("factor", "message"), [(1e9, "factor.*gives a context of"), (1e300, "not finite")])
def test_infinite_contexts_are_rejected(factor: float, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_graph(llama(max_position_embeddings=64, **rope("dynamic", factor=factor)))


def test_dynamic_beyond_the_original_context() -> None:
    model = random_model(llama(max_position_embeddings=64, **rope("dynamic", factor=4.0)))
    ids = random_ids(model.config, 150)
    run = runner(ReferenceBackend(), build_graph(model.config), weights_of(model))
    close(run.logits(ids), transformers_logits(model, ids))
    close(run.logits(ids[:60]), transformers_logits(model, ids[:60]))  # and back within it


@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn", "llama3"])
def test_scaled_frequencies_equal_transformers_for_any_parameters(kind: str) -> None:
    draw = np.random.default_rng(5)
    for _ in range(50):
        head_dim, positions = 4 * int(draw.integers(2, 35)), int(draw.integers(16, 1 << 17))
        parameters = {
            "rope_type": kind, "rope_theta": float(draw.choice([500.0, 1e4, 5e5, 1e6])), "factor": float(draw.uniform(1, 40)),
            "original_max_position_embeddings": int(draw.integers(8, 1 << 15)), "low_freq_factor": float(draw.uniform(0.5, 2)),
            "high_freq_factor": float(draw.uniform(2.5, 8)), "partial_rotary_factor": float(draw.choice([0.5, 1.0])),
        }  # fmt: skip
        if kind == "yarn":
            optional = {"beta_fast": 16.0, "beta_slow": 2.0, "truncate": False, "attention_factor": 1.25, "mscale": 0.7,
                        "mscale_all_dim": 1.1}  # fmt: skip
            parameters |= {name: value for name, value in optional.items() if draw.random() < 0.5}
        carrier = LlamaConfig(
            hidden_size=head_dim, num_attention_heads=1, head_dim=head_dim, max_position_embeddings=positions,
            rope_parameters=dict(parameters),
        )  # fmt: skip
        length = torch.tensor(float(draw.integers(1, 4 * positions))) if kind == "dynamic" else None
        theirs, scaling = ROPE_INIT_FUNCTIONS[kind](carrier, torch.device("cpu"), seq_len=length)
        ours, factor = frequencies(parameters, head_dim, positions, length)
        assert torch.equal(ours, theirs) and factor == scaling
