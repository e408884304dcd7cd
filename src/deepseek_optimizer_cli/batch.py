"""`dso batch MODEL INPUT OUTPUT`: answers a file of requests."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from . import options as o
from . import serve_options as so

_HOURS = 24.0  # a request may wait for all others
_RAY: dict[str, Any] = {"rich_help_panel": "Workers on Ray"}


@o.loads_model
def batch(
    model: o.Model,
    input: Annotated[
        Path,
        typer.Argument(metavar="INPUT", help="Requests, one JSON object per line: custom_id, method, url and body."),
    ],
    output: Annotated[
        Path, typer.Argument(metavar="OUTPUT", help="Where to write the answers, one line for each request, in the same order.")
    ],
    *,
    name: so.Name = None,
    chat_template: o.ChatTemplate = None,
    generation_config: so.GenerationConfig = "model",
    max_answer_tokens: so.MaxAnswerTokens = 4096,
    tool_format: so.ToolFormat = None,
    reasoning: so.Reasoning = None,
    thinking: so.Thinking = None,
    draft_model: o.DraftModel = None,
    draft_precision: o.DraftPrecision = None,
    max_running: so.MaxRunningOrProfile = None,
    kv_cache_memory: so.KvCacheMemory = None,
    batch_invariant: Annotated[
        bool,
        typer.Option(
            "--batch-invariant/--no-batch-invariant",
            help="Make every answer independent of the others and of interruptions, bit for bit. Without it, requests are "
            "answered faster.",
            rich_help_panel="Requests and memory",
        ),
    ] = True,
    on_ray: Annotated[
        bool, typer.Option("--ray", help="Answer by several processes on Ray, which is started on this machine.", **_RAY)
    ] = False,
    ray_address: Annotated[
        str | None,
        typer.Option(
            "--ray-address", metavar="ADDRESS", help="Use the Ray cluster at this address; auto: a local one.", **_RAY
        ),
    ] = None,
    workers: Annotated[int, typer.Option("--workers", min=1, metavar="N", help="Number of processes on Ray.", **_RAY)] = 1,
    worker_cpus: Annotated[
        float | None,
        typer.Option(
            "--worker-cpus",
            metavar="N",
            help="Processor cores of a process, and its threads. Default: this machine's threads, divided among the processes.",
            **_RAY,
        ),
    ] = None,
    fields: dict[str, Any],
) -> None:
    """Answer a file of requests in the format of OpenAI's Batch API. A stopped job continues where it was."""
    from deepseek_optimizer.batch.requests import read_requests
    from deepseek_optimizer.batch.results import Results, check_free, files_digest
    from deepseek_optimizer.batch.run import run_batch
    from deepseek_optimizer.chat.named_template import read_template
    from deepseek_optimizer.integration.load.resolve import resolve
    from deepseek_optimizer.optimized_model import profile_options
    from deepseek_optimizer.profiles import find
    from deepseek_optimizer.server.app import create_app
    from deepseek_optimizer.server.served_model import ServedModel
    from deepseek_optimizer.server.settings import ServerSettings
    from deepseek_optimizer.system.progress import show_progress

    from .serve_engine import check_options, load_engine
    from .serve_ray import cores_of_each, gpus_of_each

    check_options(tool_format, generation_config, name)
    _check_workers(on_ray, ray_address, workers, worker_cpus, fields.get("parallel"))
    job = read_requests(input)
    check_free(output)  # before a model is downloaded
    settings = ServerSettings(
        page=False, request_seconds=_HOURS * 3600, tools_format=tool_format, reasoning=reasoning, thinking=thinking,
        max_answer_tokens=max_answer_tokens,
    )  # fmt: skip
    template = None if chat_template is None else read_template(chat_template)
    place = resolve(model)  # once: a model on the hub may change between two look-ups
    drafts: dict[str, Any] = {}
    if (profile := fields.pop("profile", None)) is not None:  # its settings are part of what identifies the job
        taken, note = find(place, profile, profile_options(None, fields))
        typer.echo(f"dso: {note}", err=True)
        if taken is not None:
            fields = {**taken.fields, **fields}
            drafts = {} if taken.drafts is None else {"drafts": taken.drafts}
    fields |= o.not_none(kv_cache_memory=kv_cache_memory, batch_invariant=batch_invariant or None)
    max_running = max_running or fields.get("batch_size_range", (1, 32))[1]
    fields["batch_size_range"] = (1, max_running)
    identity = {
        "input": job.digest, "model": model, "model files": files_digest(place),
        "options": {"draft_model": draft_model, "draft_precision": draft_precision, "name": name,
                    "template": template, "generation_config": generation_config, "tool_format": tool_format,
                    "max_answer_tokens": max_answer_tokens, "reasoning": reasoning, "thinking": thinking,
                    **{field: value for field, value in fields.items() if field not in ("batch_size_range", "threads")}},
    }  # fmt: skip
    with Results(output, identity, len(job.requests), job.written) as results:
        if len(results.done) < len(job.requests):
            waiting = 4 * max_running + settings.max_answers  # so that one with many answers fits too
            options = {"max_waiting": waiting, **drafts}
            served = ServedModel(
                str(place), name or os.path.basename(os.path.normpath(model)), template, fields, options, generation_config,
                None, draft_model, draft_precision,
            )  # fmt: skip
            with show_progress(f"Answering {input.name}") as progress:
                if on_ray:
                    from deepseek_optimizer.ray.batch import Workers
                    from deepseek_optimizer.ray.batch import run_batch as run_on_ray

                    cores, gpus = worker_cpus or cores_of_each(workers), gpus_of_each(fields)
                    processes = Workers(workers, cores, gpus, ray_address, 2 * max_running)
                    run_on_ray(served, settings, processes, job, results, progress)
                else:
                    engine, settings, _, _ = load_engine(served, settings)
                    asyncio.run(run_batch(create_app(engine, settings), job, results, 2 * max_running, progress))
        results.finish()
    if results.failed:
        typer.echo(
            f"dso: {len(results.failed):,} of {len(job.requests):,} requests ended in an error; see response.status_code",
            err=True,
        )
        raise typer.Exit(1)


def _check_workers(on_ray: bool, address: str | None, workers: int, cpus: float | None, parallel: Any) -> None:
    """Raises ConfigError for options that contradict each other, or MissingPackageError without Ray."""
    from deepseek_optimizer.errors import ConfigError

    from .serve_ray import require_ray

    if not on_ray:
        if (address, workers, cpus) != (None, 1, None):
            raise ConfigError("--ray-address, --workers and --worker-cpus need --ray")
        return
    if address is not None and cpus is None:
        raise ConfigError("--ray-address needs --worker-cpus: the cluster's machines may have other cores than this one")
    if cpus is not None and not cpus > 0:
        raise ConfigError(f"--worker-cpus must be greater than 0, got {cpus:g}")
    if parallel:
        raise ConfigError("a model that is divided among processes: not available with --ray; leave it out")
    require_ray("pyarrow", "pandas")
