"""Which layers to leave out: one after the other the layer without which the model stays closest to the original.

How close is measured for one layer after the other, as the KL divergence of next-token distributions: first for all layers,
then for those that looked best, since a layer that the model cannot do without remains one. Layers before the one that is tried
run once for all that follow.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .layerwise import Layerwise, divergence

TRIED = 2  # after the first choice, that many times as many layers as are left out are tried


@dataclass(frozen=True)
class LeftOut:
    """A layer that was left out. `kl`: of the model without it and all those left out before, in nats per token."""

    layer: int
    kl: float


def leave_out_layers(
    model: Layerwise, count: int, progress: Callable[[int, int], None] = lambda done, total: None
) -> list[LeftOut]:
    """Chooses layers to leave out, in the order of their choice; of equally good ones the first.

    Args:
        model: the model, on the text to measure on.
        count: how many; fewer than the model has.
        progress: called after each trial with the number done and the total.
    """
    kept = list(range(len(model.layers)))
    tried = set(kept)
    total = len(kept) + sum(min(TRIED * count, len(kept)) - i for i in range(1, count))
    reference = model.log_probabilities(model.run(kept, model.inputs))
    chosen: list[LeftOut] = []
    done = 0
    for turn in range(count):
        trials: list[LeftOut] = []
        states = model.inputs
        for place, layer in enumerate(kept):
            if layer in tried:
                without = model.log_probabilities(model.run(kept[place + 1 :], states))
                trials.append(LeftOut(layer, divergence(reference, without)))
                done += 1
                progress(done, total)
            states = model.run([layer], states)
        trials.sort(key=lambda trial: (trial.kl, trial.layer))
        chosen.append(trials[0])
        kept.remove(trials[0].layer)
        tried = {trial.layer for trial in trials[: TRIED * count if turn == 0 else None]} - {trials[0].layer}
    return chosen
