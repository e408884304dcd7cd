"""The choice of a replica: the longest known prefix, within bounds of load; sessions stay."""

from __future__ import annotations

import random

import pytest

from deepseek_optimizer.ray.prefix_policy import PrefixPolicy

IDLE = {"a": 0, "b": 0, "c": 0}


def test_the_longest_known_prefix_wins() -> None:
    policy = PrefixPolicy()
    policy.sent(["1"], None, "a")
    policy.sent(["1", "2", "3"], None, "b")
    policy.sent(["1", "2"], None, "c")
    assert policy.rank(["1", "2", "3", "4"], None, IDLE) == ["b", "c", "a"]
    assert policy.rank(["1", "2", "9"], None, {"a": 0, "b": 1, "c": 0})[0] == "c"  # equally long: the one with less to do


def test_unknown_prompts_go_to_the_replica_with_the_least_to_do() -> None:
    assert PrefixPolicy().rank(["1"], None, {"a": 3, "b": 1, "c": 2}) == ["b", "c", "a"]


def test_a_replica_with_too_much_to_do_comes_last_whatever_it_knows() -> None:
    policy = PrefixPolicy(slack=1.25)
    policy.sent(["1", "2"], "session", "a")
    # 12 requests of three replicas: a mean of 4 with this one, so 5 and one more are allowed
    assert policy.rank(["1", "2"], "session", {"a": 5, "b": 4, "c": 2})[0] == "a"
    assert policy.rank(["1", "2"], "session", {"a": 6, "b": 4, "c": 1}) == ["c", "b", "a"]


def test_a_session_stays_even_if_another_replica_knows_more() -> None:
    policy = PrefixPolicy()
    policy.sent([], "session", "a")
    policy.sent(["1"], None, "b")
    assert policy.rank(["1"], "session", IDLE)[0] == "a"
    assert policy.rank(["1"], "other", IDLE)[0] == "b"


def test_replicas_that_are_gone_are_forgotten() -> None:
    policy = PrefixPolicy()
    policy.sent(["1", "2"], "session", "a")
    policy.sent(["1"], None, "b")
    policy.keep(["b", "c"])
    assert policy.rank(["1", "2"], "session", {"b": 0, "c": 0}) == ["b", "c"]
    policy.sent(["1"], "session", "c")
    assert policy.rank([], "session", {"b": 0, "c": 0})[0] == "c"
    assert policy.rank(["1"], None, {}) == []


def test_memory_is_bounded_by_forgetting_the_least_recently_used() -> None:
    policy = PrefixPolicy(keys=10, sessions=2)
    for i in range(30):
        policy.sent(["first", str(i)], str(i), "a")
    assert len(policy._known) <= 10 and len(policy._sessions) == 2
    assert policy.rank(["first", "29"], "28", {"b": 0, "a": 0})[0] == "a"
    assert policy.rank(["3"], "3", {"b": 0, "a": 1})[0] == "b"


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
        best = policy.rank(keys, None, loads)[0]
        policy.sent(keys, None, best)
        hits += next((i for i, key in enumerate(keys) if key not in known[best]), len(keys))
        ideal += (turn + 1) if (turn or now) else 0
        known[best] |= set(keys)
        total += len(keys)
        busy.append((now + random.randint(10, 50), best))
    assert hits >= 0.9 * ideal
    assert max(sum(at == r for _, at in busy) for r in range(replicas)) <= 1.25 * (len(busy) + 1) / replicas + 2
