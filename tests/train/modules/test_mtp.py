"""MTP layers in training: the same states as the graphs, saved under checkpoint names, loaded and initialized."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from deepseek_optimizer import ConfigError, load_model
from deepseek_optimizer.backends.reference import ReferenceBackend
from deepseek_optimizer.models import build_graph, build_mtp_graph
from deepseek_optimizer.train.modules.draft_layer import add_draft_layer
from deepseek_optimizer.train.modules.mtp import add_trained_layers, head_of, mtp_states
from deepseek_optimizer.train.modules.mtp_streams import DraftStates
from support.family_configs import deepseek_v3, deepseek_v4, deepseek_v32, gemma2, llama, qwen2, qwen3
from support.models import assert_close_rows, random_ids, random_model, randomize, weights_of
from support.mtp_files import save_with_mtp
from support.steps import Part, run_step, runner
from support.tiny_v3 import documents, tiny_v3

CONFIGS = {
    "one": deepseek_v3,
    "two": lambda: deepseek_v3(num_nextn_predict_layers=2),
    "dense main": lambda: deepseek_v3(first_k_dense_replace=3, num_nextn_predict_layers=1),
    "v32": lambda: deepseek_v32(num_nextn_predict_layers=1),
    "v4": lambda: deepseek_v4(num_nextn_predict_layers=2),
    "llama": lambda: llama(num_nextn_predict_layers=2),
    "qwen2": lambda: qwen2(num_nextn_predict_layers=1),
    "qwen3": lambda: qwen3(num_nextn_predict_layers=1),
}


def with_layers(config):
    model = random_model(config)
    message = add_trained_layers(model)
    assert len(message) == config.num_nextn_predict_layers and all("initialized at random" in line for line in message)
    return model


@pytest.mark.parametrize("name", CONFIGS)
def test_states_equal_the_graphs(name):
    """Training computes the same states as drafting."""
    model = with_layers(CONFIGS[name]())
    randomize(model.model.layers[model.config.num_hidden_layers :], seed=5)
    config, count, ids = model.config, model.config.num_nextn_predict_layers, random_ids(model.config, 40)
    plain = random_model(config)
    assert torch.equal(model(torch.tensor([ids])).logits, plain(torch.tensor([ids])).logits)  # Transformers ignores them
    with torch.no_grad(), DraftStates(model.model) as recorded:
        taken = recorded.of(model.model(torch.tensor([ids]), use_cache=False).last_hidden_state)
        made = [state[0] for _, _, state in mtp_states(model, taken, torch.tensor([ids]))]
    assert len(made) == count
    weights = weights_of(model)
    main = runner(ReferenceBackend(), build_graph(config, mtp_layers=count), weights)
    blocks, states = main.sequence(), taken[0].flatten(1)
    for depth in range(count):
        prefix = f"model.layers.{config.num_hidden_layers + depth}"
        own = weights | {
            f"{prefix}.embed_tokens.weight": weights["model.embed_tokens.weight"],
            f"{prefix}.shared_head.head.weight": weights["lm_head.weight"],
        }
        plan = ReferenceBackend().compile(build_mtp_graph(config, depth, count), own)
        blocks.crop(0)
        rows = len(ids) - 1 - depth
        wanted = {"last_hidden": True, "draft_states": True}
        step = run_step(plan, main.store, [Part(blocks, ids[depth + 1 :])], states=states[:rows], **wanted)
        assert_close_rows(made[depth][:rows], step.last_hidden)
        states = step.draft_states


def test_a_trained_checkpoint_is_loaded():
    """tiny-v3's layer was trained to a loss of 3.04 (its README); a random one has ln 8192 = 9.0."""
    path = tiny_v3()
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    assert len(model.model.layers) == 5
    assert add_trained_layers(model) == [f"MTP layer 0: read from {path}"]
    losses = []
    for document in documents(path, 4, 256):
        ids = torch.tensor([document])
        with torch.no_grad():
            hidden = model.model(ids, use_cache=False).last_hidden_state
            ((_, layer, state),) = mtp_states(model, hidden, ids)
            losses.append(F.cross_entropy(head_of(layer, model)(state[0, :-2]), ids[0, 2:]).item())
    assert sum(losses) / len(losses) < 3.6


@pytest.mark.parametrize("repeated", [True, False])
def test_a_random_checkpoint_is_loaded_bit_for_bit(tmp_path, repeated):
    save_with_mtp(tmp_path / "m", deepseek_v3(num_nextn_predict_layers=2), repeated=repeated)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert len(add_trained_layers(model)) == 2
    assert add_trained_layers(model) == []  # they exist already
    model.save_pretrained(tmp_path / "again")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("m", "again"))
    shared = ("embed_tokens.weight", "shared_head.head.weight")
    wanted = {name for name in before if not (name.startswith("model.layers.") and name.endswith(shared))}
    assert wanted == set(after)  # embedding and head are stored once
    assert all(torch.equal(before[name], after[name]) for name in wanted)


@pytest.mark.parametrize("name", CONFIGS)
def test_saved_layers_load_as_drafts_and_plain_transformers_loads_the_model(name, tmp_path, caplog):
    model = with_layers(CONFIGS[name]())
    randomize(model.model.layers[model.config.num_hidden_layers :], seed=5)
    model.save_pretrained(tmp_path / "m")
    fast = load_model(tmp_path / "m", precision="fp32", backend="reference")
    assert len(fast.dso.mtp_plans) == model.config.num_nextn_predict_layers
    path = f"model.layers.{model.config.num_hidden_layers}.{'e_proj' if name == 'v4' else 'eh_proj'}"
    assert torch.equal(model.get_parameter(f"{path}.weight"), fast.get_submodule(path).dequantized())
    with caplog.at_level(logging.ERROR):
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    assert not caplog.records
    ids = torch.tensor([random_ids(model.config, 12)])
    assert torch.allclose(plain(ids).logits, model(ids).logits, atol=1e-5)


def test_layers_have_the_models_dtype_except_routers():
    model = random_model(deepseek_v3(), dtype=torch.bfloat16)
    add_trained_layers(model)
    layer = model.model.layers[-1]
    fp32 = {name for name, t in layer.state_dict().items() if t.dtype == torch.float32}
    assert fp32 == {"mlp.gate.weight", "mlp.gate.e_score_correction_bias"}
    assert layer.enorm.weight.eq(1).all() and layer.mlp.gate.e_score_correction_bias.eq(0).all()
    assert 0.01 < layer.eh_proj.weight.float().std() < 0.03


def test_a_layer_of_several_streams_cannot_be_trained_alone():
    model = random_model(deepseek_v4(num_nextn_predict_layers=1))
    with pytest.raises(ConfigError, match="a deepseek_v4 model can have no layer that drafts"):
        add_draft_layer(model)


def test_a_model_without_mtp_layers():
    with pytest.raises(ConfigError, match="mtp_loss_weight.*llama.*num_nextn_predict_layers"):
        add_trained_layers(random_model(llama()))
    with pytest.raises(ConfigError, match="num_nextn_predict_layers"):
        add_trained_layers(random_model(deepseek_v3(num_nextn_predict_layers=0)))
    with pytest.raises(ConfigError, match="mtp_loss_weight.*gemma2.*set mtp_loss_weight=None$"):  # it can have none
        add_trained_layers(random_model(gemma2()))
