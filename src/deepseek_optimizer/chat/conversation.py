"""One answer, and a conversation of them. What `dso run`, `dso chat` and the demo share."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .stream import StoppedError, TextStream


@dataclass
class Answer:
    """Text and how it came. Times in seconds; `tokens_per_s` counts the tokens after the first (0 where there is no second)."""

    text: str
    ids: list[int]
    finish_reason: str  # "stop", "length" or "interrupted"
    prompt_tokens: int
    first_token_s: float
    tokens_per_s: float

    @property
    def new_tokens(self) -> int:
        return len(self.ids)

    def summary(self) -> dict[str, Any]:
        """Everything but the ids, for JSON."""
        names = ("text", "finish_reason", "prompt_tokens", "new_tokens", "first_token_s", "tokens_per_s")
        return {name: getattr(self, name) for name in names}


def prompt_ids(tokenizer: Any, messages: list[dict[str, str]], *, raw: bool = False) -> Any:
    """Token ids int64 [1, T] of a chat, or of the last message's text as it is (`raw`, and models without a template)."""
    if raw or not tokenizer.chat_template:
        return tokenizer(messages[-1]["content"], return_tensors="pt")["input_ids"]
    encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    return encoded["input_ids"]


def answer(
    model: Any,
    tokenizer: Any,
    ids: Any,
    write: Callable[[str], None],
    *,
    max_new_tokens: int = 512,
    stop: Callable[[], bool] = lambda: False,
    **generation: Any,
) -> Answer:
    """Generates after `ids` (int64 [1, T]), writing text as it comes.

    Args:
        max_new_tokens: at most; less where the model's context ends sooner.
        stop: asked at every token; True ends the answer, which then counts as "interrupted".
        generation: passed to `model.generate`.

    Raises:
        ValueError: the prompt alone fills the model's context, or `generate` refuses an argument.
    """
    length = ids.shape[-1]
    room = getattr(model.config, "max_position_embeddings", length + max_new_tokens) - length
    if room < 1:
        raise ValueError(f"the prompt's {length} tokens leave no room in the model's context; shorten it or start afresh")
    limit = min(max_new_tokens, room)
    stream = TextStream(tokenizer, write, stop)
    started, finish = time.perf_counter(), "stop"
    try:
        model.generate(
            input_ids=ids, attention_mask=ids.new_ones(ids.shape), streamer=stream, max_new_tokens=limit, **generation
        )
    except StoppedError:
        stream.end()
        finish = "interrupted"
    count = len(stream.ids)
    if finish == "stop" and count == limit and stream.ids[-1] not in _end_ids(model):
        finish = "length"
    times = stream.times
    return Answer(
        text=stream.text,
        ids=stream.ids,
        finish_reason=finish,
        prompt_tokens=length,
        first_token_s=times[0] - started if times else 0.0,
        tokens_per_s=(count - 1) / (times[-1] - times[0]) if count > 1 and times[-1] > times[0] else 0.0,
    )


def _end_ids(model: Any) -> list[int]:
    ids = model.generation_config.eos_token_id
    return ids if isinstance(ids, list) else [ids]


@dataclass
class Conversation:
    """Turns so far, and how to take the next one. The system prompt, where there is one, is the first message."""

    model: Any
    tokenizer: Any
    system: str | None = None
    generation: dict[str, Any] = field(default_factory=dict)
    turns: list[dict[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.tokenizer.chat_template:
            raise ValueError("this model has no chat template, so it can't hold a conversation; `dso run` continues a text")

    @property
    def messages(self) -> list[dict[str, str]]:
        return ([{"role": "system", "content": self.system}] if self.system else []) + self.turns

    def say(self, text: str, write: Callable[[str], None], stop: Callable[[], bool] = lambda: False) -> Answer:
        """The model's answer to `text`. Both become history, also where the answer was interrupted; an error leaves none."""
        self.turns.append({"role": "user", "content": text})
        try:
            ids = prompt_ids(self.tokenizer, self.messages)
            reply = answer(self.model, self.tokenizer, ids, write, stop=stop, **self.generation)
        except BaseException:
            self.turns.pop()
            raise
        self.turns.append({"role": "assistant", "content": reply.text})
        return reply

    def reset(self) -> None:
        """Forgets the turns; the system prompt stays."""
        self.turns.clear()

    def undo(self) -> None:
        """Takes back the last question and its answer."""
        del self.turns[-2:]

    def save(self, path: Path) -> None:
        """Writes the messages as JSON."""
        path.write_text(json.dumps(self.messages, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
