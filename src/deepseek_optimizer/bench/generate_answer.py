"""One answer through `model.generate`, of any Transformers model, so that benchmarks call every side in the same way."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from ..chat.conversation import Answer, rate
from ..chat.stream import TextStream
from ..integration.bind.context_extension import room_of


def answer(
    model: Any, tokenizer: Any, ids: Any, write: Callable[[str], None], *, max_new_tokens: int = 512, **generation: Any
) -> Answer:
    """Generates after `ids` (int64 [1, T]), writing text as it is generated.

    Args:
        max_new_tokens: maximum length of the answer; also limited by the model's context.
        generation: passed to `model.generate`.

    Raises:
        ValueError: the prompt alone fills the model's context, or `generate` rejects an argument.
    """
    length = ids.shape[-1]
    room = (room_of(model.config) or length + max_new_tokens) - length
    if room < 1:
        raise ValueError(
            f"the prompt's {length} tokens leave no room in the model's context; shorten it or start a new conversation"
        )
    limit = min(max_new_tokens, room)
    stream, started = TextStream(tokenizer, write), time.perf_counter()
    model.generate(input_ids=ids, attention_mask=ids.new_ones(ids.shape), streamer=stream, max_new_tokens=limit, **generation)
    count, times = len(stream.ids), stream.times
    truncated = count == limit and stream.ids[-1] not in _end_ids(model)
    return Answer(
        text=stream.text,
        ids=stream.ids,
        finish_reason="length" if truncated else "stop",
        prompt_tokens=length,
        new_tokens=count,
        first_token_s=times[0] - started if times else 0.0,
        tokens_per_s=rate(count, times[0], times[-1]) if times else 0.0,
    )


def _end_ids(model: Any) -> list[int]:
    ids = model.generation_config.eos_token_id
    return ids if isinstance(ids, list) else [ids]
