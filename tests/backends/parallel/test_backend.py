"""What the leader's plans and stores have in common with those of other backends."""

from __future__ import annotations

import pytest

from deepseek_optimizer.backends.base import KvStore, Plan
from deepseek_optimizer.backends.parallel.backend import LeaderPlan, LeaderStore
from deepseek_optimizer.backends.parallel.stages import FirstPlan, FirstStore


def public(kind):
    return {name for name in vars(kind) if not name.startswith("_")}


@pytest.mark.parametrize("store", [LeaderStore, FirstStore])
def test_stores_have_what_others_have(store):
    assert public(KvStore) - set(dir(store)) == set()


@pytest.mark.parametrize("plan", [LeaderPlan, FirstPlan])
def test_plans_have_what_others_have(plan):
    assert public(Plan) - set(dir(plan)) == set()
