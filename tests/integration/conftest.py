"""A small random model and its optimized copy, on every backend of this machine."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from deepseek_optimizer import DeepSeekConfig, DynamicGraphOptimizer
from deepseek_optimizer.backends.cpu import unavailable_reason
from support.models import CASES, assert_close_rows, random_ids, random_model

BACKENDS = [
    "reference",
    pytest.param("cpu", marks=pytest.mark.skipif(unavailable_reason() is not None, reason="no native build")),
]


@dataclass
class Pair:
    """Two models with the same weights in fp32: Transformers' and ours."""

    plain: Any
    fast: Any

    def ids(self, *lengths: int, seed: int = 0) -> torch.Tensor:
        """[len(lengths), max] random ids; rows shorter than the longest are padded on the left with 0."""
        rows = [torch.tensor(random_ids(self.plain.config, n, seed + i)) for i, n in enumerate(lengths)]
        return torch.stack([torch.nn.functional.pad(r, (max(lengths) - len(r), 0)) for r in rows])

    def mask(self, *lengths: int) -> torch.Tensor:
        """The attention mask of `ids(*lengths)`."""
        return torch.stack([torch.arange(max(lengths)) >= max(lengths) - n for n in lengths]).long()


def make_pair(case: str = "llama-gqa", backend: str = "reference", **fields: Any) -> Pair:
    plain = random_model(CASES[case]())
    fast = copy.deepcopy(plain)
    DynamicGraphOptimizer(
        fast, config=DeepSeekConfig(precision="fp32", backend=backend, **fields), batch_size_range=(1, 4)
    ).optimize()
    return Pair(plain, fast)


@pytest.fixture(scope="package", params=BACKENDS)
def pair(request) -> Pair:
    """Shared by all tests; do not modify it."""
    return make_pair(backend=request.param)


@pytest.fixture
def fresh_pair() -> Pair:
    """May be modified."""
    return make_pair()


def check_indexed_hidden_states(pair: Pair, requested: Any) -> None:
    """Checks that `output_hidden_states=asked` gives the same hidden states as Transformers, and None for the others.

    Skips indices that Transformers before 5.24 numbers differently.
    """
    if not isinstance(requested, bool):
        capturing = pytest.importorskip("transformers.utils.output_capturing")
        if not hasattr(capturing, "selected_hidden_states"):
            pytest.skip("hidden states have these indices since Transformers 5.24")
    ids = pair.ids(6)
    fast, plain = (m(ids, output_hidden_states=requested).hidden_states for m in (pair.fast, pair.plain))
    if plain is None:
        assert fast is None
        return
    assert [h is None for h in fast] == [h is None for h in plain]
    for a, b in zip(fast, plain, strict=True):
        if b is not None:
            assert_close_rows(a, b)
