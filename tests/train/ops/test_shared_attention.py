"""Attention with rows that all heads share: values and gradients as in plain torch in fp64."""

from __future__ import annotations

import pytest
import torch

from deepseek_optimizer.train.ops import shared_attention as module
from deepseek_optimizer.train.ops.shared_attention import shared_attention, shared_attention_reference

# sequences, tokens, heads, width, window, entries, tokens of an entry
SIZES = [(1, 1, 1, 2, 1, 0, 1), (2, 37, 3, 20, 5, 0, 1), (1, 70, 9, 34, 16, 17, 4), (3, 29, 2, 7, 40, 4, 7)]


def inputs(size, dtype):
    """Leaves, and masks of a window and of entries, some of which are left out at random."""
    batch, tokens, heads, width, window, entries, every = size
    generator = torch.Generator().manual_seed(sum(size))
    shapes = ((batch, tokens, heads, width), (batch, tokens + entries, width), (heads,))
    leaves = [torch.randn(shape, generator=generator) for shape in shapes]
    leaves = [leaf.to(dtype) if leaf.dim() > 1 else leaf for leaf in leaves]
    place = torch.arange(tokens)
    behind = place[:, None] - place
    seen = (behind >= 0) & (behind < window)
    masks = [torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)[None, None]]
    if entries:
        closed = torch.arange(entries) < (place[:, None] + 1) // every
        chosen = closed & (torch.rand(batch, 1, tokens, entries, generator=generator) > 0.4)
        masks.append(torch.zeros(chosen.shape, dtype=dtype).masked_fill(~chosen, -torch.inf))
    return [leaf.requires_grad_() for leaf in leaves], masks


def assert_equals_fp64(leaves, masks, tolerance):
    upstream = torch.randn(leaves[0].shape, generator=torch.Generator().manual_seed(0))
    made = shared_attention(leaves[0], leaves[1], masks, leaves[2], 0.3)
    ours = (made, *torch.autograd.grad(made, leaves, upstream.to(made.dtype)))
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected = shared_attention_reference(exact[0], exact[1], masks, exact[2], 0.3)
    theirs = (expected, *torch.autograd.grad(expected, exact, upstream.to(made.dtype).double()))
    for actual, wanted in zip(ours, theirs, strict=True):
        assert (actual.double() - wanted).norm() <= tolerance * wanted.norm().clamp(min=1e-3)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("rows", [1, 50, 1024])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_fp64(size, rows, dtype, monkeypatch):
    monkeypatch.setattr(module, "_ROWS", rows)
    assert_equals_fp64(*inputs(size, dtype), 2e-5 if dtype == torch.float32 else 0.02)


def test_queries_without_a_row():
    """Their result is zero, as all of their weight is the sink's."""
    leaves, masks = inputs((1, 30, 3, 8, 4, 5, 4), torch.float32)
    masks[0][:, :, 10:], masks[1][:, :, 10:] = torch.finfo(torch.float32).min, -torch.inf
    assert not shared_attention(leaves[0], leaves[1], masks, leaves[2], 1.0)[:, 10:].any()
    assert_equals_fp64(leaves, masks, 2e-5)
    masks[0].fill_(torch.finfo(torch.float32).min)
    masks[1].fill_(-torch.inf)
    nothing = shared_attention(leaves[0], leaves[1], masks, leaves[2], 1.0)
    nothing.sum().backward()
    assert not nothing.any() and not any(leaf.grad.any() for leaf in leaves)


def test_masks_may_have_any_numbers():
    """A caller's own mask is added to the scores, as in Transformers."""
    leaves, masks = inputs((2, 33, 3, 8, 12, 6, 4), torch.float32)
    place = torch.arange(33)
    masks[0] = masks[0] - 0.3 * (place[:, None] - place).abs()
    masks[1] = masks[1] + torch.randn(masks[1].shape, generator=torch.Generator().manual_seed(1))
    assert_equals_fp64(leaves, masks, 2e-5)


def test_large_scores_and_sinks():
    leaves, masks = inputs((1, 12, 2, 8, 5, 0, 1), torch.float32)
    with torch.no_grad():
        leaves[0].mul_(300.0)
        leaves[2].copy_(torch.tensor([-500.0, 400.0]))
    assert_equals_fp64(leaves, masks, 1e-3)


def test_only_rows_that_are_seen_cost():
    """A block of queries multiplies the rows of its window, not those of the whole text."""
    leaves, masks = inputs((1, 400, 4, 8, 16, 0, 1), torch.float32)
    blocks = list(module._blocks(leaves[0], masks))
    assert max(len(seen) for _, seen, _ in blocks) == module._MOST + 15
