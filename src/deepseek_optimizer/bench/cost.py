"""What a million tokens cost: on this machine at its measured speed, on others at predicted ones, beside hosted prices.

A machine is paid by the hour and assumed to be busy all the time, with `Work.batch` requests at once. A prompt token costs
the time of prompts divided by their tokens, a generated one that of decoding. `blended` is the cost of all tokens of a request,
prompt and answer, divided by their number: hosted prices are blended with the same lengths.

Predicted speeds of prompts assume that all cores together compute as much as each alone: they are upper bounds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import ConfigError
from .instances import DATE, INSTANCES, SOURCE
from .memory_traffic import Traffic
from .scaling import Costs, predict, predict_prefill
from .sections import Section
from .step_work import StepWork
from .work import Work

WISH = 0.10  # dollars for a million tokens
_HERE = "this machine"


@dataclass(frozen=True)
class Speed:
    """Tokens per second of all requests together: of prompts, and of answers."""

    prompt: float
    answer: float


@dataclass(frozen=True)
class Hosted:
    """A provider's prices per million tokens."""

    prompt: float
    answer: float


def machine_cost(per_hour: float, speed: Speed, work: Work) -> dict[str, float]:
    """Cost of a million tokens: "in", "out", "blended", in the currency of `per_hour`."""
    each = per_hour / 3600 * 1e6
    prices = Hosted(each / speed.prompt, each / speed.answer)
    return {"in": prices.prompt, "out": prices.answer, "blended": blended(prices, work)}


def affordable(wish: float, speed: Speed, work: Work) -> float:
    """The price per hour at which a million tokens cost `wish`."""
    return wish / machine_cost(1.0, speed, work)["blended"]


def blended(prices: Hosted, work: Work) -> float:
    """Cost of a million tokens of requests of these lengths."""
    return (work.prompt * prices.prompt + work.new * prices.answer) / (work.prompt + work.new)


def predicted_speeds(step: StepWork, traffic: Traffic, costs: Costs, work: Work, name: str) -> tuple[Speed, Speed]:
    """The lowest and the highest predicted speed of an instance."""
    machine = INSTANCES[name].machine
    decode = predict(step, costs, machine)
    prompt = work.batch * work.prompt / predict_prefill(traffic.prefill_operations(work), costs, machine)
    return Speed(prompt, decode.low), Speed(prompt, decode.high)


def needed_bytes(weights: int, traffic: Traffic, work: Work) -> float:
    """Memory that a model needs for `work.batch` requests: weights and cache, without what the process takes besides.

    Args:
        weights: bytes of all weights.
        traffic: of the model.
        work: lengths, and requests at once.
    """
    tokens = work.length * (traffic.kv_bytes + traffic.chosen_bytes)
    windows = sum(size * min(work.length, most) for size, most in traffic.windows)
    return weights + work.batch * (tokens + windows + traffic.state_bytes)


def too_small(names: Sequence[str], needed: float) -> list[str]:
    """Those instances that have less memory than `needed` bytes."""
    return [name for name in names if INSTANCES[name].memory_gb * 2**30 < needed]


def cost_report(
    work: Work,
    measured: Speed | None,
    per_hour: float | None,
    predicted: Mapping[str, tuple[Speed, Speed]],
    prices: Mapping[str, float],
    hosted: Mapping[str, Hosted],
    wish: float = WISH,
    left_out: Sequence[str] = (),
) -> dict[str, Any]:
    """The report of `dso cost`, of JSON types.

    Args:
        work: lengths, and requests at once.
        measured, per_hour: speed of this machine, and its price; None: unknown.
        predicted: instance -> lowest and highest speed.
        prices: instance -> price per hour, which overrides the table's.
        hosted: name -> prices to compare with.
        wish: price of a million tokens to compare with.
        left_out: instances whose memory is too small for the model.

    Raises:
        ConfigError: a price is for an instance that is not in the table, or not above zero.
    """
    if unknown := sorted(prices.keys() - INSTANCES.keys()):
        raise ConfigError(f"--price: there is no instance {unknown[0]!r}; known: {', '.join(INSTANCES)}")
    rows: list[dict[str, Any]] = []
    if measured is not None and per_hour is not None:
        rows.append(_row(_HERE, "measured", per_hour, (measured, measured), work, wish))
    for name, speeds in predicted.items():
        row = _row(name, "predicted", prices.get(name, INSTANCES[name].per_hour), speeds, work, wish)
        rows.append({**row, "example_price": name not in prices})
    return {
        "work": asdict(work),
        "this_machine": None
        if measured is None
        else {**asdict(measured), "affordable_per_hour": affordable(wish, measured, work)},
        "machines": rows,
        "hosted": [
            {"name": name, "in": one.prompt, "out": one.answer, "blended": blended(one, work)} for name, one in hosted.items()
        ],
        "too_small": list(left_out),
        "prices": {"source": SOURCE, "date": DATE, "given": dict(prices)},
        "wish": wish,
    }


def _row(name: str, how: str, per_hour: float, speeds: tuple[Speed, Speed], work: Work, wish: float) -> dict[str, Any]:
    """One machine; ranges are from the cheapest to the dearest."""
    dear, cheap = (machine_cost(per_hour, speed, work) for speed in speeds)
    return {
        "name": name, "how": how, "per_hour": per_hour, "prompt_tok_s": speeds[0].prompt,
        "answer_tok_s": [speeds[0].answer, speeds[1].answer],
        **{key: [cheap[key], dear[key]] for key in cheap},
        "times_wish": [cheap["blended"] / wish, dear["blended"] / wish],
    }  # fmt: skip


def sections(report: Mapping[str, Any]) -> list[Section]:
    """The report as tables."""
    work = Work(**report["work"])
    speeds: list[tuple[str, ...]] = []
    if (here := report["this_machine"]) is not None:
        speeds.append((_HERE, "measured", f"{here['prompt']:,.0f}", f"{here['answer']:,.1f}"))
    speeds += [
        (row["name"], row["how"], f"{row['prompt_tok_s']:,.0f}", _range(row["answer_tok_s"], ",.1f"))
        for row in report["machines"]
        if row["name"] != _HERE
    ]
    costs = [
        (
            row["name"], f"{row['per_hour']:.3f}{'*' if row.get('example_price') else ''}",
            _range(row["in"]), _range(row["out"]), _range(row["blended"]),
        )
        for row in report["machines"]
    ] + [
        (f"{one['name']} (hosted)", "", f"{one['in']:.3f}", f"{one['out']:.3f}", f"{one['blended']:.3f}")
        for one in report["hosted"]
    ]  # fmt: skip
    note = ["Machines that are always busy."]
    if any(row.get("example_price") for row in report["machines"]):
        prices = report["prices"]
        note.append(f"* An example price ({prices['source']}, {prices['date']}): give what you pay with --price NAME=PRICE.")
    predicted = (
        "Predicted speeds assume cores like this machine's, have not been checked on such machines, and are upper bounds for "
        "prompts."
        if any(row["how"] == "predicted" for row in report["machines"])
        else ""
    )
    if report["too_small"]:
        note.append(f"Left out, since their memory is too small for the model: {', '.join(report['too_small'])}.")
    return [
        Section(f"Tokens per second: {work}", ("", "", "prompts", "answers"), tuple(speeds), predicted),
        Section("Cost of a million tokens", ("", "per hour", "in", "out", "blended"), tuple(costs), " ".join(note)),
        _answer(report),
    ]


def _answer(report: Mapping[str, Any]) -> Section:
    """Which machines and providers reach the wished price, and at which price per hour this machine does."""
    rows = []
    for row in report["machines"]:
        low, high = row["times_wish"]
        verdict = "reached" if high <= 1 else "missed" if low > 1 else "reached by the higher speed only"
        rows.append((row["name"], verdict, f"{_range(row['times_wish'], '.2f')} times"))
    for one in report["hosted"]:
        times = one["blended"] / report["wish"]
        rows.append((one["name"], "reached" if times <= 1 else "missed", f"{times:.2f} times"))
    note = ""
    if (here := report["this_machine"]) is not None:
        note = f"This machine reaches it at a price of up to {here['affordable_per_hour']:.3f} per hour."
    return Section(f"{report['wish']:g} for a million tokens, prompt and answer", ("", "", "cost"), tuple(rows), note)


def _range(values: Sequence[float], form: str = ".3f") -> str:
    low, high = (format(value, form) for value in sorted(values))
    return low if low == high else f"{low} - {high}"
