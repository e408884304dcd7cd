"""Our own figures of one row, by the scripts of the tree that is named: what `commits.py` starts once a side and round.

    python benchmarks/commits_side.py TREE NAME TURN THREADS

Prints {figure: tokens a second}. It uses only what the trees that are compared have in common.
"""

from __future__ import annotations

import json
import sys
from typing import Any


def main() -> None:
    tree, name, turn, threads = sys.argv[1:]
    sys.path[0] = tree  # in place of this file's directory: `benchmarks` is that tree's
    from benchmarks import measure, measure_serving
    from benchmarks.deepseek import DEEPSEEK
    from benchmarks.serving import SERVING, VLLM, Serving
    from benchmarks.standing import STANDING
    from deepseek_optimizer.bench.against import run_json, values_of

    rows: dict[str, Any] = {row.name: row for row in (*STANDING, *DEEPSEEK, *SERVING)}
    if name not in rows:
        raise SystemExit(f"no row is called {name}; known: {', '.join(rows)}")
    row = rows[name]
    found: dict[str, float] = {}
    if isinstance(row, Serving):
        for label, side in row.sides.items():
            if side.where != VLLM:
                figures = measure_serving.figures(side, int(turn), int(threads))
                found |= {f"{label}, {figure}": value for figure, value in figures.items() if figure.endswith("_tok_s")}
    else:
        found[row.figure] = values_of(run_json(measure._command(row, row.ours, int(threads))))[row.figure]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
