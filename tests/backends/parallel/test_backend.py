"""What the leader's plans and stores have in common with those of other backends."""

from __future__ import annotations

from deepseek_optimizer.backends.base import KvStore, Plan
from deepseek_optimizer.backends.parallel.backend import LeaderPlan, LeaderStore


def public(kind):
    return {name for name in vars(kind) if not name.startswith("_")}


def test_stores_and_plans_have_what_others_have():
    assert public(KvStore) - set(dir(LeaderStore)) == set()
    assert public(Plan) - set(dir(LeaderPlan)) == set()
