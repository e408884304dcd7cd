"""The choice of a replica: the longest known prefix, within bounds of load; sessions stay."""

from __future__ import annotations

import random

import pytest

from deepseek_optimizer.ray.prefix_policy import PrefixPolicy
from deepseek_optimizer.ray.routing_header import Routing

IDLE = {"a": 0, "b": 0, "c": 0}


def test_the_longest_known_prefix_wins() -> None:
    policy = PrefixPolicy()
    policy.sent(Routing(None, ["1"]), "a")
    policy.sent(Routing(None, ["1", "2", "3"]), "b")
    policy.sent(Routing(None, ["1", "2"]), "c")
    assert policy.rank(Routing(None, ["1", "2", "3", "4"]), IDLE) == ["b", "c", "a"]
    # equally long: the one with less to do
    assert policy.rank(Routing(None, ["1", "2", "9"]), {"a": 0, "b": 1, "c": 0})[0] == "c"


def test_unknown_prompts_go_to_the_replica_with_the_least_to_do() -> None:
    assert PrefixPolicy().rank(Routing(None, ["1"]), {"a": 3, "b": 1, "c": 2}) == ["b", "c", "a"]


def test_equal_replicas_get_unknown_prompts_in_turns() -> None:
    policy, chosen = PrefixPolicy(), []
    for number in range(6):
        routing = Routing(None, [str(number)])
        chosen.append(policy.rank(routing, IDLE)[0])
        policy.sent(routing, chosen[-1])
    assert chosen == [*IDLE, *IDLE]


def test_a_replica_with_too_much_to_do_comes_last_whatever_it_knows() -> None:
    policy = PrefixPolicy(slack=1.25)
    policy.sent(Routing("session", ["1", "2"]), "a")
    # 12 requests of three replicas: a mean of 4 with this one, so 5 and one more are allowed
    assert policy.rank(Routing("session", ["1", "2"]), {"a": 5, "b": 4, "c": 2})[0] == "a"
    assert policy.rank(Routing("session", ["1", "2"]), {"a": 6, "b": 4, "c": 1}) == ["c", "b", "a"]


def test_a_session_stays_even_if_another_replica_knows_more() -> None:
    policy = PrefixPolicy()
    policy.sent(Routing("session", []), "a")
    policy.sent(Routing(None, ["1"]), "b")
    assert policy.rank(Routing("session", ["1"]), IDLE)[0] == "a"
    assert policy.rank(Routing("other", ["1"]), IDLE)[0] == "b"


def test_requests_that_stay_go_to_one_replica_whatever_its_load() -> None:
    policy, other = PrefixPolicy(), PrefixPolicy()
    names = [str(i) for i in range(60)]
    homes = {name: policy.rank(Routing(name, ["1"], stays=True), IDLE) for name in names}
    assert {home for [home] in homes.values()} == {"a", "b", "c"}
    assert homes == {name: other.rank(Routing(name, [], stays=True), {"c": 9, "b": 0, "a": 0}) for name in names}
    policy.sent(Routing("mine", [], stays=True), "a")
    policy.sent(Routing("mine", []), "b")  # a request that may go anywhere does not move it
    for more in range(50):
        assert policy.rank(Routing("mine", [], stays=True), {"a": 99, "b": 0, **{str(i): 0 for i in range(more)}}) == ["a"]
    policy.keep(["b", "c"])
    assert policy.rank(Routing("mine", [], stays=True), {"b": 0}) == ["b"]


def test_replicas_that_are_gone_are_forgotten() -> None:
    policy = PrefixPolicy()
    policy.sent(Routing("session", ["1", "2"]), "a")
    policy.sent(Routing(None, ["1"]), "b")
    policy.keep(["b", "c"])
    assert policy.rank(Routing("session", ["1", "2"]), {"b": 0, "c": 0}) == ["b", "c"]
    policy.sent(Routing("session", ["1"]), "c")
    assert policy.rank(Routing("session", []), {"b": 0, "c": 0})[0] == "c"
    assert policy.rank(Routing(None, ["1"]), {}) == []


def test_memory_is_bounded_by_forgetting_the_least_recently_used() -> None:
    policy = PrefixPolicy(keys=10, sessions=2)
    for i in range(30):
        policy.sent(Routing(str(i), ["first", str(i)]), "a")
    assert len(policy._known) <= 10 and len(policy._sessions) == 2
    assert policy.rank(Routing("28", ["first", "29"]), {"b": 0, "a": 0})[0] == "a"
    assert policy.rank(Routing("3", ["3"]), {"b": 0, "a": 1})[0] == "b"


@pytest.mark.parametrize("slack", [0.5, float("nan")])
def test_a_slack_below_one_is_refused(slack: float) -> None:
    with pytest.raises(ValueError, match="slack"):
        PrefixPolicy(slack=slack)


@pytest.mark.parametrize("replicas", [2, 5])
def test_chats_hit_their_prefixes_nearly_as_often_as_with_one_replica(replicas: int) -> None:
    """64 conversations that share a system prompt, in turns; each replica's cache is large enough."""
    random.seed(replicas)
    policy, known = PrefixPolicy(), [set() for _ in range(replicas)]
    busy: list[tuple[int, int]] = []  # (the time at which a request ends, its replica)
    hits = total = ideal = 0
    turns = [(turn, chat) for turn in range(8) for chat in random.sample(range(64), 64)]
    for now, (turn, chat) in enumerate(turns):
        busy = [entry for entry in busy if entry[0] > now]
        loads = {replica: sum(at == replica for _, at in busy) for replica in range(replicas)}
        keys = ["system", *(f"{chat}.{i}" for i in range(turn + 1))]
        best = policy.rank(Routing(None, keys), loads)[0]
        policy.sent(Routing(None, keys), best)
        hits += next((i for i, key in enumerate(keys) if key not in known[best]), len(keys))
        ideal += (turn + 1) if (turn or now) else 0
        known[best] |= set(keys)
        total += len(keys)
        busy.append((now + random.randint(10, 50), best))
    assert hits >= 0.9 * ideal
    assert max(sum(at == r for _, at in busy) for r in range(replicas)) <= 1.25 * (len(busy) + 1) / replicas + 2
