"""Load balancing by biases: the rule, which tokens count, resuming, and that experts become equally loaded."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch

from deepseek_optimizer.train.balancing import ExpertBalancing, routers, sequence_loss, texts_of
from support.family_configs import deepseek_v2, deepseek_v3
from support.models import random_ids, random_model


@pytest.fixture
def model():
    return random_model(deepseek_v3()).train()


def ids_of(model, *lengths):
    return torch.tensor([random_ids(model.config, n, seed) for seed, n in enumerate(lengths)])


def chosen_in(model, run):
    """The experts chosen by each router during `run`, by path."""
    seen: dict[str, list[torch.Tensor]] = {}
    handles = [
        router.register_forward_hook(lambda m, a, out, path=path: seen.setdefault(path, []).append(out[2]))
        for path, router in routers(model)
    ]
    run()
    for handle in handles:
        handle.remove()
    return seen


def test_loads_count_all_tokens_of_a_step(model):
    """Two steps that each use different experts."""
    balancing = ExpertBalancing(rate=0.0)
    balancing.attach(model)
    for busy in (0, 1):
        for load in balancing._loads.values():
            load.counts[busy], load.counts[2:] = 30, 3
        balancing.step()
    actual = balancing.statistics()
    assert actual["expert_load_batch"] == 6.0  # 30 of 60 tokens and 12 experts
    assert actual["expert_load"] == actual["expert_load_layer_1"] == 3.0
    balancing.detach()


def test_a_step_moves_each_bias_against_its_load(model):
    ids = ids_of(model, 33, 33)
    balancing = ExpertBalancing(rate=0.01)
    balancing.attach(model, accumulation_steps=2)
    before = {path: router.e_score_correction_bias.clone() for path, router in routers(model)}
    assert len(before) == 2
    seen = chosen_in(model, lambda: [model(row[None], use_cache=False) for row in ids])  # two accumulation steps
    balancing.step()
    ratios = {}
    for path, router in routers(model):
        load = torch.cat(seen[path]).flatten().bincount(minlength=12).float()
        expected = before[path] + 0.01 * torch.sign(load.mean() - load)
        assert torch.equal(router.e_score_correction_bias, expected)
        ratios["expert_load_layer_" + path.split(".")[2]] = round(float(load.max() / load.mean()), 4)
    actual = balancing.statistics()
    worst = max(ratios.values())
    assert actual == {"expert_load": worst, "expert_load_batch": worst, **ratios}
    assert balancing.statistics() == {}
    moved = {path: router.e_score_correction_bias.clone() for path, router in routers(model)}
    balancing.step()  # nothing was counted since then
    assert all(torch.equal(router.e_score_correction_bias, moved[path]) for path, router in routers(model))


def test_loads_are_those_of_all_processes(model, monkeypatch):
    """Another process whose tokens all chose expert 0 reverses the signs."""

    def add_theirs(counts):
        counts[0] += 10_000

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", add_theirs)
    balancing = ExpertBalancing(rate=0.5)
    balancing.attach(model)
    before = {path: router.e_score_correction_bias.clone() for path, router in routers(model)}
    model(ids_of(model, 33), use_cache=False)
    balancing.step()
    for path, router in routers(model):
        expected = torch.full((12,), 0.5)
        expected[0] = -0.5
        torch.testing.assert_close(router.e_score_correction_bias - before[path], expected)


def test_padding_and_evaluation_do_not_count(model):
    ids = ids_of(model, 20, 20)
    mask = torch.ones_like(ids)
    mask[0, 7:] = 0
    balancing = ExpertBalancing()
    balancing.attach(model)
    model.eval()(ids, use_cache=False)
    assert all(load.counts.sum() == 0 for load in balancing._loads.values())
    seen = chosen_in(model, lambda: model.train()(ids, attention_mask=mask, use_cache=False))
    for path, load in balancing._loads.items():
        real = seen[path][0][mask.bool().flatten()]
        assert torch.equal(load.counts, real.flatten().bincount(minlength=12))
    balancing.detach()
    model(ids, use_cache=False)
    assert not balancing._loads and not any(r._forward_hooks for _, r in routers(model))


def test_biases_are_fp32_and_frozen_routers_stay():
    model = random_model(deepseek_v3(), dtype=torch.bfloat16).train()
    for _, router in routers(model):
        router.e_score_correction_bias.data = router.e_score_correction_bias.data.bfloat16()
    model.model.layers[1].mlp.gate.weight.requires_grad_(False)
    balancing = ExpertBalancing()
    balancing.attach(model)
    assert list(balancing._loads) == ["model.layers.2.mlp.gate"]
    assert model.model.layers[2].mlp.gate.e_score_correction_bias.dtype == torch.float32
    assert model.model.layers[1].mlp.gate.e_score_correction_bias.dtype == torch.bfloat16
    assert not list(routers(random_model(deepseek_v2())))  # softmax routers have no biases


def test_resuming_is_bitwise(model):
    ids = [ids_of(model, 15, 15) + k for k in range(6)]
    ids = [i % model.config.vocab_size for i in ids]

    def run(model, batches):
        balancing = ExpertBalancing(rate=0.05)
        balancing.attach(model)
        for batch in batches:
            model(batch, use_cache=False)
            balancing.step()
        balancing.detach()
        return {p: r.e_score_correction_bias.clone() for p, r in routers(model)}

    whole = run(copy.deepcopy(model), ids)
    part = copy.deepcopy(model)
    run(part, ids[:3])
    resumed = copy.deepcopy(model)
    resumed.load_state_dict(part.state_dict())
    again = run(resumed, ids[3:])
    assert all(torch.equal(whole[p], again[p]) for p in whole)


def test_unequal_experts_become_equally_loaded(model):
    ids = ids_of(model, *[60] * 8)
    balancing = ExpertBalancing(rate=0.01)
    balancing.attach(model)
    ratios = []
    with torch.no_grad():
        for _, router in routers(model):
            router.e_score_correction_bias.normal_(0, 0.3, generator=torch.Generator().manual_seed(0))
        for _ in range(150):
            model(ids, use_cache=False)
            balancing.step()
            ratios.append(balancing.statistics()["expert_load"])
    assert ratios[0] > 1.8
    assert max(ratios[-20:]) < 1.3


def test_logged_values(model):
    balancing = ExpertBalancing()
    args = SimpleNamespace(gradient_accumulation_steps=1)
    state = SimpleNamespace(log_history=[{"loss": 3.0}])
    balancing.on_train_begin(args, state, None, model=model)
    model(ids_of(model, 20), use_cache=False)
    balancing.on_optimizer_step(args, state, None)
    logs = {"eval_loss": 2.0}
    balancing.on_log(args, state, None, logs=logs)
    assert logs == {"eval_loss": 2.0}
    logs = {"loss": 3.0}
    balancing.on_log(args, state, None, logs=logs)
    assert logs["expert_load"] >= 1
    assert set(logs) == {"loss", "expert_load", "expert_load_batch", "expert_load_layer_1", "expert_load_layer_2"}
    assert state.log_history == [logs]
    balancing.on_train_end(args, state, None)
    assert not balancing._handles


def test_sequence_loss_follows_the_formula():
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(11, 6, generator=g, dtype=torch.float64).float().requires_grad_()
    index = torch.rand(11, 6, generator=g).topk(2, -1).indices
    text = texts_of(torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6]]), torch.Size((1, 11)))
    assert text.tolist() == [0] * 4 + [1] * 7
    expected = []
    for rows in (slice(0, 4), slice(4, 11)):
        s = logits[rows].sigmoid()
        p = (s / s.sum(-1, keepdim=True)).mean(0)
        f = torch.stack([(index[rows] == i).sum() for i in range(6)]) * 6 / (2 * len(s))
        expected.append((f * p).sum())
    torch.testing.assert_close(sequence_loss(logits, index, text), torch.stack(expected).mean())
    real = torch.tensor([True] * 3 + [False] + [True] * 7)
    short = sequence_loss(logits[:3], index[:3])
    torch.testing.assert_close(sequence_loss(logits[:4], index[:4], text[:4], real[:4]), short)


def test_sequence_loss_reaches_the_routers_scaled(model):
    """Its gradient is alpha / accumulation steps times that of the loss, added to the model's own."""
    ids = ids_of(model, 25, 25)
    grads = []
    for alpha in (0.0, 0.5):
        balancing = ExpertBalancing(sequence_weight=alpha)
        balancing.attach(model, accumulation_steps=4)
        model.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()
        balancing.detach()
        grads.append(model.model.layers[2].mlp.gate.weight.grad.clone())
    kept = {}
    handle = model.model.layers[2].mlp.gate.register_forward_hook(lambda m, a, out: kept.update(out=out))
    model(ids, use_cache=False)
    handle.remove()
    loss = sequence_loss(kept["out"][0], kept["out"][2], texts_of(torch.arange(25), ids.shape)) * 0.5 / 4
    (own,) = torch.autograd.grad(loss, model.model.layers[2].mlp.gate.weight)
    assert own.abs().max() > 1e-6
    torch.testing.assert_close(grads[1] - grads[0], own, rtol=1e-2, atol=1e-6)
