"""Qualities of requests for a model that several processes run: what one process computes at each of them."""

from __future__ import annotations

import pytest

from deepseek_optimizer import Request, SamplingParams, load_model, make_engine
from deepseek_optimizer.backends.cpu import unavailable_reason
from deepseek_optimizer.backends.qualities import QUALITIES
from deepseek_optimizer.errors import UnsupportedRequestError
from support.divided import close, load_divided, save_divisible
from support.models import random_ids

from .test_divided_experts import CONFIGS

pytestmark = pytest.mark.skipif(unavailable_reason() is not None, reason="needs the native backend")
FIELDS = {
    "precision": "int8_nested",
    "batch_invariant": True,
    "activation": "int16",
    "threads": 1,
    "kv_cache_memory": 20_000_000,
}


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return save_divisible(tmp_path_factory.mktemp("dense") / "model")


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    return save_divisible(tmp_path_factory.mktemp("experts") / "model", CONFIGS["deepseek_v3"])


def answers(model):
    """Tokens, their log probabilities, and the quality, of requests of all qualities at once."""
    engine, sampling = make_engine(model), SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=1)
    requests = [
        Request(random_ids(model.config, 40, seed=3), sampling, id=str(n), quality=quality)
        for n, quality in enumerate((*QUALITIES, None))
    ]
    done = engine.generate(requests)
    assert all(c.error is None for c in done)
    return done


@pytest.mark.parametrize(
    ("kind", "parallel"), [("dense", {"tensor": 2}), ("experts", {"expert": 2}), ("experts", {"pipeline": 2})]
)
def test_each_quality_is_what_one_process_computes(kind, parallel, request):
    folder = request.getfixturevalue(kind)
    whole = answers(load_model(folder, **FIELDS))
    model = load_divided(folder, parallel=parallel, **FIELDS)
    try:
        first, again = answers(model), answers(model)
        model.dso.backend.leader.check()
        with pytest.raises(UnsupportedRequestError, match="processes, which have its own plan only"):
            model.dso.backend.compile(model.dso.adapter_graph(4), model.dso.weights_of(model.dso.adapter_graph(4)))
        report = model.report().qualities
    finally:
        close(model)
    assert [c.quality for c in whole] == [c.quality for c in first] == [*QUALITIES, "exact"]
    for one, other, third in zip(whole, first, again, strict=True):
        assert one.token_ids == other.token_ids == third.token_ids
        assert chances(other) == pytest.approx(chances(one), abs=5e-3)
    assert len({tuple(chances(c)) for c in first}) == 3, "the qualities differ"
    assert report["fast"] < report["balanced"] < report["exact"]


def chances(completion):
    """The log probability of each token."""
    return [token.logprob for token in completion.logprobs]
