"""`dso cost MODEL`: what a million tokens cost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options as o

if TYPE_CHECKING:
    from deepseek_optimizer.bench.scaling import Costs


@o.takes_model_fields
def cost(
    model: o.Model,
    prompt: Annotated[int, typer.Option("--prompt", min=1, metavar="TOKENS", help="Length of a prompt.")] = 512,
    new: Annotated[int, typer.Option("--new", min=2, metavar="TOKENS", help="Length of an answer.")] = 256,
    batch: Annotated[int, typer.Option("--batch", min=1, metavar="N", help="Requests at once.")] = 16,
    repeats: Annotated[int, typer.Option("--repeats", min=1, metavar="N", help="Measured runs.")] = 3,
    *,
    fields: dict[str, Any],
    price_per_hour: Annotated[
        float | None,
        typer.Option("--price-per-hour", min=0, metavar="PRICE", help="Price of this machine, in any currency."),
    ] = None,
    instances: Annotated[
        str,
        typer.Option(
            "--instances",
            metavar="NAMES",
            help="Machines to predict, comma-separated; all, or none. Without --price, their costs are at example prices in US "
            "dollars.",
        ),
    ] = "all",
    price: Annotated[
        list[str] | None,
        typer.Option(
            "--price", metavar="NAME=PRICE", help="What you pay for an instance per hour, instead of the example. Repeatable."
        ),
    ] = None,
    hosted: Annotated[
        list[str] | None,
        typer.Option(
            "--hosted",
            metavar="NAME=IN,OUT",
            help="A provider's prices for a million prompt and answer tokens, to compare with. Repeatable.",
        ),
    ] = None,
    wish: Annotated[
        float, typer.Option("--wish", min=1e-9, metavar="PRICE", help="Price of a million tokens to compare with.")
    ] = 0.10,
    costs: Annotated[
        Path | None,
        typer.Option(
            "--costs",
            exists=True,
            dir_okay=False,
            metavar="FILE",
            help="What predictions are made from, of python -m benchmarks.scaling --measure. Default: this machine is "
            "measured, which takes about a minute.",
        ),
    ] = None,
    as_json: o.AsJson = False,
) -> None:
    """Show what a million tokens cost on this machine, and by prediction on rented ones. Nothing else should run meanwhile."""
    from rich.console import Console

    from deepseek_optimizer.bench.cost import Hosted, Speed, cost_report, needed_bytes, predicted_speeds, sections, too_small
    from deepseek_optimizer.bench.instances import INSTANCES
    from deepseek_optimizer.bench.measure import measure
    from deepseek_optimizer.bench.memory_traffic import traffic_of
    from deepseek_optimizer.bench.step_work import step_work
    from deepseek_optimizer.bench.terminal import show_sections
    from deepseek_optimizer.bench.work import Work

    from .model import no_bars_in_pipes, print_json

    names = [] if instances == "none" else list(INSTANCES) if instances == "all" else [n.strip() for n in instances.split(",")]
    if unknown := [name for name in names if name not in INSTANCES]:
        raise ValueError(f"--instances: there is no {unknown[0]!r}; known: {', '.join(INSTANCES)}")
    prices = {name: values[0] for name, values in _pairs("--price", price, 1).items()}
    providers = {name: Hosted(*values) for name, values in _pairs("--hosted", hosted, 2).items()}
    if price_per_hour is None and not names:
        raise ValueError("nothing to compute: give --price-per-hour, or --instances")
    work = Work(prompt=prompt, new=new, batch=batch)
    cost_report(work, None, None, {}, prices, providers, wish)  # raises an error before anything is measured
    known = None if costs is None else _read(costs)

    from deepseek_optimizer import load_model

    no_bars_in_pipes()
    fields["batch_size_range"] = (1, batch)
    loaded = load_model(model, **fields)
    small: list[str] = []
    if names:  # before anything is measured: it may be an error
        step, traffic = step_work(loaded, work), traffic_of(loaded)
        small = too_small(names, needed_bytes(loaded.report().bytes_after, traffic, work))
        names = [name for name in names if name not in small]
    (entry,) = measure(loaded, [work], repeats=repeats, note=_note)
    figures = entry["figures"]
    speed = Speed(figures["prefill_tok_s"]["p50"], figures["decode_tok_s"]["p50"])
    predicted = {}
    if names:
        from deepseek_optimizer.bench.scaling_costs import measure_costs

        known = known or measure_costs(precision=step.main_format, note=_note)
        predicted = {name: predicted_speeds(step, traffic, known, work, name) for name in names}
    report = {"model": model, **cost_report(work, speed, price_per_hour, predicted, prices, providers, wish, small)}
    if as_json:
        print_json(report)
    else:
        show_sections(Console(highlight=False), sections(report))


def _pairs(option: str, texts: list[str] | None, count: int) -> dict[str, list[float]]:
    """NAME=NUMBER,... of an option that may be repeated; each number must be above zero."""
    found = {}
    for text in texts or []:
        name, _, values = text.partition("=")
        try:
            numbers = [float(value) for value in values.split(",")]
        except ValueError:
            numbers = []
        if not name or len(numbers) != count or not all(0 < number < float("inf") for number in numbers):
            form = "NAME=PRICE" if count == 1 else "NAME=IN,OUT"
            raise ValueError(f"{option} must be {form} with prices above zero, got {text!r}")
        found[name] = numbers
    return found


def _read(path: Path) -> Costs:
    from deepseek_optimizer.bench.scaling import Costs
    from deepseek_optimizer.errors import DataError

    try:
        return Costs.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        message = f"not what python -m benchmarks.scaling --measure writes ({type(error).__name__}: {error})"
        raise DataError(message, file=path) from None


def _note(text: str) -> None:
    typer.echo(f"dso: {text}", err=True)
