"""Conversations longer than the context: which messages stay, and that the cut does not move with every turn."""

import random

import pytest

from deepseek_optimizer import RequestError
from deepseek_optimizer.chat.fit import fit


def tokens(messages):
    return 3 + sum(4 + len(m["content"]) for m in messages)


def weight(message):
    return len(message["content"])


def dialogue(rng, turns, longest=60):
    result = [{"role": "system", "content": "s" * 20}]
    for n in range(turns):
        result.append({"role": "user", "content": f"{n}:" + "q" * rng.randrange(longest)})
        result.append({"role": "assistant", "content": f"{n}:" + "a" * rng.randrange(longest)})
    return result


def test_short_conversations_are_unchanged():
    messages = dialogue(random.Random(0), 3)
    assert (
        fit(messages, tokens, weight, 10_000).messages == messages
        and fit(messages, tokens, weight, tokens(messages)).dropped == 0
    )


@pytest.mark.parametrize("seed", range(5))
def test_the_cut_stays_for_many_turns(seed):
    """As the conversation grows, the number of dropped messages grows in few steps; system and pinned messages stay."""
    rng = random.Random(seed)
    messages = dialogue(rng, 80)
    messages[7]["pinned"] = True
    budget, before, changes = 1_000, 0, 0
    for turn in range(2, len(messages), 2):
        actual = fit([*messages[:turn], {"role": "user", "content": "now"}], tokens, weight, budget)
        assert tokens(actual.messages) <= budget and actual.messages[-1]["content"] == "now"
        assert actual.messages[0]["role"] == "system" and (turn <= 7 or messages[7] in actual.messages)
        assert actual.dropped + len(actual.messages) == turn + 1 and actual.dropped >= before
        if actual.dropped:
            assert tokens(actual.messages) >= 0.4 * budget  # no more than necessary is dropped
        changes += actual.dropped != before
        before = actual.dropped
    assert 3 <= changes <= 25  # in 79 turns


def test_the_remaining_messages_begin_with_a_question():
    messages = dialogue(random.Random(1), 40)
    actual = fit([*messages, {"role": "user", "content": "now"}], tokens, weight, 500)
    assert actual.dropped and actual.messages[1]["role"] == "user"


def test_required_messages_must_fit():
    messages = [{"role": "system", "content": "s" * 900}, *dialogue(random.Random(0), 3)[1:]]
    with pytest.raises(RequestError, match="messages"):
        fit(messages, tokens, weight, 500)
    with pytest.raises(RequestError, match="only 100 fit"):
        fit([{"role": "user", "content": "x" * 200}], tokens, weight, 100)
