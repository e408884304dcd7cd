"""The gain of each fusion rule: with all rules, without each one in turn, and without any, on the same packed weights.

Variants alternate within each round, so that a drift of the machine affects all of them. A ratio is the median of the ratios of
the rounds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from ..errors import ConfigError
from .against import Values, ratio_row
from .metrics import samples
from .runs import repeated
from .work import Work

FIGURES = ("prefill_tok_s", "decode_tok_s")
ABLATION_NEW = 16  # tokens generated in each run
ALL, NONE = "all rules", "no rules"


def variants(rules: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Name of a variant -> its enabled rules."""
    return {ALL: tuple(rules), **{f"without {r}": tuple(o for o in rules if o != r) for r in rules}, NONE: ()}


def ablate(
    model: Any,
    *,
    context: int = 1024,
    new: int = ABLATION_NEW,
    batches: Sequence[int] = (1, 4, 32),
    rounds: int = 3,
    note: Callable[[str], None] = lambda _: None,
) -> list[dict[str, Any]]:
    """Rows {"variant", "work", ...} with the fields of `against.ratio_row` for the variant relative to all rules: `better`
    below 1 means that the rule is beneficial. The model's own rules are restored afterwards.

    Args:
        model: an optimized model.
        context: length of each prompt in tokens; decode is measured after it.

    Raises:
        ConfigError: the model is not optimized, or runs without fusion rules.
    """
    from ..integration.bind.runtime import runtime_of
    from ..optimized_model import DynamicGraphOptimizer

    config = runtime_of(model).config
    rules = config.rules
    if not rules:
        raise ConfigError(
            "this model runs without fusion rules, so there is nothing to ablate; load it with kernel_fusion=True"
        )
    works = [Work(prompt=context, new=new, batch=batch) for batch in batches]
    values_of: dict[tuple[str, Work], list[Values]] = {}
    try:
        for turn in range(rounds):
            for name, enabled in variants(rules).items():
                note(f"ablation, round {turn + 1} of {rounds}: {name}")
                DynamicGraphOptimizer(model, fusion_rules=list(enabled), config=config).optimize()
                for work in works:
                    runs = list(repeated(model, work, repeats=1, warmup=int(work is works[0])))
                    values = {figure: value[0] for figure, value in samples(runs).items() if figure in FIGURES}
                    values_of.setdefault((name, work), []).append(values)
    finally:
        DynamicGraphOptimizer(model, config=config).optimize()
    return [
        {"variant": name, "work": asdict(work), **ratio_row(figure, values_of[ALL, work], mine)}
        for (name, work), mine in values_of.items()
        for figure in FIGURES
    ]
