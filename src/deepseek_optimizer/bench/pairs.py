"""Answers against references: BLEU and chrF, by sacrebleu (the extra `bench`)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigError


def read_pairs(path: Path) -> list[tuple[str, str]]:
    """(what to ask, the reference answer): a line each, as JSON {"source", "reference"} or with a tab between.

    Raises:
        ConfigError: a line is neither, or there is none.
    """
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            pair = json.loads(line) if line.lstrip().startswith("{") else dict(zip(_FIELDS, line.split("\t"), strict=True))
            found.append((str(pair["source"]), str(pair["reference"])))
        except (ValueError, KeyError) as error:
            raise ConfigError(
                f'{path}, line {number}: expected {{"source": ..., "reference": ...}} or source, tab, reference'
            ) from error
    if not found:
        raise ConfigError(f"{path} holds no pairs")
    return found


_FIELDS = ("source", "reference")


def answers(model: Any, tokenizer: Any, pairs: Sequence[tuple[str, str]], max_new_tokens: int) -> list[str]:
    """The model's greedy answer to every source."""
    from ..chat.conversation import prompt_ids
    from ..chat.generate import answer

    texts = []
    for source, _ in pairs:
        ids = prompt_ids(tokenizer, [{"role": "user", "content": source}]).to(model.device)
        reply = answer(model, tokenizer, ids, lambda _: None, max_new_tokens=max_new_tokens, do_sample=False)
        texts.append(reply.text.strip())
    return texts


def score(answers: Sequence[str], references: Sequence[str]) -> dict[str, Any]:
    """Corpus BLEU and chrF, 0 to 100, with sacrebleu's signatures, which say how they were counted.

    Raises:
        ConfigError: sacrebleu is not installed.
    """
    try:
        from sacrebleu.metrics import BLEU, CHRF
    except ImportError:
        raise ConfigError("BLEU and chrF need sacrebleu: pip install 'deepseek-optimizer[bench]'") from None
    found: dict[str, Any] = {"pairs": len(answers)}
    for name, metric in (("bleu", BLEU()), ("chrf", CHRF())):
        found[name] = metric.corpus_score(list(answers), [list(references)]).score
        found[f"{name}_signature"] = str(metric.get_signature())
    return found
