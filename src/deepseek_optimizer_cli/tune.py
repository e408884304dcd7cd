"""`dso tune MODEL`: finds settings for a model on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from . import options as o

_KV_FORMATS = ("auto", "int8", "int4")


@o.takes_model_fields
def tune(
    model: o.Model,
    goal: Annotated[
        str, typer.Option("--goal", metavar="GOAL", help="What to improve: latency, throughput or memory.")
    ] = "latency",
    trace: Annotated[
        str,
        typer.Option(
            "--trace",
            metavar="FILE|NAME",
            help="Requests to replay: a file with one JSON object per line (at, prompt_tokens, new_tokens, group, "
            "shared_tokens, or prompt), or chat, documents or agents.",
        ),
    ] = "chat",
    trials: Annotated[
        int,
        typer.Option(
            "--trials", min=2, metavar="N", help="Settings to measure by replays at most; hundreds of others are simulated."
        ),
    ] = 24,
    kl_budget: Annotated[
        float | None,
        typer.Option(
            "--kl-budget",
            min=0,
            metavar="NATS",
            help="Also try an int8 and an int4 KV cache and, of a model in floats, int8, q4_1 and int4 weights, or of one in "
            "int8_nested its qualities, as far as the KL divergence from the model as it is given stays within this.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Seed of the search.")] = 0,
    *,
    fields: dict[str, Any],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", dir_okay=False, metavar="FILE", help="Where to write the profile. Default: where auto finds it."
        ),
    ] = None,
    html: Annotated[
        Path | None, typer.Option("--html", dir_okay=False, metavar="FILE", help="Write the report to this HTML file.")
    ] = None,
    device: o.Device = None,
    kernels: Annotated[
        bool,
        typer.Option(
            "--kernels",
            help="With --device cuda: instead of settings, measure how this card's kernels divide their work best. Later loads "
            "on this card use what is found, whatever the model. Not run on a card yet.",
        ),
    ] = False,
    activation: Annotated[
        str | None,
        typer.Option(
            "--activation",
            metavar="auto|fp8",
            help="With --kernels: measure with this setting. With fp8, alternatives to products in FP8 are measured too.",
        ),
    ] = None,
    as_json: o.AsJson = False,
) -> None:
    """Find the settings of a model that serve a trace of requests best on this machine. Nothing else should run meanwhile."""
    if kernels:
        _tune_kernels(model, device or "cuda", fields if activation is None else fields | {"activation": activation}, as_json)
        return
    if activation is not None:
        raise ValueError("--activation is for --kernels")
    if device is not None:
        raise ValueError("--device is for --kernels: settings are searched for the CPU")
    import datetime
    from contextlib import nullcontext

    from rich.console import Console

    from deepseek_optimizer.backends.cpu import thread_limits
    from deepseek_optimizer.bench.html import write
    from deepseek_optimizer.bench.terminal import show_sections
    from deepseek_optimizer.integration.load.resolve import resolve
    from deepseek_optimizer.optimized_model import profile_options
    from deepseek_optimizer.profiles import Profile, machine_identity, model_identity, save
    from deepseek_optimizer.serving import STALL
    from deepseek_optimizer.tune.cost_model import CostModel
    from deepseek_optimizer.tune.formats import PackedCopies, WeightFormats, weight_formats
    from deepseek_optimizer.tune.page import page, sections, tune_report
    from deepseek_optimizer.tune.replay import ModelMeasure
    from deepseek_optimizer.tune.search import import_optuna, search
    from deepseek_optimizer.tune.settings import GOALS, Settings, space
    from deepseek_optimizer.tune.traces import BUILT_IN, describe, read_trace

    from .model import no_bars_in_pipes, print_json

    if goal not in GOALS:
        raise ValueError(f"--goal must be one of {', '.join(GOALS)}, got {goal!r}")
    if searched := [flag for name, flag in (("threads", "--threads"), ("kv_cache", "--kv-cache")) if name in fields]:
        raise ValueError(f"{searched[0]} is searched; leave it out")
    requests = BUILT_IN[trace]() if trace in BUILT_IN else read_trace(Path(trace))
    import_optuna()
    place = resolve(model)
    no_bars_in_pipes()
    threads, cpus = thread_limits()
    defaults = Settings(threads=threads)
    costs = CostModel(defaults, STALL)
    formats = weight_formats(place, fields) if kl_budget else WeightFormats()
    if formats.note:
        _note(formats.note)
    values = space(threads, cpus, _KV_FORMATS if kl_budget else _KV_FORMATS[:1], formats.precisions, formats.qualities)
    with PackedCopies(place) if len(formats.precisions) > 1 else nullcontext() as copies:
        measure = ModelMeasure(place, fields, requests, at_once=goal == "throughput", observe=costs.add, copies=copies)
        found = search(measure, costs, values, defaults, goal, trials=trials, kl_budget=kl_budget, seed=seed, note=_note)
        del measure  # its models map files that are removed now
    best = found.best.to_fields() if found.best != defaults else {}
    figures = {"gain": found.gain, "defaults": vars(found.default_figures), "these": vars(found.best_figures)}
    profile = Profile(
        machine_identity(), model_identity(place), goal, Path(trace).name, best, found.best.drafts if best else None, figures,
        datetime.date.today().isoformat(), options=profile_options(None, fields),
        quality=found.best.quality if found.best.quality != defaults.quality else None,
    )  # fmt: skip
    path = str(save(profile, output))
    report = tune_report(found, goal, profile.trace, describe(requests), model, path)
    if html:
        write(html, page(report, found))
    if as_json:
        print_json(report)
    else:
        show_sections(Console(highlight=False), sections(found, goal, profile.trace, path)[:2])


def _tune_kernels(model: str, device: str, fields: dict[str, Any], as_json: bool) -> None:
    """`dso tune --kernels`."""
    from deepseek_optimizer.backends.cuda.cost_table import card_of
    from deepseek_optimizer.optimized_model import load_model
    from deepseek_optimizer.tune.kernels import tune_kernels

    from .model import no_bars_in_pipes, print_json

    no_bars_in_pipes()
    loaded = load_model(model, device=device, backend="cuda", **fields)
    found = tune_kernels(loaded, card_of(loaded.device), _note)
    if as_json:
        print_json(found.to_dict())
        return
    for gain in found.gains:
        typer.echo(f"{gain.setting}: {gain.before} -> {gain.after}, {gain.gain:.1%} faster")
    for choice in found.alternatives:
        typer.echo(f"{choice.name}: used from {choice.rows} rows of a step on")
    changed = found.gains or found.alternatives
    typer.echo(f"{'done' if changed else 'nothing is faster than before'}; written to {found.path}")


def _note(text: str) -> None:
    typer.echo(f"dso: {text}", err=True)
