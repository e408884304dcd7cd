"""The rows of serving: what many clients get through HTTP beside our own engine without it and beside vLLM, how soon a first
word comes, how little streams notice of a long prompt, what drafts out of the text gain and cost, and what answers that are
equal to the bit cost. Data alone; `measure_serving.py` measures.

SmolLM2 throughout. The clients are a process on the same cores as the server; prompts are random tokens, new in every run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from .standing import AT_ONCE

OFFLINE, HTTP, VLLM = "offline", "http", "vllm"


@dataclass(frozen=True)
class Side:
    """What runs in a round.

    Attributes:
        where: OFFLINE, our engine in a process; HTTP, our server and its clients; VLLM, offline too.
        what: is measured, of `offline.MEASURES` or `load.MEASURES`.
        form: of the model, see `models.model`.
        options: of the process that has the model: `offline`, or `dso serve`.
        numbers: what is asked of it, by the names of `load`'s and `offline`'s options.
    """

    where: str
    what: str
    form: str = "int4"
    options: tuple[str, ...] = ()
    numbers: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Claim:
    """A figure over another one, or less another one.

    Attributes:
        of, against: (side, figure).
        least, most: that is asked for; neither: it is only shown.
        difference: `of` less `against`, in ms, in place of how many times it is.
    """

    title: str
    of: tuple[str, str]
    against: tuple[str, str]
    least: float | None = None
    most: float | None = None
    difference: bool = False

    def value(self, of: float, against: float) -> float:
        if self.difference:
            return of - against
        return of / against if against else 0.0

    @property
    def asked(self) -> str:
        bounds = ((self.least, "at least"), (self.most, "at most"))
        unit = " ms" if self.difference else "x"
        return " and ".join(f"{word} {bound:g}{unit}" for bound, word in bounds if bound is not None)

    def holds(self, value: float) -> bool:
        return (self.least is None or value >= self.least) and (self.most is None or value <= self.most)


@dataclass(frozen=True)
class Serving:
    """Attributes:
    name: for the command line and the results.
    sides: in the order in which they take turns, by what people call them.
    """

    name: str
    title: str
    sides: Mapping[str, Side]
    claims: tuple[Claim, ...]

    def quick(self) -> Serving:
        """Of tiny lengths: whether it works, not how fast."""
        return replace(self, sides={label: _small(side) for label, side in self.sides.items()})


_QUICK = {"prompt": 64, "new": 8, "batch": 4, "repeats": 1, "seconds": 0.4}


def _small(side: Side) -> Side:
    return replace(side, numbers={name: min(value, _QUICK[name]) for name, value in side.numbers.items()})


PLAIN = ("--no-drafts",)
OUTPUT, PREFILL = "output_tok_s", "prefill_tok_s"
SIXTEEN = {"batch": AT_ONCE.batch, "prompt": AT_ONCE.prompt, "new": AT_ONCE.new, "repeats": 3}
LONG_PROMPT = {"batch": 4, "prompt": 4000, "repeats": 3, "seconds": 2.0}


def _stall(name: str, title: str, options: tuple[str, ...]) -> Serving:
    side = "our server"
    return Serving(
        name, f"4 streams while a prompt of 4,000 tokens is processed{title}",
        {side: Side(HTTP, "stall", options=options, numbers=LONG_PROMPT)},
        (
            Claim("between tokens, p99 over p99 of idle times", (side, "busy_p99_ms"), (side, "idle_p99_ms"), most=4),
            Claim("the same, medians", (side, "busy_p50_ms"), (side, "idle_p50_ms")),
            Claim("idle times: p99 over p50", (side, "idle_p99_ms"), (side, "idle_p50_ms")),
        ),
    )  # fmt: skip


def _drafts(name: str, title: str, what: str, least: float, *options: str) -> Serving:
    side = "our engine"
    claims = [
        Claim("drafts on, compared with off", (side, "drafts_tok_s"), (side, "plain_tok_s"), least=least),
        Claim("accepted drafts, of those proposed", (side, "held"), (side, "proposed")),
        Claim("tokens per step", (side, "tokens"), (side, "steps")),
    ]
    if what == "edits":
        claims.append(Claim("words that were in the text before", (side, "kept_words"), (side, "words"), least=0.7))
    return Serving(name, title, {side: Side(OFFLINE, what, options=options, numbers={"new": 128, "repeats": 2})}, tuple(claims))


def _invariant(form: str) -> Serving:
    fields = {} if form == "int4" else {"precision": form}
    sides, claims = {}, []
    for what, title, figure, numbers in (
        ("throughput", "16 at once", OUTPUT, SIXTEEN),
        ("prefill", "prefill 512", PREFILL, {"prompt": 512, "repeats": 8}),
    ):
        for name, more in (("default", {}), ("invariant", {"batch_invariant": True})):
            options = (*PLAIN, "--fields", json.dumps({**fields, **more}))
            sides[f"{title}, {name}"] = Side(OFFLINE, what, form, options, numbers)
        claims.append(Claim(title, (f"{title}, invariant", figure), (f"{title}, default", figure)))
    return Serving(f"invariant-{form}", f"batch_invariant compared with the default, {form}", sides, tuple(claims))


SERVING = (
    Serving(
        "serve-16", "16 clients on the server's own cores, 256 in, 128 out",
        {
            "our engine": Side(OFFLINE, "throughput", options=PLAIN, numbers=SIXTEEN),
            "our server": Side(HTTP, "throughput", options=PLAIN, numbers=SIXTEEN),
            "vLLM bf16, offline": Side(VLLM, "throughput", "bf16", numbers=SIXTEEN),
            "our engine, drafts": Side(OFFLINE, "throughput", numbers=SIXTEEN),
            "our server, drafts": Side(HTTP, "throughput", numbers=SIXTEEN),
        },
        (
            Claim("through HTTP, compared with our engine", ("our server", OUTPUT), ("our engine", OUTPUT), least=0.85),
            Claim("through HTTP, compared with vLLM offline", ("our server", OUTPUT), ("vLLM bf16, offline", OUTPUT), least=3),
            Claim("with drafts, compared with our engine", ("our server, drafts", OUTPUT), ("our engine, drafts", OUTPUT)),
            Claim("with drafts, compared with vLLM", ("our server, drafts", OUTPUT), ("vLLM bf16, offline", OUTPUT)),
        ),
    ),
    Serving(
        "serve-first", "a short chat on an idle server",
        {
            "our engine": Side(OFFLINE, "first", numbers={"repeats": 24}),
            "our server": Side(HTTP, "first", numbers={"repeats": 24}),
        },
        (
            Claim("first token, over the engine's", ("our server", "ttft_ms"), ("our engine", "ttft_ms"), None, 15, True),
            Claim("the same, p90", ("our server", "ttft_p90_ms"), ("our engine", "ttft_p90_ms"), difference=True),
        ),
    ),
    _stall("serve-stall", "", ()),
    _stall("serve-stall-plain", ", no drafts", PLAIN),
    _drafts("lookup-edits", "edits, with prompt lookup", "edits", 1.8),
    _drafts("lookup-chat", "ordinary questions, greedy", "questions", 0.97),
    _drafts("lookup-chat-sampled", "ordinary questions, temperature 0.8", "questions", 0.97, "--temperature", "0.8"),
    _invariant("int4"),
    _invariant("bf16"),
)  # fmt: skip
