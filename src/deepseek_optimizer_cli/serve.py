"""`dso serve MODEL`: the OpenAI-compatible server, with a chat page at /."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options as o

if TYPE_CHECKING:
    from deepseek_optimizer.server.settings import ServerSettings

_NEEDED = ("fastapi", "httptools", "orjson", "prometheus_client", "python_multipart", "uvicorn", "xgrammar")
_AUTHORS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")  # of a generation config


@o.takes_model_fields
def serve(
    model: o.Model,
    *,
    fields: dict[str, Any],
    kl_budget: o.KlBudget = None,
    calibration: o.Calibration = None,
    host: Annotated[
        str, typer.Option("--host", help="Address to listen at; 0.0.0.0: of every network that this machine is in.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0: any that is free.")] = 8000,
    name: Annotated[
        str | None, typer.Option("--served-model-name", help="What clients call the model. Default: its last part of MODEL.")
    ] = None,
    api_key_file: Annotated[
        str | None,
        typer.Option("--api-key-file", help="API keys, one a line, # begins a comment. Default: those of DSO_API_KEYS."),
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option("--allow-host", help="A name that requests may be sent to, beside localhost and 127.0.0.1. Repeatable."),
    ] = None,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option("--allow-origin", help="A web page's origin that may read answers (CORS), or *. Repeatable."),
    ] = None,
    kv_cache_memory: Annotated[
        int | None,
        typer.Option(
            "--kv-cache-memory",
            min=1,
            help="Bytes that all conversations together may take. Default: what a full batch at the model's context needs, at "
            "most half of what is free.",
        ),
    ] = None,
    max_running: Annotated[int, typer.Option("--max-running", min=1, help="Answers that are written at once, at most.")] = 32,
    max_waiting: Annotated[
        int, typer.Option("--max-waiting", min=0, help="Requests that wait beside those; more get 429 with Retry-After.")
    ] = 256,
    batch_invariant: Annotated[
        bool,
        typer.Option("--batch-invariant", help="An answer is the same to the bit, whatever else the server does. Slower."),
    ] = False,
    prefix_cache: Annotated[
        bool, typer.Option("--prefix-cache/--no-prefix-cache", help="Prompts that begin alike share what was computed.")
    ] = True,
    drafts: Annotated[
        bool, typer.Option("--drafts/--no-drafts", help="Speculative decoding; texts are the same with and without.")
    ] = True,
    cache_window: Annotated[
        int | None,
        typer.Option("--cache-window", min=1, help="Tokens of a chat to keep; longer chats drop their middle and continue."),
    ] = None,
    tool_format: Annotated[
        str | None, typer.Option("--tool-format", help="How the model writes tool calls. Default: by its chat template.")
    ] = None,
    reasoning: Annotated[
        bool | None,
        typer.Option("--reasoning/--no-reasoning", help="Tell thoughts from answers. Default: by the chat template."),
    ] = None,
    request_timeout: Annotated[
        float, typer.Option("--request-timeout", min=0.1, help="Seconds from a request's arrival to the end of its answer.")
    ] = 600.0,
    drain_seconds: Annotated[
        float, typer.Option("--drain-seconds", min=0, help="That requests in flight have when the server is told to stop.")
    ] = 30.0,
    max_body_bytes: Annotated[int, typer.Option("--max-body-bytes", min=1, help="Of one request.")] = 4 << 20,
    max_file_mb: Annotated[
        float, typer.Option("--max-file-mb", min=0.001, help="Megabytes of a document that is sent, and of the text in it.")
    ] = 32.0,
    file_memory_mb: Annotated[
        float, typer.Option("--file-memory-mb", min=0.001, help="Megabytes that all documents may take in memory; a key: half.")
    ] = 256.0,
    access_log: Annotated[bool, typer.Option("--access-log", help="A line on stderr for each request.")] = False,
) -> None:
    """Serve a model by OpenAI's API, and a chat page at /."""
    missing = [package for package in _NEEDED if importlib.util.find_spec(package) is None]
    if missing:
        raise ValueError(
            f'the server needs {", ".join(missing)}, which not every installation has: pip install "deepseek-optimizer[serve]"'
        )

    from deepseek_optimizer.chat.tools import FORMATS
    from deepseek_optimizer.errors import ConfigError
    from deepseek_optimizer.server.keys import read_keys
    from deepseek_optimizer.server.settings import ServerSettings

    if tool_format is not None and tool_format not in FORMATS:
        raise ConfigError(f"--tool-format must be one of {', '.join(FORMATS)}, got {tool_format!r}")
    if name is not None and not name.strip():
        raise ConfigError("--served-model-name must not be empty")
    # All that can be wrong here is found before a model is loaded.
    keys = read_keys(api_key_file)
    file_memory = max(1, int(file_memory_mb * 1e6))
    settings = ServerSettings(
        host=host,
        port=port,
        keys=keys,
        allow_hosts=tuple(allow_host or ()),
        allow_origins=tuple(allow_origin or ()),
        max_body_bytes=max_body_bytes,
        max_file_bytes=max(1, int(max_file_mb * 1e6)),
        max_file_bytes_total=file_memory,
        max_file_bytes_per_client=max(1, file_memory // 2) if keys else file_memory,
        request_seconds=request_timeout,
        drain_seconds=drain_seconds,
        tools_format=tool_format,
        reasoning=reasoning,
        access_log=access_log,
    )
    fields |= o.given(
        kl_budget=kl_budget, calibration=calibration, kv_cache_memory=kv_cache_memory, batch_invariant=batch_invariant or None
    )
    fields["batch_size_range"] = (1, max_running)
    options: dict[str, Any] = {
        "max_waiting": max_waiting,
        "prefix_cache": prefix_cache,
        "drafts": drafts,
        "cache_window": cache_window,
    }
    _serve(model, name, fields, settings, options)


def _serve(model: str, name: str | None, fields: dict[str, Any], settings: ServerSettings, options: dict[str, Any]) -> None:
    import logging
    from dataclasses import replace

    from deepseek_optimizer import report
    from deepseek_optimizer.integration.memory.cache_size import check_granted
    from deepseek_optimizer.server.run import listener
    from deepseek_optimizer.server.run import serve as run
    from deepseek_optimizer.serving import make_async_engine

    from .model import load

    logging.basicConfig(level=logging.WARNING, format="dso: %(message)s")
    logging.getLogger("deepseek_optimizer").setLevel(logging.INFO)
    logging.getLogger("bm25s").setLevel(logging.WARNING)  # it sets itself to tell of every index
    sock = listener(settings.host, settings.port)
    if "kv_cache_memory" in fields:
        check_granted(fields["kv_cache_memory"])
    loaded, tokenizer = load(model, fields)
    settings = replace(settings, sampling=_authors_sampling(loaded))
    engine = make_async_engine(loaded, tokenizer, model_name=name, **options)
    facts = report(loaded)

    def banner(host: str, port: int) -> None:
        typer.echo(_banner(engine, facts, settings, host, port), err=True)

    run(engine, settings, sock, banner)


def _authors_sampling(model: Any) -> dict[str, Any]:
    """What the model's authors chose for requests that do not say: of its generation config, where that samples."""
    config = model.generation_config
    if not config.do_sample:
        return {}
    return {field: value for field in _AUTHORS if (value := getattr(config, field, None)) is not None}


def _banner(engine: Any, facts: Any, settings: ServerSettings, host: str, port: int) -> str:
    from deepseek_optimizer.server.http.hosts import is_loopback

    formats = ", ".join(row.format for row in facts.formats)
    shown = f"[{host}]" if ":" in host else host
    keys = f"{len(settings.keys)} API key(s)" if settings.keys else "no API key is asked for"
    lines = [
        f"model     {engine.model_name} ({facts.family}), {formats}, {facts.bytes_after / 1e6:,.0f} MB",
        f"backend   {facts.backend} ({facts.detail})",
        f"context   {engine.context:,} tokens" + (f", cache window {engine.cache_window:,}" if engine.cache_window else ""),
        f"cache     {facts.kv_cache}, {engine.core.memory.size}",
        f"address   http://{shown}:{port}/ (API under /v1), {keys}",
    ]
    if not settings.keys and not is_loopback(settings.host):
        lines.append("warning   everyone who can reach this address can use the model; --api-key-file asks for a key")
    return "\n".join(lines)
