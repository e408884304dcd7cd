"""torch's wrappers around a model: torch.compile, autocast, inference mode, DataParallel."""

from __future__ import annotations

import pytest
import torch

from deepseek_optimizer import PagedCache, UnsupportedRequestError
from deepseek_optimizer.integration.bind.runtime import OptimizerWarning
from deepseek_optimizer.integration.compat import cache_name
from support.models import assert_close_rows


@pytest.fixture(autouse=True)
def _fresh_compiler():
    yield
    torch._dynamo.reset()


COMPILED = {
    "model": lambda model: torch.compile(model, backend="eager"),
    "forward": lambda model: torch.compile(model.forward, backend="eager"),
    "function around": lambda model: torch.compile(lambda ids: model(ids), backend="eager"),
    "inductor": torch.compile,
}


@pytest.mark.parametrize("how", COMPILED)
@torch.no_grad()
def test_a_compiled_model_still_uses_the_plan(pair, how):
    ids = pair.ids(9)
    compiled = COMPILED[how](pair.fast)
    for _ in range(2):
        made = compiled(ids)
        assert torch.equal(made.logits, pair.fast(ids).logits)
        assert isinstance(getattr(made, cache_name()), PagedCache)


@torch.no_grad()
def test_compiled_in_place_and_generate(fresh_pair):
    ids, options = fresh_pair.ids(9), {"max_new_tokens": 5, "do_sample": False}
    expected = fresh_pair.fast.generate(ids, **options)
    assert torch.equal(torch.compile(fresh_pair.fast, backend="eager").generate(ids, **options), expected)
    with pytest.warns(OptimizerWarning, match="torch.compile has no effect"):
        fresh_pair.fast.compile(backend="eager")
    assert torch.equal(fresh_pair.fast.generate(ids, **options), expected)
    assert_close_rows(fresh_pair.fast(ids).logits, fresh_pair.plain(ids).logits)


@torch.no_grad()
def test_fullgraph_is_rejected(pair):
    function = torch.compile(lambda ids: pair.fast(ids).logits + 1, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="an optimized model already runs a compiled plan"):
        function(pair.ids(9))
    with pytest.raises(RuntimeError, match="fullgraph=True"):
        torch.compile(pair.fast, backend="eager", fullgraph=True)(pair.ids(9))


def test_under_inference_mode_and_autocast(pair):
    ids = pair.ids(9)
    expected = pair.fast(ids).logits
    with torch.inference_mode():
        assert torch.equal(pair.fast(ids).logits, expected)
        tokens = pair.fast.generate(ids, max_new_tokens=5, do_sample=False)
    with torch.autocast("cpu", torch.bfloat16):  # autocast does not affect the plan
        assert torch.equal(pair.fast(ids).logits, expected)
        assert torch.equal(pair.fast.generate(ids, max_new_tokens=5, do_sample=False), tokens)


@torch.no_grad()
def test_transformers_own_forward_under_autocast(fresh_pair):
    ids = fresh_pair.ids(9)
    with torch.autocast("cpu", torch.bfloat16):
        made, expected = (m(ids, output_attentions=True).logits for m in (fresh_pair.fast, fresh_pair.plain))
    assert_close_rows(made.float(), expected.float(), 0.05)


@torch.no_grad()
def test_data_parallel(pair):
    ids = pair.ids(9, 9)
    assert torch.equal(torch.nn.DataParallel(pair.fast)(ids).logits, pair.fast(ids).logits)  # without GPUs it only delegates
    with pytest.raises(UnsupportedRequestError, match="one process per device"):
        pair.fast._replicate_for_data_parallel()
