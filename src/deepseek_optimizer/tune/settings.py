"""The settings that are searched, and the goals that they are searched for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from ..backends.qualities import EXACT, Quality

GOALS = ("latency", "throughput", "memory")
_FORMATS = ("precision", "quality")  # shown if they are not the defaults
_NEARLY = 0.8  # of the defaults' throughput: with less, saving memory is not worth it


@dataclass(frozen=True)
class Settings:
    """Attributes:
    threads, prefill_chunk, kv_cache, precision: as in `DeepSeekConfig`; the latter "auto": the model as it is given.
    batch: the largest number of sequences at once.
    drafts: maximum number of drafts of a round.
    quality: of requests that name none, see `EngineOptions`.
    """

    threads: int
    prefill_chunk: int = 512
    batch: int = 32
    kv_cache: str = "auto"
    drafts: int = 8
    precision: str = "auto"
    quality: Quality = EXACT

    def to_fields(self) -> dict[str, Any]:
        """Fields of `DeepSeekConfig`."""
        return {
            "threads": self.threads, "prefill_chunk": self.prefill_chunk, "batch_size_range": (1, self.batch),
            "kv_cache": self.kv_cache, **({} if self.precision == "auto" else {"precision": self.precision}),
        }  # fmt: skip

    def to_options(self) -> dict[str, Any]:
        """Fields of `EngineOptions`."""
        return {"batch_size_range": (1, self.batch), "step_tokens": self.prefill_chunk, "quality": self.quality}

    def __str__(self) -> str:
        values = [(f, getattr(self, f.name)) for f in fields(self)]
        return ", ".join(f"{f.name}={value}" for f, value in values if f.name not in _FORMATS or value != f.default)


@dataclass(frozen=True)
class Figures:
    """What a replay showed.

    Attributes:
        latency_s: mean time from a request's coming to its last token.
        first_s: mean time to its first token.
        tok_s: tokens of prompts and answers per second.
        memory_bytes: weights, and the cache at its largest.
        kl: KL divergence of the answers' distributions from those of the model as it is given with the default cache, in nats
            per token; 0: the same.
    """

    latency_s: float
    first_s: float
    tok_s: float
    memory_bytes: float
    kl: float = 0.0


def space(
    threads: int,
    cpus: int,
    kv_formats: Sequence[str],
    precisions: Sequence[str] = ("auto",),
    qualities: Sequence[Quality] = (EXACT,),
) -> Mapping[str, Sequence[Any]]:
    """The values of each setting, in order.

    Args:
        threads: of a model by default.
        cpus: that this process may use at once: more than `threads` where cores have two hyper-threads.
        kv_formats: formats of the cache to try, the default first.
        precisions, qualities: formats of the weights to try, and parts of them to read, the default first.
    """
    parts = (threads // 4, threads // 2, 3 * threads // 4, threads - 1)
    counts = sorted({1, *(max(1, part) for part in parts), threads, max(threads, cpus)})
    return {
        "threads": counts, "prefill_chunk": (64, 128, 256, 512, 1024, 2048), "batch": (1, 2, 4, 8, 16, 32, 64),
        "kv_cache": tuple(kv_formats), "drafts": (0, 2, 4, 8), "precision": tuple(precisions), "quality": tuple(qualities),
    }  # fmt: skip


def value(goal: str, figures: Figures, defaults: Figures | None) -> float:
    """What the search makes as small as possible.

    Args:
        goal: of `GOALS`.
        figures: of some settings.
        defaults: of the default settings; None: these are they. Less memory counts only with 80% of their throughput.
    """
    if goal == "latency":
        return figures.latency_s
    if goal == "throughput":
        return 1 / figures.tok_s
    slow = 1.0 if defaults is None else max(1.0, _NEARLY * defaults.tok_s / figures.tok_s)
    return figures.memory_bytes * slow**4
