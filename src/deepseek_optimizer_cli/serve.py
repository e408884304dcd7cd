"""`dso serve MODEL`: the OpenAI-compatible server, with a chat page at /."""

from __future__ import annotations

import importlib.util
from pathlib import Path
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
_SEARCH: dict[str, Any] = {"rich_help_panel": "Embeddings and scores"}


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
    log_format: Annotated[
        str,
        typer.Option(
            "--log-format", metavar="FORMAT", help="Format of the log: text, or json (an object per line).", **_ACCESS
        ),
    ] = "text",
    root_path: Annotated[
        str,
        typer.Option(
            "--root-path",
            metavar="PATH",
            help="Prefix of all paths that a reverse proxy removes before it forwards a request, such as /llm.",
            **_ACCESS,
        ),
    ] = "",
    ssl_certfile: Annotated[
        str | None,
        typer.Option("--ssl-certfile", metavar="FILE", help="Certificate chain (PEM), to serve HTTPS.", **_ACCESS),
    ] = None,
    ssl_keyfile: Annotated[
        str | None,
        typer.Option(
            "--ssl-keyfile", metavar="FILE", help="Private key (PEM). Default: in the file of --ssl-certfile.", **_ACCESS
        ),
    ] = None,
    ssl_keyfile_password: Annotated[
        str | None,
        typer.Option(
            "--ssl-keyfile-password",
            metavar="PASSWORD",
            envvar="DSO_SSL_KEYFILE_PASSWORD",
            show_envvar=False,
            help="Password of an encrypted private key. Other users can see it here; set the environment variable "
            "DSO_SSL_KEYFILE_PASSWORD instead.",
            **_ACCESS,
        ),
    ] = None,
    ssl_ca_certs: Annotated[
        str | None,
        typer.Option(
            "--ssl-ca-certs",
            metavar="FILE",
            help="Certificates of authorities (PEM); clients must have a certificate that one of them issued.",
            **_ACCESS,
        ),
    ] = None,
    otlp_traces_endpoint: Annotated[
        str | None,
        typer.Option(
            "--otlp-traces-endpoint",
            metavar="URL",
            help="Export OpenTelemetry traces to this URL of a collector, such as http://localhost:4318/v1/traces.",
            **_ACCESS,
        ),
    ] = None,
    sleep_mode: Annotated[
        bool,
        typer.Option(
            "--enable-sleep-mode",
            help="Let clients release the memory of the cache and of mapped weights by POST /sleep, until POST /wake_up.",
            **_REQUESTS,
        ),
    ] = False,
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
    state_dir: Annotated[
        str | None,
        typer.Option(
            "--state-dir",
            metavar="DIR",
            help="Folder for stored responses of /v1/responses, which survive a restart there. Default: they are in memory.",
            **_REQUESTS,
        ),
    ] = None,
    response_days: Annotated[
        float,
        typer.Option(
            "--response-days",
            min=0.001,
            metavar="DAYS",
            help="Time after its last use at which a stored response is deleted.",
            **_REQUESTS,
        ),
    ] = 30.0,
    response_mb: Annotated[
        float,
        typer.Option(
            "--response-mb",
            min=0.001,
            metavar="MB",
            help="Maximum size of all stored responses, in megabytes; the oldest are deleted. With API keys, each key may use "
            "half of it.",
            **_REQUESTS,
        ),
    ] = 128.0,
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
    chat_template: o.ChatTemplate = None,
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
            help="Syntax in which the model writes tool calls; generic: for models without tools. Default: detected from the "
            "chat template, or generic.",
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
    pooling: Annotated[
        str | None,
        typer.Option(
            "--pooling",
            metavar="MODE",
            help="How hidden states become an embedding: cls, lasttoken, max, mean, mean_sqrt_len_tokens or weightedmean. "
            "Default: as the checkpoint's modules.json says; without it, mean.",
            **_SEARCH,
        ),
    ] = None,
    reranker: Annotated[
        str,
        typer.Option(
            "--reranker",
            metavar="HOW",
            help="How a model without a classification head scores pairs of texts: cosine of their embeddings; yes-no, the "
            "probability that a language model judges the document to answer the query; auto: yes-no for a language model "
            "whose files or name say that it is a reranker.",
            **_SEARCH,
        ),
    ] = "auto",
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

    from deepseek_optimizer.chat.named_template import read_template
    from deepseek_optimizer.chat.sampling_defaults import SOURCES
    from deepseek_optimizer.chat.tools import FORMATS
    from deepseek_optimizer.checkpoint.sentence_transformers import POOLING_MODES
    from deepseek_optimizer.errors import ConfigError
    from deepseek_optimizer.server.keys import read_keys
    from deepseek_optimizer.server.settings import ServerSettings

    if tool_format is not None and tool_format not in FORMATS:
        raise ConfigError(f"--tool-format must be one of {', '.join(FORMATS)}, got {tool_format!r}")
    if log_format not in ("text", "json"):
        raise ConfigError(f"--log-format must be text or json, got {log_format!r}")
    if pooling is not None and pooling not in POOLING_MODES:
        raise ConfigError(f"--pooling must be one of {', '.join(POOLING_MODES)}, got {pooling!r}")
    if generation_config not in SOURCES:
        raise ConfigError(f"--generation-config must be one of {', '.join(SOURCES)}, got {generation_config!r}")
    if name is not None and not name.strip():
        raise ConfigError("--served-model-name must not be empty")
    # Validate every option before loading the model.
    template = None if chat_template is None else read_template(chat_template)
    keys = read_keys(api_key_file)
    file_memory = max(1, int(file_memory_mb * 1e6))
    response_bytes = max(1, int(response_mb * 1e6))
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
        state_dir=None if state_dir is None else Path(state_dir),
        max_response_bytes_total=response_bytes,
        max_response_bytes_per_client=max(1, response_bytes // 2) if keys else response_bytes,
        response_seconds=response_days * 86_400,
        request_seconds=request_timeout,
        drain_seconds=drain_seconds,
        tools_format=tool_format,
        reasoning=reasoning,
        reranker=reranker,  # type: ignore[arg-type]  # checked there
        prefill_assistant=prefill_assistant,
        max_answer_tokens=max_answer_tokens,
        model_path=model,
        strict=strict_requests,
        allow_lora_loading=allow_lora_loading,
        lora_dir=lora_dir,
        access_log=access_log,
        root_path=root_path,
        sleep_mode=sleep_mode,
        ssl_certfile=ssl_certfile,
        ssl_keyfile=ssl_keyfile,
        ssl_keyfile_password=ssl_keyfile_password,
        ssl_ca_certs=ssl_ca_certs,
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
    pooling_and_traces = (pooling, log_format == "json", otlp_traces_endpoint)
    _serve(model, name, template, fields, settings, generation_config, options, *pooling_and_traces)


def _serve(
    model: str,
    name: str | None,
    template: str | None,
    fields: dict[str, Any],
    settings: ServerSettings,
    generation_config: Any,
    options: dict[str, Any],
    pooling: str | None,
    json_logs: bool,
    traces: str | None,
) -> None:
    from dataclasses import replace

    from deepseek_optimizer import report
    from deepseek_optimizer.chat.sampling_defaults import SamplingDefaults, sampling_defaults
    from deepseek_optimizer.checkpoint.sentence_transformers import read_embedding_settings
    from deepseek_optimizer.integration.encoder.text_encoder import is_encoder_runtime
    from deepseek_optimizer.integration.load.resolve import resolve
    from deepseek_optimizer.integration.memory.cache_size import check_granted
    from deepseek_optimizer.server.http.logs import set_up_logs
    from deepseek_optimizer.server.http.tracing import Tracer, otlp_exporter
    from deepseek_optimizer.server.run import check_tls, listener
    from deepseek_optimizer.server.run import serve as run
    from deepseek_optimizer.serving import make_async_engine
    from deepseek_optimizer.system.memory import free_memory

    from .model import load

    set_up_logs(json_logs)
    check_tls(settings)
    exporter = None if traces is None else otlp_exporter(traces)
    sock = listener(settings.host, settings.port)
    if "kv_cache_memory" in fields:
        check_granted(fields["kv_cache_memory"], free_memory())
    loaded, tokenizer = load(model, fields, template)
    embedding = read_embedding_settings(resolve(model))
    if embedding.chat_template and embedding.score_tokens is None:
        typer.echo("dso: texts are embedded without the chat template that sentence-transformers applies to them", err=True)
    if pooling is not None:
        embedding = replace(embedding, pooling=(pooling,))
    encoder = is_encoder_runtime(loaded.dso)
    if encoder:
        options["max_tokens"] = embedding.max_tokens
    defaults = SamplingDefaults() if encoder else sampling_defaults(loaded, model, generation_config)
    settings = replace(settings, sampling=defaults.values, sampling_not_thinking=defaults.not_thinking, embedding=embedding)
    engine = make_async_engine(loaded, tokenizer, model_name=name, **options)
    facts = report(loaded)

    def banner(host: str, port: int) -> None:
        typer.echo(_banner(engine, facts, settings, host, port), err=True)

    run(engine, settings, sock, banner, None if exporter is None else Tracer(exporter, engine.model_name))


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
    scheme = "http" if settings.ssl_certfile is None else "https"
    keys = f"{len(settings.keys)} API key(s)" if settings.keys else "no API key required"
    lines = [
        f"model     {engine.model_name} ({facts.family}), {formats}, {facts.bytes_after / 1e6:,.0f} MB",
        f"backend   {facts.backend} ({facts.detail})",
        f"context   {engine.context:,} tokens" + (f", cache window {engine.cache_window:,}" if engine.cache_window else ""),
        f"address   {scheme}://{shown}:{port}{settings.root_path}/ (API under /v1), {keys}",
    ]
    if engine.generates:
        lines.insert(3, f"cache     {facts.kv_cache}, {engine.core.memory.size}")
    if engine.adapters:
        lines.append(f"adapters  {', '.join(adapter.name for adapter in engine.adapters)}")
    if not settings.keys and not is_loopback(settings.host):
        lines.append("warning   anyone who can reach this address can use the model; require a key with --api-key-file")
    return "\n".join(lines)
