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
        window: tokens that a sequence may hold: longer ones let go of their midst and go on for ever; None: they end with the
            model's context. `sinks` at the beginning always stay, and what a request pins; but where attention itself sees
            only a window (attention_optimization="sliding"), its own sinks and nothing else.
        max_waiting: requests of one client that an `AsyncEngine` takes beside those that can run; of all clients four times
            as many.
    """

    batch_size_range: tuple[int, int] = (1, 32)
    step_tokens: int = 512
    stall: float | None = None
    target_itl: float | None = None
    prefix_cache: bool = True
    batch_invariant: bool = False
    window: int | None = None
    sinks: int = 4
    max_waiting: int = 256
