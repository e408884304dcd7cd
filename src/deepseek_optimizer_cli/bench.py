"""`dso bench MODEL`: speed, memory and quality of a model on this machine, compared with its limits and other engines. Or
(`--url`) the latency and throughput of a server.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from . import options as o
from .bench_long import bench_long
from .bench_modes import check_options
from .bench_server import bench_server

_LIST = "Comma-separated for several."
_MEASURE: dict[str, Any] = {"rich_help_panel": "Measurement"}
_QUALITY: dict[str, Any] = {"rich_help_panel": "Quality"}
_COMPARE: dict[str, Any] = {"rich_help_panel": "Comparisons"}
_REPORT: dict[str, Any] = {"rich_help_panel": "Report"}
_LONG: dict[str, Any] = {"rich_help_panel": "Long texts"}
_SERVER: dict[str, Any] = {"rich_help_panel": "Server"}


@o.takes_model_fields
def bench(
    ctx: typer.Context,
    model: Annotated[str | None, typer.Argument(metavar="MODEL", help=o.MODEL_HELP)] = None,
    prompt: Annotated[
        str, typer.Option("--prompt", metavar="TOKENS", help=f"Length of the prompt. {_LIST}", **_MEASURE)
    ] = "512",
    new: Annotated[
        str, typer.Option("--new", metavar="TOKENS", help=f"Number of tokens to generate. {_LIST}", **_MEASURE)
    ] = "64",
    depth: Annotated[
        str,
        typer.Option("--depth", metavar="TOKENS", help=f"Tokens in the KV cache before the prompt. {_LIST}", **_MEASURE),
    ] = "0",
    batch: Annotated[
        str, typer.Option("--batch", metavar="N", help=f"Number of concurrent requests. {_LIST}", **_MEASURE)
    ] = "1",
    repeats: Annotated[
        int, typer.Option("--repeats", min=1, metavar="N", help="Measured runs of each combination.", **_MEASURE)
    ] = 5,
    warmup: Annotated[
        int, typer.Option("--warmup", min=0, metavar="N", help="Unmeasured runs before the measured ones.", **_MEASURE)
    ] = 1,
    *,
    fields: dict[str, Any],
    quality: Annotated[
        bool,
        typer.Option(
            "--quality", help="Compare with the unoptimized model in fp32, on text from Python's documentation.", **_QUALITY
        ),
    ] = False,
    text: Annotated[
        Path | None,
        typer.Option(
            "--text", exists=True, dir_okay=False, metavar="FILE", help="Like --quality, but on this text file.", **_QUALITY
        ),
    ] = None,
    text_tokens: Annotated[
        int,
        typer.Option(
            "--text-tokens", min=2, metavar="TOKENS", help="Maximum length of the text for --quality and --text.", **_QUALITY
        ),
    ] = 2048,
    reference: Annotated[
        str | None,
        typer.Option(
            "--reference",
            metavar="MODEL",
            help="The unoptimized model to compare with. Default: MODEL; required if MODEL is packed.",
            **_QUALITY,
        ),
    ] = None,
    pairs: Annotated[
        Path | None,
        typer.Option(
            "--pairs",
            exists=True,
            dir_okay=False,
            metavar="FILE",
            help="File of source and reference texts, one pair per line; reports BLEU and chrF of the model's answers.",
            **_QUALITY,
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            "--against",
            metavar="ENGINES",
            help="Other engines to compare with, comma-separated: transformers, openvino, vllm, llama.cpp; also "
            "llama.cpp-avx2 and llama.cpp-avx512, which are built for those instruction sets.",
            **_COMPARE,
        ),
    ] = None,
    setup_peers: Annotated[
        bool,
        typer.Option(
            "--setup-peers",
            help="Install the engines that --against names, or all of them, each in a separate virtual environment.",
            **_COMPARE,
        ),
    ] = False,
    peer_model: Annotated[
        list[str] | None,
        typer.Option(
            "--peer-model", metavar="ENGINE=PATH", help="The model in the format of this engine. Repeatable.", **_COMPARE
        ),
    ] = None,
    ablate: Annotated[
        bool, typer.Option("--ablate", help="Also measure without each of the fusion rules, one at a time.", **_COMPARE)
    ] = False,
    rounds: Annotated[
        int,
        typer.Option(
            "--rounds",
            min=1,
            metavar="N",
            help="Number of rounds of --against and --ablate, in which the sides take turns.",
            **_COMPARE,
        ),
    ] = 3,
    baseline: Annotated[
        Path | None,
        typer.Option(
            "--baseline",
            exists=True,
            dir_okay=False,
            metavar="FILE",
            help="An earlier report, written with --json; the exit code is 1 if this run is slower.",
            **_COMPARE,
        ),
    ] = None,
    tolerance: Annotated[
        float,
        typer.Option(
            "--tolerance",
            min=0,
            metavar="PERCENT",
            help="With --baseline: slowdown that is not reported as a regression.",
            **_COMPARE,
        ),
    ] = 5,
    price_per_hour: Annotated[
        float | None,
        typer.Option(
            "--price-per-hour",
            min=0,
            metavar="PRICE",
            help="Price of this machine per hour, in any currency; reports the cost of a million tokens.",
            **_REPORT,
        ),
    ] = None,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write the report with charts to this HTML file.", **_REPORT)
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Also print the report as JSON, on the last line.", **_REPORT)
    ] = False,
    long: Annotated[
        bool,
        typer.Option(
            "--long", help="Compare accuracy, speed and memory of the attention modes on long texts instead.", **_LONG
        ),
    ] = False,
    lengths: Annotated[
        str | None,
        typer.Option(
            "--lengths",
            metavar="TOKENS",
            help="With --long: total lengths of text and answer, comma-separated. Default: 4096,8192,16384,32768.",
            **_LONG,
        ),
    ] = None,
    modes: Annotated[
        str | None,
        typer.Option(
            "--modes",
            metavar="MODES",
            help="With --long: any of flash, sliding, sparse, comma-separated. Default: all.",
            **_LONG,
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            "--tasks",
            metavar="TASKS",
            help="With --long: any of single, multikey, multivalue, multiquery (needles), variables, common, frequent "
            "(words) and qa, comma-separated. Default: all.",
            **_LONG,
        ),
    ] = None,
    samples: Annotated[
        int, typer.Option("--samples", min=1, metavar="N", help="With --long: number of samples per task and length.", **_LONG)
    ] = 3,
    url: Annotated[
        str | None,
        typer.Option(
            "--url",
            metavar="URL",
            help="Measure a running server with an OpenAI-compatible API instead, e.g. http://host:8000, with --prompt and "
            "--new tokens per request.",
            **_SERVER,
        ),
    ] = None,
    name: o.ServerModel = None,
    api_key: o.ApiKey = None,
    concurrency: Annotated[
        int, typer.Option("--concurrency", metavar="N", help="With --url: maximum number of requests at once.", **_SERVER)
    ] = 16,
    rate: Annotated[
        float | None,
        typer.Option(
            "--rate",
            metavar="PER_SECOND",
            help="With --url: requests per second, arriving at random. Default: the next one follows when one ends.",
            **_SERVER,
        ),
    ] = None,
    requests: Annotated[
        int | None,
        typer.Option(
            "--requests", metavar="N", help="With --url: number of requests. Default: four times --concurrency.", **_SERVER
        ),
    ] = None,
    endpoint: Annotated[
        str, typer.Option("--endpoint", metavar="NAME", help="With --url: chat or completions.", **_SERVER)
    ] = "chat",
    seed: Annotated[
        int | None,
        typer.Option(
            "--seed",
            metavar="N",
            help="With --url: seed of the random prompts and arrivals. Default: new prompts, which no cache knows.",
            **_SERVER,
        ),
    ] = None,
) -> None:
    """Measure a model or a server: time to first token, tokens/s, memory and quality."""
    check_options(ctx, "--url" if url is not None else "--long" if long else "")
    if url is not None:
        bench_server(
            prompt, new, as_json, url=url, key=api_key, model=name, concurrency=concurrency, rate=rate, requests=requests,
            endpoint=endpoint, seed=seed,
        )  # fmt: skip
        return
    names = [name.strip() for name in (against or "").split(",") if name.strip()]
    if setup_peers:
        _set_up(names)
    if model is None:
        if setup_peers:
            return
        raise ValueError("missing MODEL: a directory, a .gguf file or a model name on the Hugging Face Hub")

    if html:
        from deepseek_optimizer.bench.html import check_target

        check_target(html)
    if long:
        bench_long(model, fields, lengths, modes, tasks, samples, html, as_json)
        return

    from deepseek_optimizer.bench.baseline import read
    from deepseek_optimizer.bench.run_benchmark import Request, run
    from deepseek_optimizer.bench.work import grid, numbers

    from .model import no_bars_in_pipes

    no_bars_in_pipes()
    request = Request(
        model=model,
        fields=fields,
        works=grid(*(numbers(text) for text in (prompt, new, depth, batch))),
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


def _peer_models(options: list[str]) -> dict[str, str]:
    models = {}
    for text in options:
        name, equals, path = text.partition("=")
        if not (name and equals and path):
            raise ValueError(f"--peer-model must be ENGINE=PATH, got {text!r}")
        models[name] = path
    return models


def _note(text: str) -> None:
    """Reports progress on stderr: some steps take minutes."""
    typer.echo(f"dso: {text}", err=True)


def _write(report: dict[str, Any], html: Path | None, as_json: bool) -> None:
    from rich.console import Console

    from deepseek_optimizer.bench.html import page, write
    from deepseek_optimizer.bench.terminal import show

    show(Console(highlight=False), report)
    if html:
        write(html, page(report))
    if as_json:
        typer.echo(json.dumps(report, ensure_ascii=False))
