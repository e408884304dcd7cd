"""Options of an engine. Does not import torch."""

from __future__ import annotations

from dataclasses import dataclass

from ..backends.qualities import EXACT, Quality


@dataclass(frozen=True)
class EngineOptions:
    """How an engine schedules requests and uses its cache.

    Attributes:
        batch_size_range: (smallest, largest) number of sequences that run at once; the number within this range is chosen from
            measured step times.
        step_tokens: maximum number of tokens in a step, prompt tokens and others together.
        stall: maximum factor by which prompt tokens may prolong a step, which delays the streams of other requests. None: no
            limit; best for offline batches.
        policy: "fixed": every step is filled within the other options; "latency" or "throughput": which limits are best for
            that is learned while the engine runs. `batch_size_range` and `step_tokens` remain upper bounds, but `stall` may be
            exceeded.
        target_itl: target inter-token latency in seconds, which limits the batch size; None: maximize tokens per second.
        prefix_cache: prompts with the same beginning (and the same salt) share cache blocks, including blocks of earlier
            answers.
        prefix_cache_dir: directory to which the prefix cache is written and from which it is read, so that it outlives the
            process; several processes may share it. Close the engine at the end. None: the prefix cache ends with the engine.
        prefix_cache_bytes: maximum size of the files in that directory; the least recently used ones are deleted.
        batch_invariant: a request's tokens and log probabilities are the same, bit for bit, whatever other requests are in the
            batch and whatever is recomputed.
        cache_window: maximum number of tokens of a sequence in the cache; a longer sequence drops blocks from its middle and
            can continue without limit. None: a sequence ends with the model's context. The first `sinks` tokens and the
            request's pinned tokens always stay; with attention_optimization="sliding", only the sinks of that attention. Not to
            be confused with `DeepSeekConfig.attention_window`, the tokens that each token attends to.
        sinks: number of tokens at the beginning of a sequence that always stay in the cache, with `cache_window`.
        quality: the quality of requests that name none, or their `min_quality` if that is higher; of models whose weights have
            several.
        lower_after: if a request has waited so many seconds for its start, or one was preempted, those that start now and allow
            it (`Request.min_quality`) are computed at their lowest quality; until the wait has been below half of that for four
            times as long.
        max_waiting: maximum number of waiting requests of one client of an `AsyncEngine`, in addition to those that can run;
            for all clients together four times as many.
        max_loras: maximum number of LoRA adapters that are loaded at a time; 0: the engine supports none, which costs nothing.
        max_lora_rank: largest rank of an adapter.
        lora_dtype: what adapters are stored in: "fp32", "bf16", or "auto": bf16, except fp32 for a model all of whose matrices
            are fp32. Their products round rows to bf16 where those of the model read rows of bf16 or int8; sums are fp32.
    """

    batch_size_range: tuple[int, int] = (1, 32)
    step_tokens: int = 512
    stall: float | None = None
    policy: str = "fixed"
    target_itl: float | None = None
    prefix_cache: bool = True
    prefix_cache_dir: str | None = None
    prefix_cache_bytes: int = 8 << 30
    batch_invariant: bool = False
    cache_window: int | None = None
    sinks: int = 4
    quality: Quality = EXACT
    lower_after: float = 1.0
    max_waiting: int = 256
    max_loras: int = 0
    max_lora_rank: int = 64
    lora_dtype: str = "auto"
