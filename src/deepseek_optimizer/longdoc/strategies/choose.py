"""Which strategy answers: by the document's length, what the model can take, the task and the question.

What fits is read whole: that is exact. Else what is asked of the whole document (a summary, data, "list all ...") is asked of
each chunk, and any other question of the chunks that have its words. A window is only taken where it was asked for: it reads
everything and remembers the end.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from ...errors import ConfigError, RequestError
from ..material import Material
from ..tasks import Extraction, Question, Summary, Task
from ..work import Work
from .map_reduce import map_reduce
from .retrieve import found, retrieve
from .whole import fits, whole
from .window import window

_WORK: dict[str, Callable[[Any, Material, str], Work]] = {
    "whole": whole,
    "window": window,
    "map_reduce": map_reduce,
    "retrieve": retrieve,
}
STRATEGIES = tuple(_WORK)
# Questions whose answer no few passages hold, in the languages that most readers have.
_OF_ALL = re.compile(
    r"\b(?:summar(?:y|i[sz]e|ies)|tl;?dr|overview|outline|gist|table of contents|overall|throughout|as a whole"
    r"|(?:main|key|central) (?:points?|ideas?|themes?|topics?|arguments?|takeaways?)"
    r"|how many\b.*\b(?:in total|in all|altogether)"
    r"|(?:list|name|enumerate|find|give|show|collect|what are)(?: me)? (?:all|every|each)"
    r"|what (?:is|are|does) (?:this|the|these) (?:document|book|text|report|paper|article|story|file|log|repository|code)s?"
    r"(?: about| say| contain| cover)?\s*\??$"
    r"|zusammenfass\w*|fasse?\b.*\bzusammen|worum geht|überblick|insgesamt|résum\w*|resum(?:e|en|a|ir)\b|riassum\w*)"
    r"|总结|概括|摘要|概述|主要内容|要約|概要",
    re.IGNORECASE,
)


def choose(task: Task, material: Material) -> tuple[str, str]:
    """The strategy's name, and why it is the one."""
    tokens, room = material.tokens, material.limits.room
    if fits(task, material):
        return "whole", f"its {tokens:,} tokens fit the {room:,} that the model's context and cache have"
    longer = f"its {tokens:,} tokens are more than the {room:,} that the model's context and cache have"
    if isinstance(task, Summary):
        return "map_reduce", f"{longer}, and a summary is of all of it"
    if isinstance(task, Extraction):
        return "map_reduce", f"{longer}, and data may stand anywhere in it"
    if _OF_ALL.search(task.text):
        return "map_reduce", f"{longer}, and the question is about all of it"
    if not found(task, material):
        return "map_reduce", f"{longer}, and no chunk has a word of the question"
    return "retrieve", f"{longer}, and the question's words tell where to look"


def answer_by(task: Task, material: Material, strategy: str = "auto") -> Work:
    """The work of answering.

    Args:
        strategy: one of STRATEGIES, or "auto": `choose` says which.

    Raises:
        ConfigError: there is no such strategy.
        RequestError: the one that was asked for cannot do this task on this document; the message names the remedy. Also when
            the work begins: a chunk that does not fit.
    """
    check_name(strategy)
    if not material.chunks:
        raise RequestError("document", "has no text; give a file with some")
    if strategy == "auto":
        name, reason = choose(task, material)
    else:
        _check(task, material, strategy)
        name, reason = strategy, "it was asked for"
    return _WORK[name](task, material, reason)


def check_name(strategy: str) -> None:
    """Raises ConfigError for a strategy that does not exist; "auto" does."""
    if strategy != "auto" and strategy not in _WORK:
        raise ConfigError(f"strategy: there is no {strategy!r}; there are auto, {', '.join(STRATEGIES)}")


def _check(task: Task, material: Material, strategy: str) -> None:
    if strategy == "whole" and not fits(task, material):
        raise RequestError(
            "strategy",
            f"whole: the document has {len(material.ids):,} tokens, and with the task and a reply they are more than the "
            f"{material.limits.room:,} that the model's context and cache have; take map_reduce, or retrieve for a question",
        )
    if strategy == "window" and material.limits.window is None:
        raise RequestError("strategy", "window: this engine has none; start it with one, or take map_reduce")
    if strategy == "retrieve":
        if not isinstance(task, Question | Extraction):
            raise RequestError("strategy", "retrieve: a summary is of the whole document; take map_reduce")
        if not found(task, material):
            raise RequestError("question", "none of its words stands in the document; use words that do, or take map_reduce")
