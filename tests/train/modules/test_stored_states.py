"""Stored hidden states: found again in other batches, and the same loss without running the model."""

from __future__ import annotations

import os
from collections import namedtuple

import pytest
import torch

from deepseek_optimizer.train.modules import stored_states
from deepseek_optimizer.train.modules.draft_layer import add_draft_layer
from deepseek_optimizer.train.modules.draft_loss import DraftObjective
from deepseek_optimizer.train.modules.stored_states import StoredStates
from support.family_configs import llama
from support.models import random_model, randomize

WIDTH = 6


def row(seed, length, padding):
    """A row whose first tokens and padding have no label: its ids, labels and position_ids."""
    ids = torch.randint(3, 90, (length,), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[:2] = -100
    pad = torch.nn.functional.pad
    return pad(ids, (0, padding)), pad(labels, (0, padding), value=-100), pad(torch.arange(length), (0, padding))


def batch(*rows):
    ids, labels, positions = (torch.stack(parts) for parts in zip(*rows, strict=True))
    return ids, labels, {"position_ids": positions}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_are_found_in_other_batches(tmp_path, dtype):
    stored = StoredStates(tmp_path)
    first, second = batch(row(0, 9, 3), row(1, 12, 0)), batch(row(2, 5, 1))
    given = []
    for ids, labels, inputs in (first, second):
        states = torch.randn(*ids.shape, WIDTH).to(dtype)
        likely = torch.randint(0, 90, ids.shape)
        assert stored.find(ids, labels, inputs, WIDTH, dtype) is None
        stored.add(ids, labels, inputs, states, likely)
        given.append((states, likely))
    states, likely = stored.find(*batch(row(2, 5, 8), row(1, 12, 1)), WIDTH, dtype)
    for found, of in ((states, [given[1][0][0], given[0][0][1]]), (likely, [given[1][1][0], given[0][1][1]])):
        assert torch.equal(found[0, :5], of[0][:5]) and torch.equal(found[1, :12], of[1][:12])
        assert not found[0, 5:].any() and not found[1, 12:].any()
    assert os.listdir(tmp_path) == []  # the file has no name


def test_what_states_depend_on_is_compared(tmp_path):
    stored = StoredStates(tmp_path)
    ids, labels, inputs = batch(row(0, 9, 3))
    stored.add(ids, labels, inputs, torch.randn(*ids.shape, WIDTH), ids)
    places = inputs["position_ids"].clone()
    places[0, 4:] -= 4
    mask = torch.ones_like(ids)
    others = ids.clone()
    others[0, 3] += 1
    padding = ids.clone()
    padding[0, 10] += 1
    find = lambda *given: stored.find(*given, WIDTH, torch.float32)  # noqa: E731
    assert find(others, labels, inputs) is find(ids, labels, {"position_ids": places}) is None
    assert find(ids, labels, inputs | {"attention_mask": mask}) is None
    assert find(padding, labels, inputs) is not None
    assert find(*batch(row(0, 9, 3), row(5, 9, 3))) is None  # one of two


def test_a_full_disk(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")(0, 0, 2 * 9 * (WIDTH * 4 + 8) + 100)
    monkeypatch.setattr(stored_states.shutil, "disk_usage", lambda folder: usage)
    stored = StoredStates(tmp_path)
    for seed in (0, 1):
        ids, labels, inputs = batch(row(seed, 9, 0))
        stored.add(ids, labels, inputs, torch.zeros(*ids.shape, WIDTH), ids)
        assert (stored.find(ids, labels, inputs, WIDTH, torch.float32) is None) == (seed == 1)


def test_the_loss_of_later_epochs(tmp_path):
    """The same, without running the model; an evaluation always runs it."""
    model = random_model(llama())
    model.set_attn_implementation("sdpa")
    add_draft_layer(model, 90, [{"input_ids": torch.arange(90)}])
    randomize(model.model.layers[3:], seed=5)
    model.train()
    objective, runs, losses = DraftObjective(2, StoredStates(tmp_path)), [], []
    for rows in ((row(0, 9, 3), row(1, 12, 0)), (row(1, 12, 4), row(0, 9, 7))):
        ids, labels, inputs = batch(*rows)

        def run(ids=ids, inputs=inputs):
            runs.append(ids)
            with torch.no_grad():
                return model.model(ids, use_cache=False, **inputs).last_hidden_state

        losses.append(objective.of_text(model, run, ids, labels, None, inputs))
    assert len(runs) == 1
    torch.testing.assert_close(*losses)
    with torch.no_grad():
        objective.of_text(model.eval(), run, ids, labels, None, inputs)
    assert len(runs) == 2
