"""MTP layers of DeepSeek-V4 in training: states and gradients against DeepSeek's own code, names and dtypes of the weights."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from deepseek_optimizer.checkpoint.stacks import is_stack
from deepseek_optimizer.train.modules.mtp import add_trained_layers, mtp_states
from deepseek_optimizer.train.modules.mtp_loss import mtp_loss
from deepseek_optimizer.train.modules.mtp_streams import DraftStates
from deepseek_optimizer.train.precision import set_training_dtype
from deepseek_optimizer.train.prepare import prepare
from support.family_configs import deepseek_v4
from support.models import random_ids, random_model, randomize
from support.mtp_files import save_with_mtp
from support.v4_mtp import mtp_layer, published_name

SIZES = {
    "small": {},
    "two streams": {"hc_mult": 2, "hc_sinkhorn_iters": 1, "num_attention_heads": 3, "o_groups": 1, "vocab_size": 97},
    "wide": {
        "hidden_size": 104,
        "hc_mult": 5,
        "head_dim": 36,
        "qk_rope_head_dim": 10,
        "sliding_window": 9,
        "n_routed_experts": 9,
    },
}


def with_layers(config):
    model = random_model(config)
    add_trained_layers(model)
    randomize(model.model.layers[config.num_hidden_layers :], seed=5)
    return model.train()


def run(model, ids, **where):
    with DraftStates(model.model) as states:
        return states.of(model.model(ids, use_cache=False, **where).last_hidden_state)


def expected_loss(model, ids):
    """By DeepSeek's own code, in fp64: for each layer the mean cross entropy of the tokens it predicts."""
    config, streams, losses = model.config, run(model, ids)[0].double(), []
    first = config.num_hidden_layers
    embedding, head = model.model.embed_tokens.weight.double(), model.lm_head.weight.double()
    for depth in range(config.num_nextn_predict_layers):
        weights = {}
        for name, tensor in model.model.layers[first + depth].state_dict(keep_vars=True).items():
            experts, _, role = name.rpartition(".")
            parts = {f"{name}": tensor}
            if is_stack(f"model.layers.{first}.{name}"):
                roles = ("gate", "up") if role == "gate_up_proj" else ("down",)
                parts = {
                    f"{experts}.{e}.{r}_proj.weight": part
                    for e, matrix in enumerate(tensor) for r, part in zip(roles, matrix.chunk(len(roles)), strict=True)
                }  # fmt: skip
            for own, part in parts.items():
                weights[published_name(f"model.layers.{first}.{own}", first).removeprefix("mtp.0.")] = part.double()
        tokens = ids[0, depth + 1 :]
        streams, normed = mtp_layer(weights, config, embedding[tokens], streams[:-1])
        losses.append(F.cross_entropy(normed[:-1] @ head.T, ids[0, depth + 2 :]))
    return torch.stack(losses).mean()


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", SIZES)
def test_gradients_equal_those_of_deepseeks_own_code(name):
    model = with_layers(deepseek_v4(num_nextn_predict_layers=2, **SIZES[name]))
    ids = torch.tensor([random_ids(model.config, 37)])
    loss = expected_loss(model, ids)
    wanted = gradients(model, loss)
    assert all(
        wanted[name].abs().sum() > 0 for name, _ in model.named_parameters() if "layers.4." in name or "layers.5." in name
    )
    prepare(model)
    own = mtp_loss(model, run(model, ids), ids, ids)
    torch.testing.assert_close(own.double(), loss, rtol=1e-5, atol=0)
    made = gradients(model, own)
    assert made.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert (made[name] - gradient).norm() <= 1e-4 * gradient.norm(), name


def test_padding_changes_nothing():
    model = with_layers(deepseek_v4(num_nextn_predict_layers=1))
    text = random_ids(model.config, 30)
    ids = torch.tensor([text])
    alone = mtp_loss(model, run(model, ids), ids, ids)
    ids, labels = torch.tensor([text + [0] * 5]), torch.tensor([text + [-100] * 5])
    mask = torch.tensor([[1] * 30 + [0] * 5])
    padded = mtp_loss(model, run(model, ids, attention_mask=mask), ids, labels, attention_mask=mask)
    torch.testing.assert_close(padded, alone, rtol=1e-5, atol=0)


def stored_layers(folder):
    """All tensors of a saved model but those of its decoder layers, embedding, head, last norm and last hyper-connection.
    Transformers saves every `kv_norm` as `norm`."""
    names = ("layers.0.", "layers.1.", "layers.2.", "layers.3.", "embed", "head", "norm", "hc_head", "lm_head")
    stored = {name.removeprefix("model."): t for name, t in load_file(folder / "model.safetensors").items()}
    return {name: tensor for name, tensor in stored.items() if not name.startswith(names)}


def test_saved_under_the_published_names(tmp_path):
    """Those of a checkpoint that is loaded are saved as they were, those of a new model in the same form."""
    config = deepseek_v4(num_nextn_predict_layers=2)
    save_with_mtp(tmp_path / "m", config)
    stored = load_file(tmp_path / "m" / "model.safetensors")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert all("read from" in line for line in add_trained_layers(loaded))
    loaded.save_pretrained(tmp_path / "again")
    layers = {name.replace(".kv_norm.", ".norm."): t for name, t in stored.items() if name.startswith("mtp.")}
    again = stored_layers(tmp_path / "again")
    assert layers and again.keys() == layers.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in layers.items())
    with_layers(config).save_pretrained(tmp_path / "new")
    new = stored_layers(tmp_path / "new")
    assert {name: tensor.shape for name, tensor in new.items()} == {name: tensor.shape for name, tensor in layers.items()}


def test_dtypes_and_first_weights(tmp_path):
    """Those that Transformers' own layers have."""
    sizes = {"moe_intermediate_size": 48}  # torch's grouped products need multiples of 8
    random_model(deepseek_v4(num_nextn_predict_layers=1, **sizes)).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    (tmp_path / "model.safetensors").unlink()  # its layers are new then
    add_trained_layers(model)
    layers = model.model.layers
    for before_training in (True, False):
        if not before_training:
            set_training_dtype(model, torch.bfloat16)
        own, others = ({n: t.dtype for n, t in layers[i].state_dict().items()} for i in (4, 2))
        assert {name: own[name] for name in others} == others
        new = {name: own[name] for name in own.keys() - others.keys()}
        bf16 = {name for name, dtype in new.items() if dtype == torch.bfloat16}
        assert bf16 == {"e_proj.weight", "h_proj.weight"}
    layer = layers[4]
    assert not any(t.any() for t in (layer.self_attn.sinks, layer.attn_hc.base, layer.hc_head.hc_base))
    assert all(t.eq(1).all() for t in (layer.attn_hc.scale, layer.hc_head.hc_scale, layer.hnorm.weight))
    ids = torch.tensor([random_ids(model.config, 20)])
    ((_, _, state),) = mtp_states(model, run(model, ids), ids)
    assert state.dtype == torch.bfloat16 and state.isfinite().all()
