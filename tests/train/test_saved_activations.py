"""Recomputation in the backward pass: equal gradients, fewer bytes saved, and no tensor confused with another."""

from __future__ import annotations

import copy
import weakref
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from deepseek_optimizer.train.prepare import prepare
from deepseek_optimizer.train.saved_activations import SavedActivations
from support.family_configs import llama
from support.models import random_model


class Counting(SavedActivations):
    """Counts the bytes of saved tensors, each storage once."""

    def __init__(self, save_all: bool = False) -> None:
        super().__init__(save_all)
        self.storages: dict[int, int] = {}

    def _pack(self, tensor):
        packed = super()._pack(tensor)
        if isinstance(packed, torch.Tensor):
            self.storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return packed


def _weights() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(32, 32, generator=generator, requires_grad=True) for _ in range(3)]


def _two_readers(x: torch.Tensor, weights: list[torch.Tensor], saved: SavedActivations) -> torch.Tensor:
    """silu(x) is the input of two products, once reshaped."""
    inner = saved.recomputable(F.silu(x), partial(F.silu, x.detach()))
    return (F.linear(inner, weights[0]) * F.linear(inner.view(2, -1, 32), weights[1]).flatten(0, 1)).sum()


def _gradients(saved: SavedActivations, x: torch.Tensor) -> list[torch.Tensor]:
    weights, x = _weights(), x.clone().requires_grad_()
    with saved:
        loss = _two_readers(x * 1.0, weights, saved)
    loss.backward()
    return [x.grad, weights[0].grad, weights[1].grad]


def test_bitwise_equal_gradients_with_fewer_bytes_saved():
    x = torch.randn(64, 32)
    less, save_all = Counting(), Counting(save_all=True)
    for ours, theirs in zip(_gradients(less, x), _gradients(save_all, x), strict=True):
        assert torch.equal(ours, theirs)
    gone = sum(save_all.storages.values()) - sum(less.storages.values())
    assert gone == x.nbytes


def test_a_freed_result_is_not_confused_with_a_later_one():
    saved, weight = SavedActivations(), _weights()[0]
    x = torch.ones(64, 32, requires_grad=True)
    with saved:
        marked = saved.recomputable(x * 2, lambda: pytest.fail("recomputed, although it was not saved"))
        address = marked.data_ptr()
        del marked
        kept_alive = []
        for _ in range(1000):
            other = x * 3
            if other.data_ptr() == address:
                break
            kept_alive.append(other)
        else:
            pytest.skip("the allocator did not reuse the memory")
        loss = F.linear(other, weight).sum()
    loss.backward()
    assert torch.equal(weight.grad, torch.full((32, 32), 3.0 * 64))


def test_reordered_views_are_saved_unchanged():
    saved, weight = SavedActivations(), _weights()[0]
    x = torch.randn(32, 32, requires_grad=True)
    with saved:
        inner = saved.recomputable(F.silu(x), partial(F.silu, x.detach()))
        loss = F.linear(inner.t(), weight).square().sum()
    loss.backward()
    expected = torch.autograd.grad(F.linear(F.silu(x).t(), weight).square().sum(), weight)[0]
    assert torch.equal(weight.grad, expected)


def test_nothing_is_marked_outside():
    saved = SavedActivations()
    x = torch.randn(4, 4, requires_grad=True)
    saved.recomputable(x * 2, lambda: x * 2)
    with torch.no_grad(), saved:
        saved.recomputable(x * 2, lambda: x * 2)
        assert not saved._marked
    assert not saved._marked


def test_inside_recomputed_layers():
    weights, x = _weights(), torch.randn(64, 32, requires_grad=True)
    saved = SavedActivations()
    with saved:
        loss = checkpoint(_two_readers, x, weights, saved, use_reentrant=False)
    loss.backward()
    plain = _gradients(SavedActivations(save_all=True), x.detach())
    for ours, theirs in zip([x.grad, weights[0].grad, weights[1].grad], plain, strict=True):
        assert torch.equal(ours, theirs)


def test_copies():
    assert copy.deepcopy(SavedActivations(save_all=True)).save_all


def _saved_by(memory: str, layers: int) -> int:
    """Bytes per token that a forward of a bf16 Llama saves, without weights."""
    model = random_model(llama(num_hidden_layers=layers), dtype=torch.bfloat16).train()
    prepared = prepare(model, activation_memory=memory)
    counting = Counting(prepared.saved.save_all)
    for module in model.modules():
        if "saved" in module.__dict__:
            module.saved = counting
    ids = torch.randint(3, 200, (2, 128), generator=torch.Generator().manual_seed(0))
    with counting:
        model(input_ids=ids, labels=ids)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    return sum(size for address, size in counting.storages.items() if address not in weights) // ids.numel()


def test_bytes_per_token_and_layer():
    """Per layer: only the inputs of its two norms, its attention and its gates."""
    hidden, inner, heads, shared, width = 72, 136, 6, 2, 12
    elements = 2 * hidden + 2 * heads * width + 2 * shared * width + 2 * inner  # inputs of norms, q, result, k, v, gate, up
    rows = 4 * (2 + 2 * heads)  # fp32: one value per norm, and two per attention head
    selective = 2 * elements + rows
    assert _saved_by("selective", 3) - _saved_by("selective", 2) == selective
    recomputed = 2 * (2 * hidden + inner)  # outputs of the norms, and the input of down
    assert _saved_by("full", 3) - _saved_by("full", 2) == selective + recomputed
    assert _saved_by("recompute", 3) - _saved_by("recompute", 2) == 2 * hidden


def test_recomputed_once_per_backward():
    x, weights, saved, calls = torch.randn(64, 32, requires_grad=True), _weights(), SavedActivations(), []

    def compute() -> torch.Tensor:
        calls.append(1)
        return F.silu(x.detach())

    with saved:
        inner = saved.recomputable(F.silu(x * 1.0), compute)
        loss = sum(F.linear(inner, weight).sum() for weight in weights)
    for times in (1, 2):
        gradients = torch.autograd.grad(loss, weights, retain_graph=True)
        assert len(calls) == times
        assert all(torch.equal(g, gradients[0]) for g in gradients)


def test_tensors_changed_in_place_are_saved_unchanged():
    """Like the noise of Mixtral's routers, by which the output of a norm is multiplied."""
    saved, weight = SavedActivations(), _weights()[0]
    x = torch.randn(64, 32, requires_grad=True)
    with saved:
        inner = saved.recomputable(x * 2, lambda: pytest.fail("recomputed with its old values"))
        inner *= 3
        loss = F.linear(inner, weight).sum()
    loss.backward()
    torch.testing.assert_close(weight.grad, (6 * x.detach()).sum(0).expand(32, 32))


def test_recomputed_layers_hold_no_marked_tensors():
    saved, x, calls = SavedActivations(), torch.randn(8, requires_grad=True), []

    def layer(x: torch.Tensor) -> torch.Tensor:
        between = x * 2
        calls.append(weakref.ref(between))
        return saved.recomputable(between * 3, partial(torch.mul, between.detach(), 3)) * 5

    with saved:
        checkpoint(layer, x, use_reentrant=False)
        assert calls[0]() is None and not saved._marked


def test_results_that_no_backward_pass_reaches_are_freed():
    """Such as the scores of an indexer, of which only the places of the largest are used: softmax saves its own result."""
    x, saved = torch.randn(8, requires_grad=True), SavedActivations()
    with saved:
        scores = (2 * x).softmax(-1)
        loss = x[scores.topk(2).indices].sum()
    freed = weakref.ref(scores)
    loss.backward()
    del scores
    assert freed() is None
