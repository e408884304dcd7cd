"""Generated samples: of the requested length, the same for the same seed, with answers at the right places."""

from __future__ import annotations

import re

import pytest

from deepseek_optimizer.bench.long.generate import _fit, ids_of, make_sample
from deepseek_optimizer.bench.long.material import paragraphs
from deepseek_optimizer.bench.long.sample import score
from deepseek_optimizer.bench.long.tasks import COMMON, FREQUENT, HOPS, RARE, TASKS, Draft
from deepseek_optimizer.errors import ConfigError

SEEDS = range(4)


def _times(text, word):
    return len(re.findall(rf"\b{re.escape(word)}\b", text))


def _text(sample):
    """The text between the instruction and the question, which has no empty line."""
    return sample.prompt.split("\n\n")[1]


@pytest.fixture(scope="module")
def samples(byte_tokenizer):
    """Task -> samples of 6000 tokens, one per seed."""
    return {task: [make_sample(task, byte_tokenizer, 6000, seed=seed) for seed in SEEDS] for task in TASKS}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("tokens", [1500, 4096, 6001, 16_000])
def test_samples_have_the_requested_length(byte_tokenizer, task, tokens):
    sample = make_sample(task, byte_tokenizer, tokens)
    longest_word = max(len(word) + 1 for paragraph in paragraphs() for word in paragraph)
    assert tokens - max(0.01 * tokens, longest_word) < sample.tokens <= tokens
    assert len(ids_of(byte_tokenizer, sample.prompt)) == sample.tokens > len(byte_tokenizer(sample.prompt)["input_ids"])


def test_the_longest_prompt_that_fits_between_long_words():
    def body(count):
        return " ".join(["long" * 50] * count)

    draft = Draft("Read.", "What?", body, ("x",))
    prompt, length = _fit(len, draft, 1500, 3, "single")
    assert length == len(prompt) == len(draft.prompt(7)) <= 1500 < len(draft.prompt(8))
    with pytest.raises(ConfigError, match="too few"):
        _fit(len, draft, 100, 3, "single")


@pytest.mark.parametrize("task", TASKS)
def test_samples_depend_on_the_seed(byte_tokenizer, samples, task):
    assert make_sample(task, byte_tokenizer, 6000, seed=2) == samples[task][2]
    assert len({sample.prompt for sample in samples[task]}) == len({sample.answers for sample in samples[task]}) == len(SEEDS)


@pytest.mark.parametrize("task", TASKS)
def test_correct_answers_score_1_and_empty_ones_0(samples, task):
    for one, other in zip(samples[task], reversed(samples[task]), strict=True):
        assert one.task == task and len(set(one.answers)) == len(one.answers)
        assert score(one.answers, "They are " + " and ".join(one.answers).upper() + ".") == 1
        assert score(one.answers, "") == score(other.answers, " ".join(one.answers)) == 0


def test_partial_answers_give_partial_scores():
    assert score(("1234567", "Abc"), "I only know abc") == 0.5


@pytest.mark.parametrize("task, count", [("single", 1), ("multikey", 1), ("multivalue", 4), ("multiquery", 4), ("qa", 1)])
def test_facts_occur_once(samples, task, count):
    for sample in samples[task]:
        assert len(sample.answers) == count
        assert all(sample.prompt.count(answer) == 1 for answer in sample.answers), "also as a part of other words"


@pytest.mark.parametrize("task, count", [("multikey", 1), ("multiquery", 4)])
def test_prompts_contain_distractor_codes(samples, task, count):
    for sample in samples[task]:
        codes = dict(re.findall(r"storage code of (\w+) is (\d{7})\.", _text(sample)))
        requested = [name for name in codes if _times(sample.prompt.split("\n\n")[2], name)]
        assert len(requested) == count and len(codes) >= count + 4
        assert sorted(codes[name] for name in requested) == sorted(sample.answers)


def test_names_with_several_values(samples):
    for sample in samples["multivalue"]:
        actual = re.findall(r"storage code of (\w+) is (\d{7})\.", _text(sample))
        assert len({name for name, _ in actual}) == 1 and {code for _, code in actual} == set(sample.answers)


def test_chains_of_variables(samples):
    for sample in samples["variables"]:
        given = re.findall(r"Let ([A-Z]{5}) be (\w+)\.", _text(sample))
        assert len(given) == 3 * HOPS
        value = re.search(r"value (\d{7})", sample.prompt.split("\n\n")[2])[1]
        known = {}
        for name, source in given:  # in the order of the text: nothing is used before it is defined
            known[name] = known.get(source, source)
        assert tuple(name for name, v in known.items() if v == value) == sample.answers and len(set(known.values())) == 3
        assert [sample.prompt.count(name) for name in sample.answers] == [2] * (HOPS - 1) + [1]


def test_common_words_occur_most_often(samples):
    for sample in samples["common"]:
        words = _text(sample).split()
        counts = sorted(((words.count(word), word) for word in set(words)), reverse=True)
        assert {word for _, word in counts[:COMMON]} == set(sample.answers)
        assert counts[COMMON - 1][0] >= 2 * RARE and counts[COMMON][0] <= RARE


def test_frequent_words_have_the_highest_counts(samples):
    for sample in samples["frequent"]:
        words = _text(sample).split()
        counts = sorted(((words.count(word), word) for word in set(words)), reverse=True)
        assert tuple(word for _, word in counts[:FREQUENT]) == sample.answers
        assert counts[FREQUENT - 1][0] >= 1.5 * counts[FREQUENT][0]


def test_questions_name_one_of_several_people(samples):
    for sample in samples["qa"]:
        first, last = re.search(r"(?:Where was|Where did|Where does) (\w+) (\w+)", sample.prompt.split("\n\n")[2]).groups()
        message = [s for s in re.findall(r"[A-Z]\w+ [A-Z]\w+ (?:was born|went|has a house)[^.]*\.", _text(sample))]
        theirs = [s for s in message if s.startswith(f"{first} {last} ")]
        assert len(theirs) == 3 and sum(sample.answers[0] in s for s in theirs) == 1
        assert sum(first in s for s in message) > 3 and sum(f" {last} " in s for s in message) > 3 and len(message) >= 15


@pytest.mark.parametrize("task", ["single", "multikey", "multivalue", "multiquery", "variables", "qa"])
@pytest.mark.parametrize("depth", [0.0, 0.6, 1.0])
def test_depth_is_the_position_of_the_answer(byte_tokenizer, task, depth):
    sample = make_sample(task, byte_tokenizer, 16_000, depth=depth)
    text = _text(sample)
    assert sample.depth == depth
    assert text.index(sample.answers[0]) / len(text) == pytest.approx(depth, abs=0.1)


@pytest.mark.parametrize("task, tokens, message", [("none", 4096, "use one of single, multikey"), ("qa", 500, "too few")])
def test_impossible_samples_are_errors(byte_tokenizer, task, tokens, message):
    with pytest.raises(ConfigError, match=message):
        make_sample(task, byte_tokenizer, tokens)


def test_tokenizers_without_a_template(byte_tokenizer):
    import copy

    plain = copy.deepcopy(byte_tokenizer)
    plain.chat_template = None
    sample = make_sample("single", plain, 2048)
    assert 2028 <= sample.tokens == len(plain(sample.prompt)["input_ids"]) <= 2048
