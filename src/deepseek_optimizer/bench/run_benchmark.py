"""Runs what `dso bench` measures on one model and returns the report, one dict of JSON types."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..versions import versions
from .work import Work

SCHEMA = 1  # of the report; increased when a key changes its meaning
COMPARED = ("prefill_tok_s", "decode_tok_s", "output_tok_s", "ttft_ms", "to_first_token_s", "memory_bytes")


@dataclass(frozen=True)
class Request:
    """What to measure.

    Attributes:
        model: directory, .gguf file or hub name. fields: of `DeepSeekConfig`.
        works, repeats, warmup: see `measure`.
        quality: compare next-token distributions with the unoptimized model's. text: file to compare on; None: Python's
            documentation. text_tokens: maximum number of tokens. reference: the unoptimized model, if `model` is packed.
        pairs: file of sources and references for BLEU and chrF.
        ablate: also measure with each fusion rule disabled in turn.
        against: names of peers. rounds: processes per side. peer_models: name -> the model in that peer's own format.
        price_per_hour: of this machine, in any currency.
        baseline: an earlier report to compare with. tolerance: see `baseline.compare`.
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
    """Keys: schema, date (ISO 8601), seconds (duration), model, cpu, threads, machine_memory_bytes, load (see
    `BackgroundLoad.report`), config, backend, formats, versions, load_s, memory_bytes, works; and if requested: quality, pairs,
    ablation, against, peers (name -> version), baseline.

    Raises:
        ConfigError, CheckpointError, ValueError: before anything is measured, if that can be known.
    """
    import torch

    from ..optimized_model import load_tokenizer
    from .background import BackgroundLoad
    from .baseline import check, compare
    from .hardware import cpu_name, machine_memory_bytes, usable_cpus
    from .measure import add_limits, measure
    from .memory_traffic import matrix_memory
    from .peak_memory import PeakMemory
    from .peers import versions_of
    from .roofline import Roofline
    from .text_model import load_text_model

    date, began = datetime.now().astimezone(), time.perf_counter()
    peers = _peer_commands(request)  # raises now, not after minutes, if a peer is not set up
    text, pairs = _inputs(request)
    tokenizer = load_tokenizer(request.model) if request.quality or pairs else None
    background = BackgroundLoad(usable_cpus())
    for reason in background.busy_before():
        note(f"warning: {reason}; timings will be unreliable")
    note("loading the model")
    memory, started = PeakMemory(), time.perf_counter()
    model = load_text_model(request.model, **request.fields)
    load_s = time.perf_counter() - started
    summary = model.report()
    threads = summary.threads or torch.get_num_threads()
    report: dict[str, Any] = {
        "schema": SCHEMA,
        "date": date.isoformat(timespec="seconds"),
        "model": str(request.model),
        "cpu": cpu_name(),
        "threads": threads,
        "machine_memory_bytes": machine_memory_bytes(),
        "config": summary.to_dict()["config"],
        "backend": f"{summary.backend} ({summary.detail})",
        "formats": {row.format: row.bytes for row in summary.formats},
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
    note("measuring the machine's bandwidth and peak throughput")
    add_limits(Roofline(threads, matrix_memory(model)), model, report["works"])
    if request.quality:
        note("comparing quality with the unoptimized model")
        report["quality"] = _quality(request, model, tokenizer, text)
    if pairs:
        from .answer_scores import answers, score

        note("generating answers for BLEU and chrF")
        report["pairs"] = score(answers(model, tokenizer, pairs, 256), [reference for _, reference in pairs])
    if request.ablate:
        from .ablation import ABLATION_NEW, ablate

        context = min(1024, model.config.max_position_embeddings - ABLATION_NEW)
        report["ablation"] = ablate(model, context=context, rounds=request.rounds, note=note)
    if peers:
        del model  # frees its memory and threads for the sides
        report["against"] = _against(request, peers, threads, note)
        report["peers"] = versions_of(request.against)
    if request.baseline:
        report["baseline"] = compare(report, request.baseline, request.tolerance)
    return {**report, "seconds": time.perf_counter() - began, "load": background.report()}


def _inputs(request: Request) -> tuple[str | None, list[tuple[str, str]]]:
    from .answer_scores import read_pairs

    text = request.text.read_text(encoding="utf-8") if request.text else None
    return text, read_pairs(request.pairs) if request.pairs else []


def _quality(request: Request, model: Any, tokenizer: Any, text: str | None) -> dict[str, Any]:
    import torch

    from .quality import compare, sample_text, stretches
    from .unoptimized_model import load_unoptimized

    length = min(1024, request.text_tokens, model.config.max_position_embeddings)
    texts = stretches(tokenizer, text or sample_text(), length, max(1, request.text_tokens // length))
    reference = load_unoptimized(request.reference or request.model, torch.float32)
    return {"text": str(request.text or "Python's documentation"), **compare(model, reference, texts)}


def _peer_commands(request: Request) -> dict[str, Callable[[Work, int], list[str]]]:
    """Peer -> function that returns the command of its side for a work and a number of threads."""
    from ..integration.load.resolve import resolve
    from .peers import get_peer
    from .peers.environments import interpreter

    unknown = set(request.peer_models) - set(request.against)
    if unknown:
        raise ConfigError(f"--peer-model names {', '.join(sorted(unknown))}, which is not in --against; add it there")

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
    """Ratios of this model to each peer, for each work."""
    from .against import alternate, ratio_rows
    from .peers.base import own_command

    rows = []
    for work in request.works:
        options = {"threads": threads, "repeats": request.repeats, "warmup": request.warmup}
        sides = {name: command(work, threads) for name, command in peers.items()}
        sides["ours"] = own_command("optimized", request.model, work, **options, fields=request.fields)
        values = alternate(sides, request.rounds, note)
        for name in peers:
            pair = {name: values[name], "ours": values["ours"]}
            rows += [{"work": asdict(work), **row} for row in ratio_rows(pair, name, COMPARED)]
    return rows
