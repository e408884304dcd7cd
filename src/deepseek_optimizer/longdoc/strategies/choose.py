"""Chooses a strategy by the document's length, the model's limits, the task and the question.

A document that fits is read whole, which is exact. Otherwise, tasks about the whole document (a summary, extraction, "list all
...") are run on each chunk, and other questions on the chunks that contain their words. A window is used only on request: it
reads everything but retains only the end.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from ...errors import ConfigError, RequestError
from ..material import Material
from ..strategy_protocol import Work
from ..tasks import Extraction, Question, Summary, Task
from .map_reduce import map_reduce
from .retrieve import matching_chunks, retrieve
from .whole import fits, whole
from .window import window

_WORK: dict[str, Callable[[Any, Material, str], Work]] = {
    "whole": whole,
    "window": window,
    "map_reduce": map_reduce,
    "retrieve": retrieve,
}
STRATEGIES = tuple(_WORK)
# Questions that a few passages cannot answer, in the most common languages.
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
    """The strategy's name, and the reason for it."""
    tokens, room = material.tokens, material.limits.room
    if fits(task, material):
        return "whole", f"its {tokens:,} tokens fit into the model's context and cache ({room:,})"
    longer = f"its {tokens:,} tokens exceed the model's context and cache ({room:,})"
    if isinstance(task, Summary):
        return "map_reduce", f"{longer}, and a summary covers all of it"
    if isinstance(task, Extraction):
        return "map_reduce", f"{longer}, and data may occur anywhere in it"
    if _OF_ALL.search(task.text):
        return "map_reduce", f"{longer}, and the question is about all of it"
    if not matching_chunks(task, material):
        return "map_reduce", f"{longer}, and no chunk contains a word of the question"
    return "retrieve", f"{longer}, and the question's words select the chunks"


def answer_by(task: Task, material: Material, strategy: str = "auto") -> Work:
    """The work of answering.

    Args:
        strategy: one of STRATEGIES, or "auto" to `choose` one.

    Raises:
        ConfigError: the strategy is unknown.
        RequestError: the requested strategy cannot perform this task on this document; the message names the remedy. Also when
            the work starts, if a chunk does not fit.
    """
    check_name(strategy)
    if not material.chunks:
        raise RequestError("document", "contains no text; use a file with text")
    if strategy == "auto":
        name, reason = choose(task, material)
    else:
        _check(task, material, strategy)
        name, reason = strategy, "it was requested"
    return _WORK[name](task, material, reason)


def check_name(strategy: str) -> None:
    """Raises ConfigError for an unknown strategy; "auto" is known."""
    if strategy != "auto" and strategy not in _WORK:
        raise ConfigError(f"strategy: unknown {strategy!r}; use auto, {', '.join(STRATEGIES)}")


def _check(task: Task, material: Material, strategy: str) -> None:
    if strategy == "whole" and not fits(task, material):
        raise RequestError(
            "strategy",
            f"whole: the document's {len(material.ids):,} tokens, the task and a reply exceed the model's context and cache "
            f"({material.limits.room:,} tokens); use map_reduce, or retrieve for a question",
        )
    if strategy == "window" and material.limits.window is None:
        raise RequestError("strategy", "window: this engine has no sliding window; start it with one, or use map_reduce")
    if strategy == "retrieve":
        if not isinstance(task, Question | Extraction):
            raise RequestError("strategy", "retrieve: a summary needs the whole document; use map_reduce")
        if not matching_chunks(task, material):
            raise RequestError("question", "none of its words occurs in the document; use other words, or map_reduce")
