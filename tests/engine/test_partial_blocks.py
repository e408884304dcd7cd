"""A text that continues an earlier one computes only what is new: the last, partly filled block is reused too."""

from __future__ import annotations

import random

import pytest

from deepseek_optimizer.engine.request import Request
from support.engine_runs import endless, run, text
from support.mock_model import CACHE_KINDS, blocks_in_use, expected_of, make_core


@pytest.mark.parametrize("kind", CACHE_KINDS)
@pytest.mark.parametrize("length", [31, 32, 33, 47, 62, 63, 64, 65, 95])
def test_a_conversation(kind, length):
    core, draw = make_core(**CACHE_KINDS[kind]), random.Random(length)
    said = text(1, length)
    for turn in range(5):
        before = len(said) - 1 if turn else 0  # tokens of the earlier turns but the last one, which was not processed
        said += text(100 + turn, draw.randrange(1, 40)) if turn else []
        answer = run(core, Request(list(said), endless(7), id="1"))["1"]
        assert answer.token_ids == expected_of(kind, said, 7)
        assert answer.cached_tokens == (before if before > 32 else 0)
        said += answer.token_ids
    assert blocks_in_use(core) == 0 and core.prefix.unused == len(core.prefix)  # every block has one user, the cache


@pytest.mark.parametrize("kind", CACHE_KINDS)
def test_two_texts_that_continue_alike(kind):
    core, first = make_core(**CACHE_KINDS[kind]), text(1, 100)
    first += run(core, Request(list(first), endless(10), id="1"))["1"].token_ids
    turns = [[*first, *text(n, 20)] for n in (2, 3)]
    answers = run(core, *(Request(turn, endless(5), id=str(n), client=str(n)) for n, turn in enumerate(turns)))
    assert [answers[str(n)].token_ids for n in range(2)] == [expected_of(kind, turn) for turn in turns]
    assert sorted(a.cached_tokens for a in answers.values()) == [96, 109]  # the block is written into: only one can have it
    assert run(core, Request([*first, *text(4, 20)], endless(5), id="1"))["1"].cached_tokens == 96


def test_what_the_partial_block_does_not_hold():
    core, first = make_core(), text(1, 100)
    answer = run(core, Request(list(first), endless(10), id="1"))["1"].token_ids
    other = [*first, *answer[:4], (answer[4] + 1) % 60, *text(2, 20)]  # differs within the block
    assert run(core, Request(other, endless(5), id="1"))["1"].cached_tokens == 96
    short = [*first, *answer[:5]]  # ends before the block's last token
    assert run(core, Request(short, endless(5), id="1"))["1"].cached_tokens == 96


def test_salts_and_embeddings_share_nothing():
    core, first = make_core(), text(1, 100)
    first += run(core, Request(list(first), endless(10), salt="a", id="1"))["1"].token_ids
    assert run(core, Request([*first, 1], endless(5), salt="b", id="1"))["1"].cached_tokens == 0
    assert run(core, Request([*first, 1], endless(5), salt="a", id="1"))["1"].cached_tokens == 109
    run(core, Request(text(3, 50), endless(1), embed=True, id="1"))
    assert run(core, Request([*text(3, 50), 1], endless(1), id="1"))["1"].cached_tokens == 0


def test_a_cut_off_answer_is_continued():
    """Blocks that hold more than the text, such as rejected drafts and tokens after a stop token, are not reused beyond it."""
    for count in range(1, 9):
        core, first = make_core(), text(1, 70)
        first += run(core, Request(list(first), endless(count), id="1"))["1"].token_ids
        answer = run(core, Request([*first, 5], endless(6), id="1"))["1"]
        assert answer.cached_tokens == 69 + count and answer.token_ids == expected_of("full", [*first, 5], 6)


def test_eviction_and_clearing():
    core, first = make_core(slots=10), text(1, 100)
    first += run(core, Request(list(first), endless(10), id="1"))["1"].token_ids
    for n in range(20):
        run(core, Request(text(50 + n, 300), endless(3), id="1"))
    assert run(core, Request([*first, 1], endless(5), id="1"))["1"].cached_tokens in (0, 32, 64, 96)
    core.release_memory()
    assert blocks_in_use(core) == 0 and len(core.prefix) == 0
