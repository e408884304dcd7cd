"""A document of 300,000 tokens is summarized and queried in bounded memory, by each strategy: issue 6's bar.

The document is Python's own documentation and sources, which every machine has, with one sentence in it that a question asks
for. Of each answer it is checked that its citations are truly in the text, and that the process took no more than the memory it
was given above the weights.

    python -m benchmarks.longdoc [--model DIR] [--tokens 300000] [--memory-gb 3] [--strategy auto retrieve ...]
"""

from __future__ import annotations

import argparse
import json
import sysconfig
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from deepseek_optimizer import LongDocument, load_model, load_tokenizer
from deepseek_optimizer.bench.hardware import cpu_name
from deepseek_optimizer.calibration.text import sample_text
from deepseek_optimizer.errors import RequestError

from . import models
from .verdict import MISSED, REACHED

NEEDLE = "The keeper of the lighthouse at Skerryvore wrote the number 4417 on the wall of the lamp room."
QUESTION = "Which number did the keeper of the lighthouse at Skerryvore write on the wall?"
SUMMARIES, QUESTIONS = ("auto", "map_reduce", "window"), ("auto", "retrieve", "map_reduce", "window", "whole")


def text_of(tokenizer: Any, tokens: int) -> str:
    """A text of so many tokens, with the needle two thirds down."""
    pieces: list[str] = []
    count = 0
    for piece in _pieces():
        ids = tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
        if count + len(ids) >= tokens:
            pieces.append(tokenizer.decode(ids[: tokens - count]))
            break
        pieces.append(piece)
        count += len(ids)
    else:
        raise SystemExit(f"this machine's Python has text of {count:,} tokens only")
    lines = "\n\n".join(pieces).split("\n")
    at = next(n for n in range(2 * len(lines) // 3, len(lines)) if not lines[n].strip())
    return "\n".join([*lines[:at], "", NEEDLE, "", *lines[at:]])


def _pieces() -> Iterator[str]:
    yield sample_text()
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        yield path.read_text(encoding="utf-8", errors="replace")


def measure(document: LongDocument, task: str, strategy: str, memory: float) -> dict[str, Any]:
    """A row: the answer, what it took, and whether it kept what was promised."""
    row: dict[str, Any] = {"task": task, "asked for": strategy}
    try:
        ask = document.summarize if task == "summarize" else lambda **options: document.ask(QUESTION, **options)
        answer = ask(strategy=strategy)
    except RequestError as error:
        return {**row, "refused": str(error)}
    texts = {file.name: file.text for file in document.document.files}
    true = all(texts[c.file][c.start : c.end] == c.text for c in answer.citations)
    row |= {
        "strategy": answer.strategy, "reason": answer.reason, "answer": answer.answer, "notes": answer.notes,
        "citations": len(answer.citations), "citations in the text": true, "tokens": asdict(answer.tokens),
        "seconds": round(answer.seconds, 1), "peak_memory_gb": answer.peak_memory_gb,
    }  # fmt: skip
    if task == "ask":
        row["needle cited"] = any(NEEDLE in c.text or c.text in NEEDLE for c in answer.citations)
    held = true and bool(answer.citations) and (answer.peak_memory_gb or 0) <= memory
    return {**row, "verdict": REACHED if held else MISSED}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, help="an optimized model's directory; default: SmolLM2-135M in int4")
    parser.add_argument("--tokens", type=int, default=300_000)
    parser.add_argument("--memory-gb", type=float, default=3.0)
    parser.add_argument("--task", nargs="+", choices=("summarize", "ask"), default=["summarize", "ask"])
    parser.add_argument("--strategy", nargs="+", help="default: auto, and each that can do the task")
    a = parser.parse_args()
    path = a.model or models.model("smol", "int4")
    tokenizer = load_tokenizer(path)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "python.txt")
        file.write_text(text_of(tokenizer, a.tokens), encoding="utf-8")
        with LongDocument(load_model(path), tokenizer, file, memory=round(a.memory_gb * 1e9)) as document:
            print(json.dumps({"cpu": cpu_name(), "model": str(path), "chunks": len(document.chunks), "gb": a.memory_gb}))
            for task in a.task:
                for strategy in a.strategy or (SUMMARIES if task == "summarize" else QUESTIONS):
                    print(json.dumps(measure(document, task, strategy, a.memory_gb), ensure_ascii=False), flush=True)


if __name__ == "__main__":
    main()
