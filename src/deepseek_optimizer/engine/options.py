"""How an engine runs. No torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class EngineOptions:
    """
    Attributes:
        batch_size_range: fewest and most sequences that run at once; how many of them do follows from measured step times.
        step_tokens: tokens of a step at most, prompts' and others'.
        stall: how many times as long a step may take for the sake of prompts: what other streams notice of them. None: as long
            as it takes; best where nobody watches.
        target_itl: seconds between a stream's tokens that the batch size keeps to; None: as many tokens a second as there can
            be.
        prefix_cache: prompts that begin alike (with the same salt) share blocks, also with what was answered before.
        batch_invariant: a request's tokens and log probabilities are the same to the bit, whatever runs beside it and whatever
            is recomputed.
        cache_window: tokens of a sequence that the cache keeps: a longer one drops blocks from its middle and can continue
            without end; None: a sequence ends with the model's context. The first `sinks` tokens always stay, and what a
            request pins; with attention_optimization="sliding" only that attention's own sinks. Not to be confused with
            `DeepSeekConfig.attention_window`, which says what each token attends to.
        max_waiting: requests of one client that an `AsyncEngine` takes beside those that can run; of all clients four times
            as many.
    """

    batch_size_range: tuple[int, int] = (1, 32)
    step_tokens: int = 512
    stall: float | None = None
    target_itl: float | None = None
    prefix_cache: bool = True
    batch_invariant: bool = False
    cache_window: int | None = None
    sinks: int = 4
    max_waiting: int = 256
