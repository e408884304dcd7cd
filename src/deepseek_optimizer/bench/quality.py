"""Compares a model's next-token distributions with those of the unoptimized model on a text.

KL(p || q) = sum p (log p - log q) at each token, with p of the unoptimized model. The perplexity ratio is exp(mean(d)), with d
the difference of the two losses of a token; its standard error is that of d, which is far smaller than that of either loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from ..calibration.text import sample_text as sample_text

Logits = Callable[[Any, Any], Any]  # model, ids int64 [1, T] -> float32 [T, V]


def stretches(tokenizer: Any, text: str, tokens: int, count: int) -> list[Any]:
    """The first `count` segments of `tokens` tokens: ids int64 [1, tokens]; of a shorter text, one shorter segment.

    Raises:
        ValueError: the text is too short.
    """
    ids = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"]
    whole = [ids[:, i : i + tokens] for i in range(0, ids.shape[1] - tokens + 1, tokens)][:count] or [ids]
    if whole[0].shape[1] < 2:
        raise ValueError("the text has fewer than two tokens; use a longer one")
    return whole


def through_prefill(model: Any, ids: Any) -> Any:
    """Logits float32 [T, V] of the whole text in one call."""
    import torch

    with torch.inference_mode():
        return model(ids.to(model.device), use_cache=False).logits[0].float()


def through_decode(model: Any, ids: Any) -> Any:
    """Logits float32 [T, V], one token per call. Its kernels can differ from those of prefill."""
    import torch

    from ..integration.compat import cache_name

    rows = []
    cache: dict[str, Any] = {}
    with torch.inference_mode():
        for i in range(ids.shape[1]):
            output = model(ids[:, i : i + 1].to(model.device), use_cache=True, **cache)
            cache = {cache_name(): output[cache_name()]}
            rows.append(output.logits[0].float())
    return torch.cat(rows)


def after_prompt(model: Any, ids: list[int], prompt: int, first: Any, then: Any, step: int | None = None) -> Any:
    """Logits float32 [T - prompt, V] of a text after its prompt, by plans of the model.

    Args:
        model: with a plan.
        ids: prompt and text, T tokens.
        prompt: tokens of the prompt.
        first, then: the plans of the prompt and of the text, see `Runtime.compile`.
        step: tokens of a step; steps of one run as those of answers do. None: prompt and text take one step each.
    """
    import torch

    from ..backends.base import DECODE, PREFILL
    from ..cache import SequenceBlocks
    from ..engine.runner import Runner
    from ..engine.sequence import Part, Sequence

    arena, found = model.dso.arena, []
    with arena.locked() as manager:
        sequence = Sequence(0, ids, SequenceBlocks(manager))
    try:
        for plan, begin, end, size in ((first, 0, prompt, None), (then, prompt, len(ids), step)):
            runner = Runner(plan, arena)
            for at in range(begin, end, size or end - begin):
                part = ids[at : min(end, at + (size or end - begin))]
                runner.reserve([sequence], [len(part)])
                rows = list(range(len(part))) if begin else []
                phase = DECODE if size == 1 else PREFILL
                output = runner.step([Part(sequence, part, at, phase=phase)], rows)
                if rows:
                    found.append(output.logits.float().cpu())
    finally:
        with arena.locked():
            sequence.blocks.free()
    return torch.cat(found)


def compare(model: Any, reference: Any, texts: Sequence[Any], logits: Logits = through_prefill) -> dict[str, float]:
    """Runs both models over the texts, the reference always by prefill. See `Divergence.summary`."""
    comparison = Divergence()
    for ids in texts:
        comparison.add(logits(model, ids), through_prefill(reference, ids), ids[0])
    return comparison.summary()


class Divergence:
    """Accumulates per-token results, so that only one text's logits are in memory."""

    def __init__(self) -> None:
        self._kl: list[Any] = []
        self._same: list[Any] = []
        self._worst: list[Any] = []
        self._loss: list[Any] = []  # [T - 1, 2]: ours, the reference's

    def add(self, logits: Any, reference: Any, ids: Any) -> None:
        """logits, reference: float32 [T, V] of the text `ids` int64 [T]."""
        import torch

        ours, theirs = logits.log_softmax(-1), reference.log_softmax(-1)
        self._kl.append((theirs.exp() * (theirs - ours)).sum(-1))
        self._same.append((ours.argmax(-1) == theirs.argmax(-1)).float())
        self._worst.append((logits - reference).abs().amax(-1) / reference.abs().amax(-1))
        target = ids[1:, None].to(ours.device)
        self._loss.append(-torch.cat([ours[:-1].gather(1, target), theirs[:-1].gather(1, target)], dim=1).double())

    def summary(self) -> dict[str, float]:
        """kl_mean, kl_median, kl_999 (nats); same_top_percent; perplexity, reference_perplexity, perplexity_ratio and its
        standard error; worst_logit: the largest difference relative to the row's largest logit; tokens: number compared."""
        import torch

        kl, loss = torch.cat(self._kl).double(), torch.cat(self._loss)
        difference = loss[:, 0] - loss[:, 1]
        ratio = math.exp(difference.mean().item())
        error = difference.std().item() / math.sqrt(len(difference)) if len(difference) > 1 else math.nan
        return {
            "tokens": len(kl),
            "kl_mean": kl.mean().item(),
            "kl_median": kl.median().item(),
            "kl_999": kl.quantile(0.999).item(),
            "same_top_percent": 100 * torch.cat(self._same).mean().item(),
            "perplexity": math.exp(loss[:, 0].mean().item()),
            "reference_perplexity": math.exp(loss[:, 1].mean().item()),
            "perplexity_ratio": ratio,
            "perplexity_ratio_error": ratio * error,
            "worst_logit": torch.cat(self._worst).max().item(),
        }
