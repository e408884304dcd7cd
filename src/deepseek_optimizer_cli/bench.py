"""`dso bench MODEL`: speed, memory and quality of a model on this machine, against its limits and against others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from . import options as o
from .bench_long import bench_long, check_options

_LISTS = "One number, or several with commas between."
_LONG: dict[str, Any] = {"rich_help_panel": "With --long"}


@o.takes_model_fields
def bench(
    ctx: typer.Context,
    model: Annotated[str | None, typer.Argument(metavar="[MODEL]", help=o.MODEL_HELP)] = None,
    prompt: Annotated[str, typer.Option("--prompt", help=f"Prompt tokens. {_LISTS}")] = "512",
    new: Annotated[str, typer.Option("--new", help=f"Tokens to generate. {_LISTS}")] = "64",
    depth: Annotated[str, typer.Option("--depth", help=f"Tokens in the cache before the prompt. {_LISTS}")] = "0",
    batch: Annotated[str, typer.Option("--batch", help=f"Requests at once. {_LISTS}")] = "1",
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Measured runs of each.")] = 5,
    warmup: Annotated[int, typer.Option("--warmup", min=0, help="Runs before those.")] = 1,
    *,
    fields: dict[str, Any],
    price_per_hour: Annotated[
        float | None, typer.Option("--price-per-hour", min=0, help="Of this machine: shows what a million tokens cost.")
    ] = None,
    quality: Annotated[
        bool, typer.Option("--quality", help="Compare with the unoptimised model in fp32, on Python's documentation.")
    ] = False,
    text: Annotated[Path | None, typer.Option("--text", exists=True, dir_okay=False, help="The same on this text.")] = None,
    text_tokens: Annotated[int, typer.Option("--text-tokens", min=2, help="At most, for --quality and --text.")] = 2048,
    reference: Annotated[
        str | None, typer.Option("--reference", help="The unoptimised model. Default: MODEL, unless that is packed.")
    ] = None,
    pairs: Annotated[
        Path | None,
        typer.Option(
            "--pairs", exists=True, dir_okay=False, help="Sources and references: shows BLEU and chrF of the answers."
        ),
    ] = None,
    ablate: Annotated[bool, typer.Option("--ablate", help="Leave out each fusion rule in turn.")] = False,
    against: Annotated[
        str | None,
        typer.Option(
            "--against",
            help="Engines to compare with, commas between: transformers, openvino, vllm, llama.cpp; or llama.cpp-avx2 and "
            "llama.cpp-avx512, built for less.",
        ),
    ] = None,
    peer_model: Annotated[
        list[str] | None, typer.Option("--peer-model", metavar="PEER=PATH", help="The model in that peer's own format.")
    ] = None,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Turns for --against and --ablate.")] = 3,
    setup_peers: Annotated[
        bool, typer.Option("--setup-peers", help="Make the environments of the engines in --against; of all without it.")
    ] = False,
    baseline: Annotated[
        Path | None,
        typer.Option("--baseline", exists=True, dir_okay=False, help="An earlier --json: exit code 1 if this is slower."),
    ] = None,
    tolerance: Annotated[
        float, typer.Option("--tolerance", min=0, help="With --baseline: percent that are no regression.")
    ] = 5,
    long: Annotated[
        bool, typer.Option("--long", help="Modes of attention over long texts instead: accuracy, speed, memory.", **_LONG)
    ] = False,
    lengths: Annotated[
        str | None,
        typer.Option("--lengths", help="Tokens of text and answer, commas between. Default: 4096 to 32768.", **_LONG),
    ] = None,
    modes: Annotated[
        str | None, typer.Option("--modes", help="Some of flash, sliding and sparse, commas between. Default: all.", **_LONG)
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            "--tasks",
            help="Some of single, multikey, multivalue, multiquery (needles), variables, common, frequent (words) and qa. "
            "Default: all.",
            **_LONG,
        ),
    ] = None,
    samples: Annotated[int, typer.Option("--samples", min=1, help="Of each task at each length.", **_LONG)] = 3,
    html: Annotated[Path | None, typer.Option("--html", help="Write the report to this file, with plots.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON too, as the last line.")] = False,
) -> None:
    """Measure a model: time to first token, tokens a second, memory, quality."""
    check_options(ctx, long)
    names = [name.strip() for name in (against or "").split(",") if name.strip()]
    if setup_peers:
        _set_up(names)
    if model is None:
        if setup_peers:
            return
        raise ValueError("name a model: a directory, a .gguf file or a name on the hub")

    if long:
        bench_long(model, fields, lengths, modes, tasks, samples, html, as_json)
        return

    from deepseek_optimizer.bench.baseline import read
    from deepseek_optimizer.bench.report import Request, run
    from deepseek_optimizer.bench.work import grid, numbers

    from .model import no_bars_in_pipes

    no_bars_in_pipes()
    request = Request(
        model=model,
        fields=fields,
        works=grid(*(numbers(given) for given in (prompt, new, depth, batch))),
        repeats=repeats,
        warmup=warmup,
        quality=quality or text is not None,
        text=text,
        text_tokens=text_tokens,
        reference=reference,
        pairs=pairs,
        ablate=ablate,
        against=names,
        peer_models=_peer_models(peer_model or []),
        rounds=rounds,
        price_per_hour=price_per_hour,
        baseline=read(baseline) if baseline else None,
        tolerance=tolerance / 100,
    )
    report = run(request, _note)
    _write(report, html, as_json)
    if any(row["regressed"] for row in report.get("baseline", ())):
        raise typer.Exit(1)


def _set_up(names: list[str]) -> None:
    from deepseek_optimizer.bench.peers import PEERS, get_peer
    from deepseek_optimizer.bench.peers.environments import setup

    for peer in [get_peer(name) for name in names] or list(PEERS.values()):
        _note(f"setting up {peer.name}")
        typer.echo(f"{peer.name}: {setup(peer)}")


def _peer_models(given: list[str]) -> dict[str, str]:
    found = {}
    for text in given:
        name, equals, path = text.partition("=")
        if not (name and equals and path):
            raise ValueError(f"--peer-model takes PEER=PATH, got {text!r}")
        found[name] = path
    return found


def _note(text: str) -> None:
    """What is going on, on stderr: some of it takes minutes."""
    typer.echo(f"dso: {text}", err=True)


def _write(report: dict[str, Any], html: Path | None, as_json: bool) -> None:
    from rich.console import Console

    from deepseek_optimizer.bench.html import page
    from deepseek_optimizer.bench.table import show

    show(Console(highlight=False), report)
    if html:
        html.write_text(page(report), encoding="utf-8")
    if as_json:
        typer.echo(json.dumps(report, ensure_ascii=False))
