"""The tasks: the facts hidden in the text, and the question."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice

from .material import Filler, made_up, names, numbers, variables

COMMON, FREQUENT = 10, 3  # number of words asked for
RARE = 3  # occurrences of the other words of the list
HOPS = 5  # number of variables in a chain


@dataclass(frozen=True)
class Draft:
    """A sample whose length is not fixed yet.

    Attributes:
        instruction, question: before and after the text.
        body: number of words -> the text; deterministic.
        answers, depth: as in `Sample`.
    """

    instruction: str
    question: str
    body: Callable[[int], str]
    answers: tuple[str, ...]
    depth: float | None = None

    def prompt(self, words: int) -> str:
        return f"{self.instruction}\n\n{self.body(words)}\n\n{self.question}\nAnswer:"


Facts = Sequence[tuple[float, str]]  # depth from 0 to 1, sentence
Task = Callable[[random.Random, float, int], Draft]  # random generator, depth, approximate number of words

_CODES = "Codes of places are hidden in the following text. Keep them in mind; you will be asked for them."


def single(rng: random.Random, depth: float, words: int) -> Draft:
    """A single fact in prose."""
    return _codes(rng, [depth], 1, others=0)


def multikey(rng: random.Random, depth: float, words: int) -> Draft:
    """One fact among similar ones."""
    return _codes(rng, [depth], 1, others=_distractors(words))


def multivalue(rng: random.Random, depth: float, words: int) -> Draft:
    """Four facts about one name."""
    return _codes(rng, [depth, rng.random(), rng.random(), rng.random()], 1, others=0)


def multiquery(rng: random.Random, depth: float, words: int) -> Draft:
    """Four facts, all of them asked for, among similar ones."""
    return _codes(rng, [depth, rng.random(), rng.random(), rng.random()], 4, others=_distractors(words))


def _distractors(words: int) -> int:
    return max(4, words // 250)


def _codes(rng: random.Random, depths: Sequence[float], asked: int, others: int) -> Draft:
    """Codes at `depths`, alternating between `asked` places; and codes of `others` more places."""
    places, codes = names(rng), numbers(rng)
    wanted = list(islice(places, asked))
    answers = tuple(islice(codes, len(depths)))
    article = "the" if len(depths) == asked else "a"
    facts = [
        (depth, _code(article, wanted[i % asked], code)) for i, (depth, code) in enumerate(zip(depths, answers, strict=True))
    ]
    facts += [(rng.random(), _code("the", next(places), next(codes))) for _ in range(others)]
    if len(depths) == 1:
        question = f"What is the storage code of {wanted[0]}? Give the code alone."
    elif asked == 1:
        question = f"What are all {len(depths)} storage codes of {wanted[0]}? List them, with commas between."
    else:
        question = f"What are the storage codes of {', '.join(wanted)}? List them in this order, with commas between."
    return _in_prose(rng, _CODES, facts, question, answers, depths[0])


def _code(article: str, place: str, code: str) -> str:
    return f"Note well: {article} storage code of {place} is {code}."


def variable_tracking(rng: random.Random, depth: float, words: int) -> Draft:
    """A chain of variables, each assigned the previous one, among similar chains."""
    drawn, values = variables(rng), numbers(rng)
    facts: list[tuple[float, str]] = []
    chains = []
    for first in (depth, rng.random() / 2, rng.random() / 2):
        members, value = list(islice(drawn, HOPS)), next(values)
        depths = sorted([first, *(rng.uniform(first, 1) for _ in members[1:])])
        given = zip(depths, members, [value, *members], strict=False)
        facts += [(place, f"Let {name} be {source}.") for place, name, source in given]
        chains.append((members, value))
    answers, value = chains[0]
    instruction = "Variables are given values in the following text, some by way of other variables. Keep track of them."
    question = f"Which {HOPS} variables have the value {value}, given directly or by way of other variables? List their names."
    return _in_prose(rng, instruction, facts, question, tuple(answers), depth)


def question_answering(rng: random.Random, depth: float, words: int) -> Draft:
    """Facts about one person, among other people with a similar name."""
    drawn, kinds = names(rng), ("was born in", "went to school in", "has a house in")
    first, last = next(drawn), next(drawn)
    kind = rng.randrange(len(kinds))
    people = [(first, last)]
    for i in range(max(4, words // 500)):
        people.append(((first, next(drawn)), (next(drawn), last), (next(drawn), next(drawn)))[i % 3])
    facts, answer = [], ""
    for number, (one, other) in enumerate(people):
        for k, said in enumerate(kinds):
            place = next(drawn)
            asked = number == 0 and k == kind
            answer = place if asked else answer
            facts.append((depth if asked else rng.random(), f"{one} {other} {said} {place}."))
    question = (
        f"Where was {first} {last} born?",
        f"Where did {first} {last} go to school?",
        f"Where does {first} {last} have a house?",
    )
    instruction = "The following text tells among other things where people live. Answer the question after it from the text."
    return _in_prose(rng, instruction, facts, f"{question[kind]} Give the place alone.", (answer,), depth)


def common_words(rng: random.Random, depth: float, words: int) -> Draft:
    """`COMMON` words that occur often in a list, among others that occur at most `RARE` times."""
    drawn = made_up(rng, syllables=3)
    answers = tuple(islice(drawn, COMMON))
    times = max(2 * RARE, min(30, words // (4 * COMMON)))
    rare: list[str] = []
    order = rng.random()

    def body(count: int) -> str:
        left = max(0, count - COMMON * times)
        rare.extend(islice(drawn, max(0, -(-left // RARE) - len(rare))))
        return _shuffled([*answers] * times + [rare[i // RARE] for i in range(left)], order)

    instruction = "The following is a list of words. Some stand there often, most of them seldom."
    question = f"Which {COMMON} words stand most often in the list? Name them, with commas between."
    return Draft(instruction, question, body, answers)


def frequent_words(rng: random.Random, depth: float, words: int) -> Draft:
    """The `FREQUENT` most frequent words, with frequencies that follow Zipf's law: r^-2 for rank r."""
    ranked = list(islice(made_up(rng), 400))
    share = sum(rank**-2 for rank in range(1, len(ranked) + 1))
    order = rng.random()

    def body(count: int) -> str:
        return _shuffled([w for rank, w in enumerate(ranked, 1) for _ in range(round(count / share * rank**-2))], order)

    instruction = "The following text is in an unknown language, and some of its words are more frequent than others."
    question = f"Which {FREQUENT} words are the most frequent in the text? Name them, with commas between."
    return Draft(instruction, question, body, tuple(ranked[:FREQUENT]))


def _shuffled(words: list[str], order: float) -> str:
    random.Random(order).shuffle(words)
    return " ".join(words)


def _in_prose(
    rng: random.Random, instruction: str, facts: Facts, question: str, answers: tuple[str, ...], depth: float
) -> Draft:
    """Inserts facts as separate sentences between those of the prose."""
    filler, ordered = Filler(rng), sorted(facts, key=lambda fact: fact[0])

    def body(count: int) -> str:
        words = filler.words(count)
        ends = [0, *(i for i, word in enumerate(words, 1) if word.endswith("."))]
        parts, begin = [], 0
        for place, sentence in _placed(ordered, ends, count):
            parts += [*words[begin:place], sentence]
            begin = place
        return " ".join(parts + words[begin:])

    return Draft(instruction, question, body, answers, depth)


def _placed(facts: Facts, ends: Sequence[int], count: int) -> list[tuple[int, str]]:
    """Positions of the facts: each after the last sentence that ends before its depth."""
    placed, i = [], 0
    for depth, sentence in facts:
        while i + 1 < len(ends) and ends[i + 1] <= depth * count:
            i += 1
        placed.append((ends[i], sentence))
    return placed


TASKS: dict[str, Task] = {
    "single": single,
    "multikey": multikey,
    "multivalue": multivalue,
    "multiquery": multiquery,
    "variables": variable_tracking,
    "common": common_words,
    "frequent": frequent_words,
    "qa": question_answering,
}
