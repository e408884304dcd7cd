"""`dso longdoc MODEL FILE... --ask "..."`: answers from documents of any length, with their places in the text."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options as o

if TYPE_CHECKING:
    from deepseek_optimizer.longdoc.citations import Citation
    from deepseek_optimizer.longdoc.long_document import DocumentAnswer, LongDocument

_SHOWN = 240  # characters of a passage


@o.takes_model_fields
def longdoc(
    model: o.Model,
    files: Annotated[
        list[Path], typer.Argument(metavar="FILE...", help="Text, Markdown, HTML, PDF, Word, source code; directories too.")
    ],
    ask: Annotated[str | None, typer.Option("--ask", "-a", metavar="QUESTION", help="Answer a question.")] = None,
    summarize: Annotated[bool, typer.Option("--summarize", help="Summarize all of it.")] = False,
    extract: Annotated[
        Path | None, typer.Option("--extract", metavar="SCHEMA.json", help="Extract data by a JSON schema of an object.")
    ] = None,
    strategy: Annotated[
        str,
        typer.Option("--strategy", "-s", help="whole, window, map_reduce or retrieve; auto chooses and says why."),
    ] = "auto",
    max_length: Annotated[int, typer.Option("--max-length", min=1, help="Tokens of a chunk at most.")] = 4096,
    stride: Annotated[int, typer.Option("--stride", min=0, help="Tokens that a chunk shares with the one before.")] = 1024,
    top: Annotated[int, typer.Option("--top", min=1, help="Chunks that an answer is retrieved from at most.")] = 4,
    memory_gb: Annotated[
        float | None,
        typer.Option("--memory-gb", metavar="GB", help="All that this may take above the weights. Default: what is free."),
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option("--cache", metavar="DIR", help="Keep what was read of a document that fits, for the next question."),
    ] = None,
    max_new_tokens: o.MaxNewTokens = 512,
    *,
    fields: dict[str, Any],
    as_json: o.AsJson = False,
) -> None:
    """Answer from documents of any length: a question, a summary, or data."""
    if (ask is not None) + summarize + (extract is not None) != 1:
        raise ValueError("say what to do: one of --ask QUESTION, --summarize, --extract SCHEMA.json")
    if memory_gb is not None and not 0 < memory_gb < 1e6:
        raise ValueError(f"--memory-gb must be above 0, got {memory_gb:g}")
    if summarize and strategy == "retrieve":
        raise ValueError("--strategy retrieve finds passages for a question; a summary is of the whole document")

    from deepseek_optimizer.longdoc.long_document import LongDocument
    from deepseek_optimizer.longdoc.read import read_documents
    from deepseek_optimizer.longdoc.strategies import check_name
    from deepseek_optimizer.longdoc.tasks import Extraction, Question
    from deepseek_optimizer.system.progress import show_progress

    from .interrupt import stop_on_interrupt
    from .model import load, print_json

    check_name(strategy)
    schema = None if extract is None else _schema(extract)
    _ = Extraction(schema) if schema is not None else Question(ask) if ask is not None else None  # wrong ones end here
    with show_progress("Reading files") as progress:
        document = read_documents(files, progress=progress)
    for problem in document.problems:
        typer.echo(f"dso: {problem.file}: {problem.message}", err=True)
    for file in document.files:
        for warning in file.warnings:
            typer.echo(f"dso: {file.name}: {warning}", err=True)
    loaded, tokenizer = load(model, fields)
    options: dict[str, Any] = {"max_length": max_length, "stride": stride, "strategy": strategy, "top": top}
    options |= {"cache_dir": cache, "max_tokens": max_new_tokens}
    options["memory"] = None if memory_gb is None else round(memory_gb * 1e9)
    with LongDocument(loaded, tokenizer, document, **options) as long_document, stop_on_interrupt() as stop:
        answer = _answer(long_document, ask, schema, stop)
    for note in answer.notes:
        typer.echo(f"dso: {note}", err=True)
    if as_json:
        print_json(_summary(answer))
    else:
        _print(answer)


def _answer(document: LongDocument, question: str | None, schema: dict[str, Any] | None, stop: Any) -> DocumentAnswer:
    if question is not None:
        return document.ask(question, stop=stop)
    if schema is not None:
        return document.extract(schema, stop=stop)
    return document.summarize(stop=stop)


def _schema(path: Path) -> dict[str, Any]:
    try:
        schema = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: is no JSON: {error}") from None
    if not isinstance(schema, dict):
        raise ValueError(f"{path}: must hold a JSON schema, an object")
    return schema


def _summary(answer: DocumentAnswer) -> dict[str, Any]:
    return {
        "answer": answer.answer,
        "citations": [asdict(citation) for citation in answer.citations],
        "strategy": answer.strategy,
        "tokens": asdict(answer.tokens),
        "seconds": answer.seconds,
        "peak_memory_gb": answer.peak_memory_gb,
    }


def _print(answer: DocumentAnswer) -> None:
    text = answer.answer if isinstance(answer.answer, str) else json.dumps(answer.answer, ensure_ascii=False, indent=2)
    typer.echo(text)
    if answer.citations:
        typer.echo("")
    for number, citation in enumerate(answer.citations, 1):
        typer.echo(f"[{number}] {_place(citation)}: {_short(citation.text)}")
    tokens, peak = answer.tokens, answer.peak_memory_gb
    memory = "" if peak is None else f", {peak:.2f} GB above the weights"
    known = f" ({tokens.cached:,} known from before)" if tokens.cached else ""
    typer.echo(
        f"{answer.strategy}: {answer.reason}; {tokens.read:,} tokens read{known}, {tokens.generated:,} written, "
        f"{answer.seconds:.1f} s{memory}",
        err=True,
    )


def _place(citation: Citation) -> str:
    return f"{citation.file}:{citation.line}" if citation.page is None else f"{citation.file}, page {citation.page}"


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _SHOWN else f"{line[: _SHOWN - 1]}…"
