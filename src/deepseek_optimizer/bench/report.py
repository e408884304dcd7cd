"""The whole of `dso bench`: loads, measures, compares, and returns one dict of JSON types."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..versions import versions
from .work import Work

SCHEMA = 1  # of the report; goes up where a name changes its meaning
COMPARED = ("prefill_tok_s", "decode_tok_s", "output_tok_s", "ttft_ms", "to_first_token_s", "memory_bytes")


@dataclass(frozen=True)
class Request:
    """What to measure.

    Attributes:
        model: directory, .gguf file or hub name. fields: of `DeepSeekConfig`.
        works, repeats, warmup: see `measure`.
        quality: compare distributions with the unoptimised model's; `text`: on this file, else on Python's documentation;
            `text_tokens`: how many tokens at most. reference: the unoptimised model, where `model` is packed.
        pairs: file of sources and references for BLEU and chrF.
        ablate: each fusion rule off in turn.
        against: names of peers; `rounds`: processes a side; `peer_models`: name -> the model in that peer's own format.
        price_per_hour: of this machine.
        baseline: an earlier report to compare with; `tolerance`: see `baseline.compare`.
    """

    model: str
    fields: dict[str, Any] = field(default_factory=dict)
    works: Sequence[Work] = (Work(),)
    repeats: int = 5
    warmup: int = 1
    quality: bool = False
    text: Path | None = None
    text_tokens: int = 2048
    reference: str | None = None
    pairs: Path | None = None
    ablate: bool = False
    against: Sequence[str] = ()
    peer_models: Mapping[str, str] = field(default_factory=dict)
    rounds: int = 3
    price_per_hour: float | None = None
    baseline: dict[str, Any] | None = None
    tolerance: float = 0.05


def run(request: Request, note: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """Keys: schema, model, cpu, threads, config, backend, formats, versions, load_s, memory_bytes, works, and where asked
    for quality, pairs, ablation, against, baseline.

    Raises:
        ConfigError, CheckpointError, ValueError: before anything is measured, where that can be known.
    """
    import torch

    from ..optimizer import load_model, load_tokenizer
    from .baseline import check, compare
    from .limits import Limits
    from .measure import hold_against, measure
    from .process import PeakMemory, cpu_name

    peers = _peer_commands(request)  # what is not set up is said now, not after minutes
    text, pairs = _inputs(request)
    tokenizer = load_tokenizer(request.model) if request.quality or pairs else None
    note("loading")
    memory, started = PeakMemory(), time.perf_counter()
    model = load_model(request.model, **request.fields)
    load_s = time.perf_counter() - started
    made = model.report()
    threads = made.threads or torch.get_num_threads()
    report: dict[str, Any] = {
        "schema": SCHEMA,
        "model": str(request.model),
        "cpu": cpu_name(),
        "threads": threads,
        "config": made.to_dict()["config"],
        "backend": f"{made.backend} ({made.detail})",
        "formats": {row.format: row.bytes for row in made.formats},
        "versions": versions(),
        "load_s": load_s,
    }
    if request.baseline:
        check(report, request.baseline, [asdict(work) for work in request.works])
    report["works"] = measure(
        model,
        request.works,
        repeats=request.repeats,
        warmup=request.warmup,
        price_per_hour=request.price_per_hour,
        note=note,
    )
    report["memory_bytes"] = memory.bytes()
    note("the machine's own speed")
    hold_against(Limits(threads), model, report["works"])
    if request.quality:
        note("quality")
        report["quality"] = _quality(request, model, tokenizer, text)
    if pairs:
        from .pairs import answers, score

        note("answers for BLEU and chrF")
        report["pairs"] = score(answers(model, tokenizer, pairs, 256), [reference for _, reference in pairs])
    if request.ablate:
        from .ablation import ABLATION_NEW, ablate

        context = min(1024, model.config.max_position_embeddings - ABLATION_NEW)
        report["ablation"] = ablate(model, context=context, rounds=request.rounds, note=note)
    if peers:
        del model  # its memory and its threads are the sides' now
        report["against"] = _against(request, peers, threads, note)
    if request.baseline:
        report["baseline"] = compare(report, request.baseline, request.tolerance)
    return report


def _inputs(request: Request) -> tuple[str | None, list[tuple[str, str]]]:
    from .pairs import read_pairs

    text = request.text.read_text(encoding="utf-8") if request.text else None
    return text, read_pairs(request.pairs) if request.pairs else []


def _quality(request: Request, model: Any, tokenizer: Any, text: str | None) -> dict[str, Any]:
    import torch

    from .plain import load_plain
    from .quality import compare, sample_text, stretches

    length = min(1024, request.text_tokens, model.config.max_position_embeddings)
    texts = stretches(tokenizer, text or sample_text(), length, max(1, request.text_tokens // length))
    reference = load_plain(request.reference or request.model, torch.float32)
    return {"text": str(request.text or "Python's documentation"), **compare(model, reference, texts)}


def _peer_commands(request: Request) -> dict[str, Callable[[Work, int], list[str]]]:
    """Peer -> what starts its side for a work and a number of threads."""
    from ..integration.load.resolve import resolve
    from .peers import get_peer
    from .peers.environments import interpreter

    unknown = set(request.peer_models) - set(request.against)
    if unknown:
        raise ConfigError(f"a model is named for {', '.join(sorted(unknown))}, which --against does not name")

    def starter(name: str) -> Callable[[Work, int], list[str]]:
        peer = get_peer(name)
        python, model = interpreter(peer), resolve(request.peer_models.get(name, request.reference or request.model))

        def command(work: Work, threads: int) -> list[str]:
            return peer.command(python, model, work, threads=threads, repeats=request.repeats, warmup=request.warmup)

        for work in request.works:
            command(work, 1)
        return command

    return {name: starter(name) for name in request.against}


def _against(
    request: Request, peers: Mapping[str, Callable[[Work, int], list[str]]], threads: int, note: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Ratios of ours to each peer, for each work."""
    from .against import alternate, ratio_rows
    from .peers.base import own_command

    rows = []
    for work in request.works:
        options = {"threads": threads, "repeats": request.repeats, "warmup": request.warmup}
        sides = {name: command(work, threads) for name, command in peers.items()}
        sides["ours"] = own_command("optimised", request.model, work, **options, fields=request.fields)
        found = alternate(sides, request.rounds, note)
        for name in peers:
            pair = {name: found[name], "ours": found["ours"]}
            rows += [{"work": asdict(work), **row} for row in ratio_rows(pair, name, COMPARED)]
    return rows
