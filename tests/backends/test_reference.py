"""The reference backend against Transformers' own logits, in fp32."""

from __future__ import annotations

import pytest

from deepseek_optimizer.backends.reference import ReferenceBackend
from deepseek_optimizer.models import build_graph
from support.models import CASES, assert_close_rows, random_ids, random_model, transformers_logits, weights_of
from support.steps import runner


@pytest.mark.parametrize("case", CASES)
def test_equals_transformers(case: str) -> None:
    model = random_model(CASES[case]())
    ids = random_ids(model.config, 77)
    run = runner(ReferenceBackend(), build_graph(model.config), weights_of(model))
    expected = transformers_logits(model, ids)
    assert_close_rows(run.logits(ids), expected)
    assert_close_rows(run.logits(ids, chunks=[1, 31, 2, 33]), expected)
