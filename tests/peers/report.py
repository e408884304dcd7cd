"""`python -m peers.report`: the page of the documentation, from the results that `peers.run --write` stored."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

from .suites import SUITES, Suite
from .tally import FileTally, share

RESULTS = Path(__file__).with_name("results.json")
PAGE = Path(__file__).parents[2] / "docs" / "reference" / "compatibility.md"
KINDS = {
    "differs": "differs",
    "extension": "extension of the other server",
    "model": "needs another model",
    "internal": "not a test of a server",
    "open": "not explained yet",
}
INTRODUCTION = """\
# Compatibility

The tests of other servers run against `dso serve`, unchanged: `make test-peers` takes them from the source distributions on
the package index. This page is generated from their results. What the tests use as fixtures is replaced: the process that they
start, whose flags are translated; the models, here SmolLM2-135M-Instruct, random encoders and a random model that sees;
pictures, which are random colors in data URLs; and the values that belong to a model, such as the number of tokens of a prompt
and the words of an answer.

| column | meaning |
|---|---|
| passed | the test passes |
| differs | `dso serve` answers differently; the reason is below the table |
| extension | tests what only clients of the other server use, or what needs a model of another kind, such as audio |
| model | needs the weights of a model that no package index has |
| internal | tests the other project's classes, not a server |
| open | not explained yet |
| skipped | skipped by the suite itself |

[HTTP API](http-api.md) describes the server; [Coming from vLLM, llama.cpp, Ollama](../coming-from.md) compares flags."""


def stored() -> dict[str, dict[str, FileTally]]:
    """The results by suite and file."""
    everything = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    return {suite: {file: FileTally.read(one) for file, one in files.items()} for suite, files in everything.items()}


def write(suite: str, files: Mapping[str, FileTally]) -> None:
    """Replaces the results of the files that were run, and the page."""
    everything = stored()
    everything[suite] = {**everything.get(suite, {}), **files}
    kept = {name: {file: one.stored() for file, one in sorted(made.items())} for name, made in sorted(everything.items())}
    RESULTS.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    PAGE.write_text(page(), encoding="utf-8")


def page() -> str:
    everything = stored()
    parts = [INTRODUCTION]
    parts += [section(suite, everything[suite.name]) for suite in SUITES if suite.name in everything]
    return "\n\n".join(parts) + "\n"


def section(suite: Suite, files: Mapping[str, FileTally]) -> str:
    lines = [
        f"## {suite.name}", "",
        f"{suite.title}. Of the tests that apply, {share(files):.0%} pass.", "",
        "| file | passed | differs | extension | model | internal | open | skipped |", "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    total = FileTally()
    for file, one in sorted(files.items()):
        lines.append(_row(f"`{file.removeprefix('tests/')}`", one))  # which would look like a path of this repository
        total.passed, total.skipped = total.passed + one.passed, total.skipped + one.skipped
        total.unexplained += one.unexplained
        for kind, reasons in one.explained.items():
            for why, count in reasons.items():
                total.explained[kind][why] += count
    lines += [_row("all", total), "", "| file | tests | why not |", "|---|---|---|"]
    grouped: dict[tuple[str, str], dict[str, int]] = defaultdict(dict)
    for file, one in sorted(files.items()):
        for kind, reasons in one.explained.items():
            for why, count in reasons.items():
                grouped[kind, why][file] = count
    for kind in KINDS:
        for (of, why), where in grouped.items():
            if of == kind:
                names = ", ".join(f"`{Path(file).name}`" for file in where)
                lines.append(f"| {names} | {sum(where.values())} | {KINDS[kind]}: {why} |")
    for file, one in sorted(files.items()):
        if one.unexplained:
            lines.append(f"| `{Path(file).name}` | {len(one.unexplained)} | {KINDS['open']} |")
    return "\n".join(lines)


def _row(name: str, one: FileTally) -> str:
    counts = [one.passed, *(one.count(kind) for kind in KINDS if kind != "open"), len(one.unexplained), one.skipped]
    return f"| {name} | " + " | ".join(str(count) if count else "" for count in counts) + " |"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
