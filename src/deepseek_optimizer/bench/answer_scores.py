"""Scores answers against references: BLEU and chrF by sacrebleu (the extra `bench`)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigError


def read_pairs(path: Path) -> list[tuple[str, str]]:
    """Pairs of source and reference answer, one per line: JSON {"source", "reference"}, or separated by a tab.

    Raises:
        ConfigError: a line has neither form, or the file is empty.
    """
    pairs = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            pair = json.loads(line) if line.lstrip().startswith("{") else dict(zip(_FIELDS, line.split("\t"), strict=True))
            pairs.append((str(pair["source"]), str(pair["reference"])))
        except (ValueError, KeyError) as error:
            raise ConfigError(
                f'{path}, line {number}: expected {{"source": ..., "reference": ...}} or source, tab, reference'
            ) from error
    if not pairs:
        raise ConfigError(f"{path} contains no pairs; write one per line: source, tab, reference")
    return pairs


_FIELDS = ("source", "reference")


def answers(model: Any, tokenizer: Any, pairs: Sequence[tuple[str, str]], max_new_tokens: int) -> list[str]:
    """The model's greedy answer to each source."""
    from ..chat.conversation import prompt_ids
    from .generate_answer import answer

    texts = []
    for source, _ in pairs:
        ids = prompt_ids(tokenizer, [{"role": "user", "content": source}]).to(model.device)
        reply = answer(model, tokenizer, ids, lambda _: None, max_new_tokens=max_new_tokens, do_sample=False)
        texts.append(reply.text.strip())
    return texts


def score(answers: Sequence[str], references: Sequence[str]) -> dict[str, Any]:
    """Corpus BLEU and chrF, 0 to 100, with sacrebleu's signatures, which identify the metric's settings.

    Raises:
        ConfigError: sacrebleu is not installed.
    """
    try:
        from sacrebleu.metrics import BLEU, CHRF
    except ImportError:
        raise ConfigError("BLEU and chrF need sacrebleu: pip install 'deepseek-optimizer[bench]'") from None
    scores: dict[str, Any] = {"pairs": len(answers)}
    for name, metric in (("bleu", BLEU()), ("chrf", CHRF())):
        scores[name] = metric.corpus_score(list(answers), [list(references)]).score
        scores[f"{name}_signature"] = str(metric.get_signature())
    return scores
