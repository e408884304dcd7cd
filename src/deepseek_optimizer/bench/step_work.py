"""What a step of a compiled plan has to do, stage by stage: bytes, operations, and into how many tasks they split."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError
from .memory_traffic import Experts, traffic_of
from .work import Work

TILE_ROWS = 16  # of a packed matrix: the smallest task of a product


@dataclass(frozen=True)
class Stage:
    """Steps of a plan between two hand-overs of the threads.

    Attributes:
        bytes: of packed weights that are read.
        operations: multiplications and additions.
        tasks: into how many tasks the work can be split.
        rows: of the matrices: for each row of the input, each has a sum at its end.
    """

    bytes: float
    operations: float
    tasks: int
    rows: float = 0.0


@dataclass(frozen=True)
class StepWork:
    """A decode step.

    Attributes:
        stages: with products.
        others: number of stages without products: attention, and what is too small to be shared is not counted.
        cache_bytes: read by attention, of all sequences.
        batch: number of sequences.
        main_format: the weight format with the most bytes.
    """

    stages: tuple[Stage, ...]
    others: int
    cache_bytes: float
    batch: int
    main_format: str = "int4"

    @property
    def hand_overs(self) -> int:
        """How often all threads get new work in the step."""
        return len(self.stages) + self.others

    @property
    def rows(self) -> float:
        """Of all matrices."""
        return sum(stage.rows for stage in self.stages)

    @property
    def weight_bytes(self) -> float:
        return sum(stage.bytes for stage in self.stages)


def step_work(model: Any, work: Work) -> StepWork:
    """The decode step in the middle of the output of an optimized model that has a plan.

    Args:
        model: as `load_model` returns it.
        work: its batch size and lengths.

    Raises:
        ConfigError: the model has no plan, or one of a backend that does not tell what its steps read.
    """
    runtime = model.dso
    products = _products(runtime) if getattr(runtime, "plan", None) is not None else []
    if not sum(row["bytes"] for row in products):
        raise ConfigError(
            "predictions for other machines need a model with an execution plan on the cpu backend (see `model.report()`); "
            "leave them out (--instances none)"
        )
    traffic = traffic_of(model)
    stages = [_stage(row, work.batch) for row in products]
    sizes: dict[str, int] = {}
    for row in products:
        sizes[row["format"]] = sizes.get(row["format"], 0) + row["bytes"]
    cache = max(0.0, traffic.step_bytes(work) - traffic.weight_bytes - sum(e.read(work.batch) for e in traffic.experts))
    attention = sum(row["op"].endswith("attention") for row in runtime.plan.describe())
    return StepWork(tuple(stages), attention, cache, work.batch, max(sizes, key=sizes.__getitem__))


def _products(runtime: Any) -> list[dict[str, Any]]:
    """The rows of `Plan.describe` with a product, each with the rows of its matrices as "rows"."""
    from ..graph.analysis import weight_shapes

    shapes = weight_shapes(runtime.graph)
    found = []
    for row in runtime.plan.describe():
        if "bytes" in row and row["op"] not in ("embedding", "lookup"):
            known = [shapes[name] for name in row.get("weights", ()) if name in shapes]
            rows = sum(shape[-2] for shape in known if len(shape) > 1)
            found.append({**row, "rows": rows or TILE_ROWS})
    return found


def _stage(row: dict[str, Any], batch: int) -> Stage:
    from ..quant import get_format

    tasks = max(1, row["rows"] // TILE_ROWS)
    weights = 8 * row["bytes"] / get_format(row["format"]).bits
    if "experts" not in row:
        return Stage(row["bytes"], 2 * weights * batch, tasks, row["rows"])
    read = Experts(row["bytes"], row["experts"], row["top_k"]).read(batch)
    chosen = row["top_k"] / row["experts"]
    rows = row["rows"] * min(row["experts"], row["top_k"] * batch)
    return Stage(read, 2 * weights * chosen * batch, tasks * min(row["experts"], row["top_k"] * batch), rows)
