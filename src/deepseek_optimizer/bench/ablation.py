"""What each fusion rule gains: all rules, then each off in turn, then none, on the same packed weights.

Variants take turns round by round, so that a drift of the machine hits all of them; a gain is the median of the rounds' own
ratios of all rules over the variant.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from ..errors import ConfigError
from .against import Values, ratio_row
from .figures import samples
from .runs import repeated
from .work import Work

FIGURES = ("prefill_tok_s", "decode_tok_s")
ABLATION_NEW = 16  # tokens generated in each run
ALL, NONE = "all rules", "no rules"


def variants(rules: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Name -> rules that stay on."""
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
    """Rows {"variant", "work", ...} with what `against.ratio_row` says of the variant against all rules: `better` below 1
    says that the rule pays. The model has its own rules again afterwards.

    Args:
        model: an optimised model.
        context: tokens of each prompt; decode is measured after them.

    Raises:
        ConfigError: the model is not optimised, or runs without rules.
    """
    from ..integration.bind.runtime import runtime_of
    from ..optimizer import DynamicGraphOptimizer

    config = runtime_of(model).config
    rules = config.rules
    if not rules:
        raise ConfigError("this model runs without fusion rules, so none can be left out; load it with kernel_fusion=True")
    works = [Work(prompt=context, new=new, batch=batch) for batch in batches]
    found: dict[tuple[str, Work], list[Values]] = {}
    try:
        for turn in range(rounds):
            for name, kept in variants(rules).items():
                note(f"ablation, round {turn + 1} of {rounds}: {name}")
                DynamicGraphOptimizer(model, fusion_rules=list(kept), config=config).optimize()
                for work in works:
                    runs = list(repeated(model, work, repeats=1, warmup=int(work is works[0])))
                    values = {figure: value[0] for figure, value in samples(runs).items() if figure in FIGURES}
                    found.setdefault((name, work), []).append(values)
    finally:
        DynamicGraphOptimizer(model, config=config).optimize()
    return [
        {"variant": name, "work": asdict(work), **ratio_row(figure, found[ALL, work], mine)}
        for (name, work), mine in found.items()
        for figure in FIGURES
    ]
