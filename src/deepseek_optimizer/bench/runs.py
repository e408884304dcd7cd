"""Times each token of `model.generate`, for any Transformers model, optimized or not."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from .work import Work


@dataclass(frozen=True)
class Run:
    """A call of `generate`.

    Attributes:
        prompt: prompt tokens of each row that were computed.
        batch: number of rows.
        times: seconds from the call to each step.
        generated: generated tokens of all rows.
    """

    prompt: int
    batch: int
    times: tuple[float, ...]
    generated: int

    @property
    def ttft_s(self) -> float:
        """Time to the first token."""
        return self.times[0]

    @property
    def e2e_s(self) -> float:
        return self.times[-1]

    @property
    def tpot_s(self) -> float | None:
        """Time per output token after the first: (E2E - TTFT) / (N - 1). None with a single token."""
        steps = len(self.times) - 1
        return (self.e2e_s - self.ttft_s) / steps if steps else None

    @property
    def gaps_s(self) -> list[float]:
        """Inter-token latencies."""
        return [b - a for a, b in zip(self.times, self.times[1:], strict=False)]


class TokenTimes:
    """A streamer that records the time of each step. `generate` puts the prompt first.

    Args:
        beside: called after every fourth step. Its own time does not count.
    """

    def __init__(self, beside: Callable[[], object] | None = None) -> None:
        self.times: list[float] = []
        self._beside, self._paused = beside, 0.0
        self._prompt_seen = False

    def put(self, value: Any) -> None:
        if self._prompt_seen:
            now = time.perf_counter()
            self.times.append(now - self._paused)
            if self._beside is not None and len(self.times) % 4 == 0:
                self._beside()
                self._paused += time.perf_counter() - now
        self._prompt_seen = True

    def end(self) -> None:
        pass


def timed(
    model: Any, ids: Any, *, computed: int | None = None, beside: Callable[[], object] | None = None, **generation: Any
) -> tuple[Run, Any]:
    """One call of `generate`.

    Args:
        ids: int64 [B, T], without padding.
        computed: number of prompt tokens that are not in a cache given in `generation`; None: all.
        beside: see `TokenTimes`.

    Returns:
        The times, and the new ids int64 [B, N].
    """
    streamer = TokenTimes(beside)
    started = time.perf_counter()
    out = model.generate(ids, attention_mask=ids.new_ones(ids.shape), streamer=streamer, **generation)
    new = out[:, ids.shape[1] :]
    times = tuple(t - started for t in streamer.times)
    return Run(ids.shape[1] if computed is None else computed, ids.shape[0], times, new.numel()), new


def repeated(
    model: Any, work: Work, *, repeats: int, warmup: int = 1, seed: int = 0, beside: Callable[[], object] | None = None
) -> Iterator[Run]:
    """`repeats` greedy runs of one work after `warmup` uncounted ones, on random tokens that differ from run to run, so that no
    cache contains them. Lengths are exact: nothing ends a sequence early.

    Args:
        beside: called during the counted runs, see `TokenTimes`.

    Raises:
        ValueError: the work does not fit into the model's context.
    """
    import torch

    from ..integration.bind.context_extension import room_of

    room = room_of(model.config)
    if room is not None and work.length > room:
        raise ValueError(
            f"{work} needs a context of {work.length} tokens, but the model has {room}; reduce --prompt, --depth or --new"
        )
    generator = torch.Generator().manual_seed(seed)
    cache = deep_cache(model, work, generator) if work.depth else {}
    past = cache.pop("ids", None)
    for i in range(warmup + repeats):
        ids = random_ids(model, work.batch, work.prompt, generator)
        if past is not None:
            ids = torch.cat([past, ids], dim=1)
        with exact_length(model):
            options = {"max_new_tokens": work.new, "do_sample": False, "num_beams": 1}
            run, _ = timed(model, ids, computed=work.prompt, beside=beside if i >= warmup else None, **options, **cache)
        for stored in cache.values():
            stored.crop(-(stored.get_seq_length() - work.depth))
        if i >= warmup:
            yield run


def random_ids(model: Any, batch: int, tokens: int, generator: Any) -> Any:
    """Random ids int64 [batch, tokens] on the model's device, without the first ids, which are often special tokens."""
    import torch

    high = model.config.get_text_config().vocab_size
    return torch.randint(min(10, high - 1), high, (batch, tokens), generator=generator, dtype=torch.int64, device="cpu").to(
        model.device
    )


def deep_cache(model: Any, work: Work, generator: Any) -> dict[str, Any]:
    """{"ids": the tokens in the cache, NAME: the cache, under its argument name in `generate`}."""
    import torch

    from ..integration.compat import cache_name

    ids = random_ids(model, work.batch, work.depth, generator)
    with torch.inference_mode():
        output = model(ids, use_cache=True, logits_to_keep=1)
    return {"ids": ids, cache_name(): output[cache_name()]}


class exact_length:
    """Inside, the generation config has no end-of-sequence token, so that every run has the same number of tokens."""

    def __init__(self, model: Any) -> None:
        self.config = model.generation_config

    def __enter__(self) -> None:
        self.before = self.config.eos_token_id
        self.config.eos_token_id = None

    def __exit__(self, *_: Any) -> None:
        self.config.eos_token_id = self.before
