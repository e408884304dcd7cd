"""`dso longdoc MODEL FILE... --ask "..."`: answers from documents of any length, with citations."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options as o

if TYPE_CHECKING:
    from deepseek_optimizer.longdoc.citations import Citation
    from deepseek_optimizer.longdoc.document import Document
    from deepseek_optimizer.longdoc.long_document import DocumentAnswer, LongDocument

_MAX_QUOTE = 240  # characters shown of a cited passage


@o.takes_model_fields
def longdoc(
    model: o.Model,
    files: Annotated[
        list[Path],
        typer.Argument(metavar="FILE", help="Text, Markdown, HTML, PDF, Word or source file, or a directory of such files."),
    ],
    ask: Annotated[str | None, typer.Option("--ask", "-a", metavar="QUESTION", help="Question to answer.")] = None,
    summarize: Annotated[bool, typer.Option("--summarize", help="Summarize the documents.")] = False,
    extract: Annotated[
        Path | None,
        typer.Option("--extract", metavar="SCHEMA.json", help="Extract data that matches a JSON schema of an object."),
    ] = None,
    strategy: Annotated[
        str,
        typer.Option(
            "--strategy",
            "-s",
            metavar="NAME",
            help="How to process the documents: whole, window, map_reduce or retrieve; auto chooses and reports why.",
        ),
    ] = "auto",
    max_length: Annotated[int, typer.Option("--max-length", min=1, metavar="TOKENS", help="Maximum length of a chunk.")] = 4096,
    stride: Annotated[int, typer.Option("--stride", min=0, metavar="TOKENS", help="Overlap of consecutive chunks.")] = 1024,
    top: Annotated[
        int, typer.Option("--top", min=1, metavar="N", help="With retrieve: maximum number of chunks from which to answer.")
    ] = 4,
    memory_gb: Annotated[
        float | None,
        typer.Option(
            "--memory-gb", metavar="GB", help="Memory limit in gigabytes, without the weights. Default: the free memory."
        ),
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option(
            "--cache", metavar="DIR", help="Directory in which to save the KV cache of the documents for later questions."
        ),
    ] = None,
    max_new_tokens: o.MaxNewTokens = 512,
    ocr: Annotated[
        str | None,
        typer.Option(
            "--ocr",
            metavar="MODEL",
            help="A model that sees, by which scanned pages of PDFs and pictures are read. Default: they are reported.",
        ),
    ] = None,
    *,
    fields: dict[str, Any],
    as_json: o.AsJson = False,
) -> None:
    """Answer a question about documents of any length, summarize them, or extract data."""
    if (ask is not None) + summarize + (extract is not None) != 1:
        raise ValueError("give exactly one of --ask QUESTION, --summarize and --extract SCHEMA.json")
    if memory_gb is not None and not 0 < memory_gb < 1e6:
        raise ValueError(f"--memory-gb must be above 0, got {memory_gb:g}")
    if summarize and strategy == "retrieve":
        raise ValueError(
            "--strategy retrieve needs a question, but --summarize covers the whole document; choose another strategy"
        )

    from deepseek_optimizer.longdoc.long_document import LongDocument
    from deepseek_optimizer.longdoc.strategies import check_name
    from deepseek_optimizer.longdoc.tasks import Extraction, Question

    from .interrupt import stop_on_interrupt
    from .model import load, print_json

    check_name(strategy)
    schema = None if extract is None else _schema(extract)
    _ = Extraction(schema) if schema is not None else Question(ask) if ask is not None else None  # raises if invalid
    document = _read(files, ocr)
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


def _read(files: list[Path], ocr: str | None) -> Document:
    from deepseek_optimizer.longdoc.read import read_documents
    from deepseek_optimizer.system.progress import show_progress

    from .model import no_bars_in_pipes

    if ocr is None:
        with show_progress("Reading files") as progress:
            return read_documents(files, progress=progress)
    from deepseek_optimizer.longdoc.ocr_model import OcrModel

    no_bars_in_pipes()
    with OcrModel(ocr) as reader, show_progress("Reading files") as progress:
        document = read_documents(files, progress=progress, ocr=reader)
    if reader.truncated:
        typer.echo(
            f"dso: {reader.truncated} pages have more than {reader.max_tokens:,} tokens of text, and were truncated", err=True
        )
    return document


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
        raise ValueError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(schema, dict):
        raise ValueError(f"{path}: must contain a JSON schema, which is a JSON object")
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
    memory = "" if peak is None else f", {peak:.2f} GB besides the weights"
    cached = f" ({tokens.cached:,} cached)" if tokens.cached else ""
    typer.echo(
        f"{answer.strategy}: {answer.reason}; {tokens.read:,} tokens read{cached}, {tokens.generated:,} generated, "
        f"{answer.seconds:.1f} s{memory}",
        err=True,
    )


def _place(citation: Citation) -> str:
    if citation.page is None:
        return f"{citation.file}:{citation.line}"
    box = "" if citation.box is None else f" ({', '.join(f'{edge:.2f}' for edge in citation.box)})"
    return f"{citation.file}, page {citation.page}{box}"


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _MAX_QUOTE else f"{line[: _MAX_QUOTE - 1]}…"
