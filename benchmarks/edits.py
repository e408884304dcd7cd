"""Conversations for drafts: edits, whose answers repeat what was said before, and ordinary questions, whose answers do not.

SmolLM2 is a small model and edits badly what it is shown once. So each edit is the third of a conversation about one text:
asked for the next change, the model writes the text again, nearly as it stood in the answer before.
"""

from __future__ import annotations

from collections.abc import Iterator
from difflib import SequenceMatcher

Messages = list[dict[str, str]]

LIBRARY = """The committee met on Tuesday to discuss the new library. Mr. Harris said that the building would cost \
four million dollars and that it would take two years to build. Mrs. Chen asked whether the old library could stay \
open until then. Mr. Harris answered that it could, but that the reading room on the second floor would have to close \
for the whole spring. The committee thanked him and agreed to meet again on Tuesday, when the architect will show the \
plans."""

CHAIRS = """Dear Mr. Porter,

Thank you for your letter of 3 March. We have looked into the delay of your order, number 48213, and found that two of \
the six chairs were damaged on the way to our warehouse. New chairs have been ordered from the maker, and we expect \
them to arrive on 19 March. We will then send all six chairs to your address in Bristol at no cost to you.

Yours sincerely,
Anna Schmidt"""

WATER = """Dear neighbors,

The water in our street will be turned off on Monday from nine in the morning until three in the afternoon, since the \
pipe in front of number 12 has to be mended. Please fill a few bottles the evening before. If you need help, call Mrs. \
Walker at the town hall. The buses will stop at the school for the day.

Thank you for your patience,
Robert Green"""

CLUB = """The club has forty members. The new president is Mrs. Baker, and the treasurer is Mr. Lee. The club will buy \
a tent and two boats, which cost nine hundred pounds together. The summer trip goes to the lake, and the bus leaves on \
Sunday at eight in the morning from the church. Members who want to come should tell Mr. Lee by the end of May."""

RECIPE = """Wash the lentils and put them into a large pot with a litre of water. Add the onion, the carrots and a bay \
leaf, and cook them for thirty minutes. Meanwhile fry the bacon in a pan until it is crisp. When the lentils are soft, \
take out the bay leaf, add the bacon, and season the soup with salt, pepper and a spoon of vinegar. Serve the soup \
hot, with bread and butter."""

# What is edited, and (old, new) of each change.
EDITS = (
    (LIBRARY, (("Tuesday", "Friday"), ("Harris", "Adams"), ("library", "school"))),
    (CHAIRS, (("Mr. Porter", "Mrs. Jones"), ("chairs", "tables"), ("Bristol", "Leeds"))),
    (WATER, (("Monday", "Thursday"), ("Walker", "Clark"), ("school", "station"))),
    (CLUB, (("Baker", "Young"), ("tent", "van"), ("lake", "sea"))),
    (RECIPE, (("lentils", "beans"), ("bacon", "ham"), ("litre", "quart"))),
)

QUESTIONS = (
    "What is the capital of France, and what is it known for?",
    "Explain how a steam engine works.",
    "Why is the sky blue?",
    "Write a short story about a fox and a crow.",
    "Give me three tips for learning a language.",
    "How do I make tea?",
    "Who was Marie Curie?",
    "What should I pack for a week in the mountains?",
)


def edits() -> Iterator[tuple[Messages, str]]:
    """(conversation that ends with a request for a change, the text as it stood before that change)."""
    for text, changes in EDITS:
        messages: Messages = []
        for number, (old, new) in enumerate(changes):
            asked = f"Write {new} in place of {old}"
            messages.append({"role": "user", "content": f"{asked}." if number else f"{asked} in this text:\n\n{text}"})
            if number < len(changes) - 1:
                text = text.replace(old, new)
                messages.append({"role": "assistant", "content": text})
        yield messages, text


def questions() -> Iterator[Messages]:
    for question in QUESTIONS:
        yield [{"role": "user", "content": question}]


def kept(before: str, answer: str) -> tuple[int, int]:
    """(words of the answer that stood in the text before it, in order; all its words)."""
    a, b = before.split(), answer.split()
    same = sum(block.size for block in SequenceMatcher(None, a, b, autojunk=False).get_matching_blocks())
    return same, len(b)
