"""RopeSpec against the rotary module of Transformers' own models, bit for bit."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

from deepseek_optimizer.backends.reference import ReferenceBackend
from deepseek_optimizer.models import build_graph
from deepseek_optimizer.models.rope import RopeSpec
from support.models import CASES, llama, random_ids, random_model, rope, transformers_logits, weights_of
from support.models import assert_close_rows as close
from support.steps import runner


def spec_of(config: object) -> RopeSpec:
    return next(n.attrs["rope"] for n in build_graph(config).nodes if n.op == "rope_table")


@pytest.mark.parametrize("case", CASES)
def test_frequencies_equal_transformers(case: str) -> None:
    model = random_model(CASES[case]())
    rotary, spec = model.model.rotary_emb, spec_of(model.config)
    assert spec.inv_freq.dtype == np.float32
    assert torch.equal(torch.from_numpy(spec.inv_freq), rotary.inv_freq)
    assert spec.scaling == rotary.attention_scaling
    assert spec.rot == 2 * len(spec.inv_freq)


def test_every_kind_is_among_the_cases() -> None:
    kinds = {spec_of(make()).kind for make in CASES.values()}
    assert kinds == {"default", "linear", "dynamic", "yarn", "llama3"}


@pytest.mark.parametrize("length", [1, 64, 65, 100, 1000])
def test_dynamic_frequencies_follow_the_length(length: int) -> None:
    model = random_model(llama(max_position_embeddings=64, **rope("dynamic", factor=4.0)))
    rotary, spec = model.model.rotary_emb, spec_of(model.config)
    rotary(torch.zeros(1), torch.arange(length)[None])
    assert torch.equal(torch.from_numpy(spec.inv_freq_at(length)), rotary.inv_freq)
    assert np.array_equal(spec.inv_freq_at(length), spec.inv_freq) == (length <= 64)
    assert np.array_equal(pickle.loads(pickle.dumps(spec)).inv_freq_at(length), spec.inv_freq_at(length))


def test_dynamic_beyond_the_original_context() -> None:
    model = random_model(llama(max_position_embeddings=64, **rope("dynamic", factor=4.0)))
    ids = random_ids(model.config, 150)
    run = runner(ReferenceBackend(), build_graph(model.config), weights_of(model))
    close(run.logits(ids), transformers_logits(model, ids))
    close(run.logits(ids[:60]), transformers_logits(model, ids[:60]))  # and back within it
