"""The loss of multi-token prediction: against plain cross entropy, at the ends of texts, in packed and padded rows."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from deepseek_optimizer.train.modules.mtp import add_trained_layers, head_of, mtp_states
from deepseek_optimizer.train.modules.mtp_loss import labels_ahead, mtp_loss
from deepseek_optimizer.train.prepare import prepare
from support.family_configs import deepseek_v3
from support.models import random_ids, random_model, randomize


@pytest.fixture(params=["plain", "prepared"])
def model(request):
    made = random_model(deepseek_v3(num_nextn_predict_layers=2))
    made.set_attn_implementation("sdpa")
    add_trained_layers(made)
    randomize(made.model.layers[3:], seed=5)
    if request.param == "prepared":
        assert prepare(made).attention == "dso_train"
    return made.train()


def loss_of(model, ids, labels, **where):
    hidden = model.model(ids, use_cache=False, **where).last_hidden_state
    items = where.pop("num_items", None)
    return mtp_loss(model, hidden, ids, labels, num_items=items, **where)


def test_equals_cross_entropy(model):
    ids = torch.tensor([random_ids(model.config, 17, s) for s in (0, 1)])
    labels = ids.clone()
    labels[:, :5] = -100
    hidden = model.model(ids, use_cache=False).last_hidden_state
    made = mtp_loss(model, hidden, ids, labels)
    means, sums = [], []
    for k, (layer, state) in enumerate(mtp_states(model, hidden, ids)):
        logits, wanted = head_of(layer, model)(state[:, : -k - 2]).flatten(0, 1), labels[:, k + 2 :].flatten()
        means.append(F.cross_entropy(logits, wanted))
        sums.append(F.cross_entropy(logits, wanted, reduction="sum"))
    torch.testing.assert_close(made, torch.stack(means).mean(), rtol=1e-5, atol=1e-5)
    divided = mtp_loss(model, hidden, ids, labels, num_items=torch.tensor(50))
    torch.testing.assert_close(divided, torch.stack(sums).mean() / 50, rtol=1e-5, atol=1e-5)


def test_every_weight_has_a_gradient(model):
    ids = torch.tensor([random_ids(model.config, 30)])
    loss_of(model, ids, ids).backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert trained == {name for name, _ in model.named_parameters()}


def test_packed_texts_equal_separate_texts(model):
    a, b = ([random_ids(model.config, n, n)] for n in (9, 14))
    packed = torch.tensor([a[0] + b[0]])
    positions = torch.cat((torch.arange(9), torch.arange(14)))[None]
    kinds = [(packed, packed, {"position_ids": positions, "num_items": 1})]
    kinds += [(torch.tensor(x), torch.tensor(x), {"num_items": 1}) for x in (a, b)]
    together, first, second = (_sum(model, ids, labels, **where) for ids, labels, where in kinds)
    torch.testing.assert_close(together, first + second, rtol=1e-5, atol=1e-4)


def _sum(model, ids, labels, position_ids=None, num_items=None):
    hidden = model.model(ids, use_cache=False, position_ids=position_ids).last_hidden_state
    return mtp_loss(model, hidden, ids, labels, position_ids=position_ids, num_items=num_items)


@pytest.mark.parametrize("left", [True, False])
def test_padding_changes_nothing(model, left):
    text = random_ids(model.config, 12)
    alone = _sum(model, torch.tensor([text]), torch.tensor([text]))
    pad, ignored, off = [0] * 5, [-100] * 5, [0] * 5
    ids, labels, mask = ((x + y if left else y + x) for x, y in ((pad, text), (ignored, text), (off, [1] * 12)))
    where = {"attention_mask": torch.tensor([mask])}
    if left:
        where["position_ids"] = torch.tensor([[0] * 5 + list(range(12))])
    hidden = model.model(torch.tensor([ids]), use_cache=False, **where).last_hidden_state
    padded = mtp_loss(model, hidden, torch.tensor([ids]), torch.tensor([labels]), **where)
    torch.testing.assert_close(padded, alone, rtol=1e-5, atol=1e-4)


def test_labels_ahead():
    labels = torch.tensor([[10, 11, 12, 13, 14, 15]])
    x = -100
    assert labels_ahead(labels, 2).tolist() == [[12, 13, 14, 15, x, x]]
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]])
    assert labels_ahead(labels, 2, positions).tolist() == [[12, x, x, 15, x, x]]
    assert labels_ahead(labels, 3, positions).tolist() == [[x] * 6]
    assert labels_ahead(labels, 9).tolist() == [[x] * 6]
