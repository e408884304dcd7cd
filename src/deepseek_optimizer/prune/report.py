"""What pruning costs and gains: size, divergence and loss on a text, and the speed of decoding."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..bench.quality import compare
from ..bench.runs import repeated
from ..bench.work import Work
from ..checkpoint import open_checkpoint

ROUNDS = 5  # of alternating measurements; the ratio is the median of theirs
WORK = Work(prompt=64, new=32)


@dataclass(frozen=True)
class Row:
    """One model compared with the original.

    Attributes:
        name: "original", "pruned" or "recovered".
        layers: number of layers.
        parameters: number of weights; tied ones count once.
        bytes: of its weight files.
        kl: mean KL divergence from the original, in nats per token.
        same_top: share of tokens for which both predict the same next token, from 0 to 1.
        loss: mean cross entropy on the text, in nats per token.
        speed: decoded tokens per second, relative to the original.
    """

    name: str
    layers: int
    parameters: int
    bytes: int
    kl: float
    same_top: float
    loss: float
    speed: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def rows_of(original: Any, others: Sequence[tuple[str, Any]], folders: Sequence[Path], texts: Sequence[Any]) -> list[Row]:
    """A row for the original, and one for each other model.

    Args:
        original: an optimized model.
        others: names and models, loaded like the original.
        folders: of all models, the original's first.
        texts: token ids, int64 [1, n] each, that nothing was chosen or trained on.
    """
    rows = []
    for (name, model), folder in zip([("original", original), *others], folders, strict=True):
        found = compare(model, original, texts)
        rows.append(
            Row(
                name=name,
                layers=model.config.num_hidden_layers,
                parameters=_parameters(folder),
                bytes=sum(file.stat().st_size for file in folder.glob("*.safetensors")),
                kl=found["kl_mean"],
                same_top=found["same_top_percent"] / 100,
                loss=math.log(found["perplexity"]),
                speed=1.0 if model is original else speed_ratio(original, model),
            )
        )
    return rows


def speed_ratio(baseline: Any, model: Any, rounds: int = ROUNDS) -> float:
    """Decoded tokens per second of `model` over those of `baseline`: the median over alternating runs."""
    ratios = []
    for turn in range(rounds):
        times = []
        for side in (baseline, model):
            (run,) = repeated(side, WORK, repeats=1, warmup=int(turn == 0))
            assert run.tpot_s is not None
            times.append(run.tpot_s)
        ratios.append(times[0] / times[1])
    return statistics.median(ratios)


def table(rows: Sequence[Row]) -> str:
    """The rows as lines of text, for a terminal."""
    lines = [f"{'':10}{'layers':>7}{'weights':>10}{'size':>10}{'KL':>9}{'same token':>12}{'loss':>8}{'decode':>8}"]
    lines += [
        f"{row.name:10}{row.layers:7}{row.parameters / 1e6:8.1f} M{row.bytes / 1e6:7.0f} MB{row.kl:9.4f}"
        f"{row.same_top:12.1%}{row.loss:8.3f}{row.speed:7.2f}x"
        for row in rows
    ]
    return "\n".join(lines)


def _parameters(folder: Path) -> int:
    with open_checkpoint(folder) as checkpoint:
        return sum(math.prod(info.shape) for info in checkpoint.tensors.values())
