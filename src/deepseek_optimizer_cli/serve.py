"""`dso serve MODEL`: the OpenAI-compatible server, with a chat page at /."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options as o

if TYPE_CHECKING:
    from deepseek_optimizer.server.settings import ServerSettings

_NEEDED = ("fastapi", "httptools", "orjson", "prometheus_client", "python_multipart", "uvicorn", "xgrammar")

_REQUESTS: dict[str, Any] = {"rich_help_panel": "Requests and memory"}
_ACCESS: dict[str, Any] = {"rich_help_panel": "Network and access"}
_ADAPTERS: dict[str, Any] = {"rich_help_panel": "LoRA adapters"}
_CHAT: dict[str, Any] = {"rich_help_panel": "Chat"}
_FILES: dict[str, Any] = {"rich_help_panel": "Uploaded files"}


@o.takes_model_fields
def serve(
    model: o.Model,
    *,
    host: Annotated[
        str,
        typer.Option("--host", metavar="ADDRESS", help="Address to listen on; 0.0.0.0: all network interfaces.", **_ACCESS),
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", min=0, max=65535, metavar="PORT", help="Port to listen on; 0: any free port.", **_ACCESS)
    ] = 8000,
    name: Annotated[
        str | None,
        typer.Option(
            "--served-model-name",
            metavar="NAME",
            help="Model name in the API. Default: the last path component of MODEL.",
            **_ACCESS,
        ),
    ] = None,
    api_key_file: Annotated[
        str | None,
        typer.Option(
            "--api-key-file",
            metavar="FILE",
            help="File of API keys, one per line; # starts a comment. Default: the keys in the environment variable "
            "DSO_API_KEYS.",
            **_ACCESS,
        ),
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            "--allow-host",
            metavar="NAME",
            help="Name to accept in the Host header, in addition to localhost and 127.0.0.1. Repeatable.",
            **_ACCESS,
        ),
    ] = None,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(
            "--allow-origin",
            metavar="ORIGIN",
            help="Web origin whose pages may use the API (CORS), or * for any. Repeatable.",
            **_ACCESS,
        ),
    ] = None,
    strict_requests: Annotated[
        bool,
        typer.Option(
            "--strict-requests",
            help="Refuse requests with unknown fields, or with values of another JSON type such as numbers in quotes. Default: "
            "unknown fields are ignored, and the response header X-Ignored-Fields names them.",
            **_ACCESS,
        ),
    ] = False,
    access_log: Annotated[bool, typer.Option("--access-log", help="Log each request to stderr.", **_ACCESS)] = False,
    fields: dict[str, Any],
    kl_budget: o.KlBudget = None,
    calibration: o.Calibration = None,
    max_running: Annotated[
        int, typer.Option("--max-running", min=1, metavar="N", help="Maximum number of concurrent answers.", **_REQUESTS)
    ] = 32,
    max_waiting: Annotated[
        int,
        typer.Option(
            "--max-waiting",
            min=0,
            metavar="N",
            help="Maximum number of queued requests of one client; further ones receive status 429 with Retry-After.",
            **_REQUESTS,
        ),
    ] = 256,
    kv_cache_memory: Annotated[
        int | None,
        typer.Option(
            "--kv-cache-memory",
            min=1,
            metavar="BYTES",
            help="Memory for the KV cache of all conversations, in bytes. Default: enough for a full batch at the model's "
            "context length, but at most half of the free memory.",
            **_REQUESTS,
        ),
    ] = None,
    prefix_cache: Annotated[
        bool,
        typer.Option(
            "--prefix-cache/--no-prefix-cache", help="Reuse the KV cache of prompts that share a prefix.", **_REQUESTS
        ),
    ] = True,
    drafts: Annotated[
        bool,
        typer.Option("--drafts/--no-drafts", help="Use speculative decoding, which does not change the answers.", **_REQUESTS),
    ] = True,
    batch_invariant: Annotated[
        bool,
        typer.Option(
            "--batch-invariant",
            help="Make each answer independent of the other requests in the batch, bit for bit. Processes prompts more slowly.",
            **_REQUESTS,
        ),
    ] = False,
    request_timeout: Annotated[
        float,
        typer.Option(
            "--request-timeout",
            min=0.1,
            metavar="SECONDS",
            help="Maximum time from a request's arrival to the end of its answer.",
            **_REQUESTS,
        ),
    ] = 600.0,
    drain_seconds: Annotated[
        float,
        typer.Option(
            "--drain-seconds",
            min=0,
            metavar="SECONDS",
            help="Grace period for requests in flight when the server stops.",
            **_REQUESTS,
        ),
    ] = 30.0,
    max_body_bytes: Annotated[
        int, typer.Option("--max-body-bytes", min=1, metavar="BYTES", help="Maximum size of a request body.", **_REQUESTS)
    ] = 4 << 20,
    lora: Annotated[
        list[str] | None,
        typer.Option(
            "--lora",
            metavar="NAME=PATH",
            help="Load the LoRA adapter (PEFT) in directory PATH; requests choose it by the model NAME. Repeatable.",
            **_ADAPTERS,
        ),
    ] = None,
    allow_lora_loading: Annotated[
        bool,
        typer.Option(
            "--allow-lora-loading",
            help="Let requests load and unload adapters (/v1/load_lora_adapter). Requires --lora-dir.",
            **_ADAPTERS,
        ),
    ] = False,
    lora_dir: Annotated[
        str | None,
        typer.Option(
            "--lora-dir", metavar="DIR", help="Directory of the adapters that requests may load; no others.", **_ADAPTERS
        ),
    ] = None,
    max_loras: Annotated[
        int | None,
        typer.Option(
            "--max-loras",
            min=1,
            metavar="N",
            help="Maximum number of adapters at a time. Default: those of --lora, and at least 16 with --allow-lora-loading.",
            **_ADAPTERS,
        ),
    ] = None,
    max_lora_rank: Annotated[
        int, typer.Option("--max-lora-rank", min=1, max=1024, metavar="N", help="Largest rank of an adapter.", **_ADAPTERS)
    ] = 64,
    lora_dtype: Annotated[
        str,
        typer.Option(
            "--lora-dtype",
            metavar="DTYPE",
            help="Storage of adapters: bf16, fp32, or auto: bf16, except fp32 for a model in fp32.",
            **_ADAPTERS,
        ),
    ] = "auto",
    cache_window: Annotated[
        int | None,
        typer.Option(
            "--cache-window",
            min=1,
            metavar="TOKENS",
            help="Maximum length of a conversation in the cache. Longer conversations continue, but lose tokens from the "
            "middle. Default: no window; conversations end at the context length.",
            **_CHAT,
        ),
    ] = None,
    generation_config: Annotated[
        str,
        typer.Option(
            "--generation-config",
            metavar="SOURCE",
            help="Sampling parameters of requests that omit them. model: those of the checkpoint's generation config, else "
            "those that the model's authors publish, else temperature 0.7 and top_p 0.95. vllm: those of the generation "
            "config, else OpenAI's. openai: temperature 1 and top_p 1.",
            **_CHAT,
        ),
    ] = "model",
    max_answer_tokens: Annotated[
        int,
        typer.Option(
            "--max-answer-tokens",
            min=1,
            metavar="TOKENS",
            help="Maximum length of an answer whose request gives none. It ends earlier if the context is full.",
            **_CHAT,
        ),
    ] = 4096,
    tool_format: Annotated[
        str | None,
        typer.Option(
            "--tool-format",
            metavar="NAME",
            help="Syntax in which the model writes tool calls. Default: detected from the chat template.",
            **_CHAT,
        ),
    ] = None,
    reasoning: Annotated[
        bool | None,
        typer.Option(
            "--reasoning/--no-reasoning",
            help="Return reasoning separately from the answer. Default: detected from the chat template.",
            **_CHAT,
        ),
    ] = None,
    prefill_assistant: Annotated[
        bool,
        typer.Option(
            "--prefill-assistant",
            help="Continue a chat's last message if it is the assistant's, instead of answering it.",
            **_CHAT,
        ),
    ] = False,
    max_file_mb: Annotated[
        float,
        typer.Option(
            "--max-file-mb",
            min=0.001,
            metavar="MB",
            help="Maximum size of an uploaded document, and of its text, in megabytes.",
            **_FILES,
        ),
    ] = 32.0,
    file_memory_mb: Annotated[
        float,
        typer.Option(
            "--file-memory-mb",
            min=0.001,
            metavar="MB",
            help="Memory for all uploaded documents, in megabytes. With API keys, each key may use half of it.",
            **_FILES,
        ),
    ] = 256.0,
) -> None:
    """Serve a model through an OpenAI-compatible API, with a chat page at /."""
    missing = [package for package in _NEEDED if importlib.util.find_spec(package) is None]
    if missing:
        raise ValueError(f'the server needs {", ".join(missing)}; install with: pip install "deepseek-optimizer[serve]"')

    from deepseek_optimizer.chat.sampling_defaults import SOURCES
    from deepseek_optimizer.chat.tools import FORMATS
    from deepseek_optimizer.errors import ConfigError
    from deepseek_optimizer.server.keys import read_keys
    from deepseek_optimizer.server.settings import ServerSettings

    if tool_format is not None and tool_format not in FORMATS:
        raise ConfigError(f"--tool-format must be one of {', '.join(FORMATS)}, got {tool_format!r}")
    if generation_config not in SOURCES:
        raise ConfigError(f"--generation-config must be one of {', '.join(SOURCES)}, got {generation_config!r}")
    if name is not None and not name.strip():
        raise ConfigError("--served-model-name must not be empty")
    # Validate every option before loading the model.
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
        prefill_assistant=prefill_assistant,
        max_answer_tokens=max_answer_tokens,
        model_path=model,
        strict=strict_requests,
        allow_lora_loading=allow_lora_loading,
        lora_dir=lora_dir,
        access_log=access_log,
    )
    adapters = _adapters(lora or [])
    fields |= o.not_none(
        kl_budget=kl_budget, calibration=calibration, kv_cache_memory=kv_cache_memory, batch_invariant=batch_invariant or None
    )
    fields["batch_size_range"] = (1, max_running)
    options: dict[str, Any] = {
        "max_waiting": max_waiting,
        "prefix_cache": prefix_cache,
        "drafts": drafts,
        "cache_window": cache_window,
        "adapters": adapters,
        "max_loras": max_loras or max(len(adapters), 16 if allow_lora_loading else 0),
        "max_lora_rank": max_lora_rank,
        "lora_dtype": lora_dtype,
    }
    _serve(model, name, fields, settings, generation_config, options)


def _serve(
    model: str,
    name: str | None,
    fields: dict[str, Any],
    settings: ServerSettings,
    generation_config: Any,
    options: dict[str, Any],
) -> None:
    import logging
    from dataclasses import replace

    from deepseek_optimizer import report
    from deepseek_optimizer.chat.sampling_defaults import sampling_defaults
    from deepseek_optimizer.integration.memory.cache_size import check_granted
    from deepseek_optimizer.server.run import listener
    from deepseek_optimizer.server.run import serve as run
    from deepseek_optimizer.serving import make_async_engine
    from deepseek_optimizer.system.memory import free_memory

    from .model import load

    logging.basicConfig(level=logging.WARNING, format="dso: %(message)s")
    logging.getLogger("deepseek_optimizer").setLevel(logging.INFO)
    logging.getLogger("bm25s").setLevel(logging.WARNING)  # it logs every index at its own default level
    sock = listener(settings.host, settings.port)
    if "kv_cache_memory" in fields:
        check_granted(fields["kv_cache_memory"], free_memory())
    loaded, tokenizer = load(model, fields)
    defaults = sampling_defaults(loaded, model, generation_config)
    settings = replace(settings, sampling=defaults.values, sampling_not_thinking=defaults.not_thinking)
    engine = make_async_engine(loaded, tokenizer, model_name=name, **options)
    facts = report(loaded)

    def banner(host: str, port: int) -> None:
        typer.echo(_banner(engine, facts, settings, host, port), err=True)

    run(engine, settings, sock, banner)


def _adapters(given: list[str]) -> dict[str, str]:
    """The paths of adapters by name."""
    from deepseek_optimizer.errors import ConfigError

    adapters: dict[str, str] = {}
    for one in given:
        name, _, path = one.partition("=")
        if not name.strip() or not path:
            raise ConfigError(f"--lora must be NAME=PATH, got {one!r}")
        if name in adapters:
            raise ConfigError(f"--lora: the name {name!r} is given twice")
        adapters[name] = path
    return adapters


def _banner(engine: Any, facts: Any, settings: ServerSettings, host: str, port: int) -> str:
    from deepseek_optimizer.server.http.hosts import is_loopback

    formats = ", ".join(row.format for row in facts.formats)
    shown = f"[{host}]" if ":" in host else host
    keys = f"{len(settings.keys)} API key(s)" if settings.keys else "no API key required"
    lines = [
        f"model     {engine.model_name} ({facts.family}), {formats}, {facts.bytes_after / 1e6:,.0f} MB",
        f"backend   {facts.backend} ({facts.detail})",
        f"context   {engine.context:,} tokens" + (f", cache window {engine.cache_window:,}" if engine.cache_window else ""),
        f"cache     {facts.kv_cache}, {engine.core.memory.size}",
        f"address   http://{shown}:{port}/ (API under /v1), {keys}",
    ]
    if engine.adapters:
        lines.append(f"adapters  {', '.join(adapter.name for adapter in engine.adapters)}")
    if not settings.keys and not is_loopback(settings.host):
        lines.append("warning   anyone who can reach this address can use the model; require a key with --api-key-file")
    return "\n".join(lines)
