"""What the leader's plans and stores have in common with those of other backends."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from deepseek_optimizer.backends.base import KvStore, Plan
from deepseek_optimizer.backends.parallel.backend import LeaderPlan, LeaderStore
from deepseek_optimizer.backends.parallel.stages import FirstPlan, FirstStore
from deepseek_optimizer.errors import RankLostError


def public(kind):
    return {name for name in vars(kind) if not name.startswith("_")}


@pytest.mark.parametrize("store", [LeaderStore, FirstStore])
def test_stores_have_what_others_have(store):
    assert public(KvStore) - set(dir(store)) == set()


@pytest.mark.parametrize("plan", [LeaderPlan, FirstPlan])
def test_plans_have_what_others_have(plan):
    assert public(Plan) - set(dir(plan)) == set()


class Own:
    """This process's store."""

    num_blocks = block_bytes = saved_bytes = 4

    def __init__(self):
        self.released = []

    def release(self, from_block):
        self.released.append(from_block)


class Ended:
    """The other processes, one of which has ended."""

    group = SimpleNamespace(ranks=2, ranks_here=2)
    ranks = 2

    def together(self, *_):
        raise RankLostError("rank 1 of 2")

    def drop(self, number):
        pass


@pytest.mark.parametrize("kind", [LeaderStore, FirstStore])
def test_memory_is_released_if_the_others_have_ended(kind):
    """An arena releases it whenever its last sequence is freed, also at the end of a program."""
    own = Own()
    store = LeaderStore(1, own, Ended()) if kind is LeaderStore else object.__new__(FirstStore)
    if kind is FirstStore:
        store.own, store.number, store.links = own, 1, Ended()
    store.release(0)
    assert own.released == [0]
