"""Documents, and a model that is a function: runs strategies without an engine."""

from __future__ import annotations

import random
from collections.abc import Callable

from deepseek_optimizer.longdoc.document import Document
from deepseek_optimizer.longdoc.material import Limits, Material
from deepseek_optimizer.longdoc.prompts import Prompts
from deepseek_optimizer.longdoc.split import split
from deepseek_optimizer.longdoc.strategy_protocol import Ask, Batch, Reply, Result, Work, advance

WORDS = [a + b for a in "bcdfglmnprst" for b in ("ander", "ollow", "intern", "umble", "essing", "arrow")]


def prose(sentences: int, seed: int = 0) -> str:
    """Sentences of made-up words, several per paragraph."""
    draw = random.Random(seed)
    made = [" ".join(draw.choices(WORDS, k=draw.randrange(4, 12))).capitalize() + "." for _ in range(sentences)]
    return "\n\n".join(" ".join(made[i : i + 4]) for i in range(0, sentences, 4)) + "\n"


def material(document: Document | str, tokenizer, *, max_length: int = 256, stride: int = 32, **limits) -> Material:
    document = document if isinstance(document, Document) else Document.of_texts(document)
    chunks = split(document, tokenizer, max_length, stride)
    return Material(document, chunks, Prompts(tokenizer), Limits(**{"room": 1024, "reply": 64, **limits}))


class Scripted:
    """Runs a strategy with replies computed from the prompt's text.

    Attributes:
        batches: the batches of prompts. prompts: the texts of all prompts.
    """

    def __init__(self, tokenizer, say: Callable[[str], str | Reply]) -> None:
        self.tokenizer, self.say = tokenizer, say
        self.batches: list[Batch] = []
        self.prompts: list[str] = []

    def run(self, work: Work) -> Result:
        step = advance(work)
        while isinstance(step, Batch):
            self.batches.append(step)
            step = advance(work, [self._reply(ask) for ask in step.asks])
        return step

    def _reply(self, ask: Ask) -> Reply:
        text = self.tokenizer.decode(ask.prompt)
        self.prompts.append(text)
        message = self.say(text)
        return message if isinstance(message, Reply) else Reply(message, read=len(ask.prompt), generated=len(message))
