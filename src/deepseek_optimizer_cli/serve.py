"""`dso serve MODEL`: the OpenAI-compatible server, with a chat page at /."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from . import banner_lines
from . import options as o
from . import serve_models as several
from . import serve_options as so
from . import serve_ray as on_ray
from .serve_engine import check_options, load_engine

if TYPE_CHECKING:
    from deepseek_optimizer.server.loading import LoadedModel
    from deepseek_optimizer.server.settings import ServerSettings

_NEEDED = ("fastapi", "httptools", "orjson", "prometheus_client", "python_multipart", "uvicorn", "xgrammar")


@o.loads_model
def serve(
    model: so.Model = None,
    *,
    host: so.Host = "127.0.0.1",
    port: so.Port = 8000,
    name: so.Name = None,
    api_key_file: so.ApiKeyFile = None,
    allow_host: so.AllowHost = None,
    allow_origin: so.AllowOrigin = None,
    strict_requests: so.StrictRequests = False,
    access_log: so.AccessLog = False,
    log_format: so.LogFormat = "text",
    root_path: so.RootPath = "",
    ssl_certfile: so.SslCertfile = None,
    ssl_keyfile: so.SslKeyfile = None,
    ssl_keyfile_password: so.SslKeyfilePassword = None,
    ssl_ca_certs: so.SslCaCerts = None,
    otlp_traces_endpoint: so.OtlpTracesEndpoint = None,
    slots: so.Slots = True,
    metrics: so.Metrics = True,
    page: so.Page = True,
    allowed_media_domains: so.AllowedMediaDomains = None,
    media_timeout: so.MediaTimeout = 10.0,
    sleep_mode: so.SleepMode = False,
    sleep_idle_seconds: so.SleepIdleSeconds = None,
    fields: dict[str, Any],
    kl_budget: o.KlBudget = None,
    calibration: o.Calibration = None,
    max_running: so.MaxRunningOrProfile = None,
    max_waiting: so.MaxWaiting = 256,
    prefill_chunk: so.PrefillChunk = None,
    kv_cache_memory: so.KvCacheMemory = None,
    prefix_cache: so.PrefixCache = True,
    models_dir: several.ModelsDir = None,
    models_memory: several.ModelsMemory = None,
    pin: several.Pin = None,
    load_timeout: several.LoadTimeout = 120.0,
    ray: on_ray.Ray = False,
    ray_address: on_ray.RayAddress = None,
    replicas: on_ray.Replicas = 1,
    max_replicas: on_ray.MaxReplicas = None,
    replica_cpus: on_ray.ReplicaCpus = None,
    scale_down_after: on_ray.ScaleDownAfter = None,
    replica_nodes: on_ray.ReplicaNodes = 1,
    prefix_cache_dir: o.PrefixCacheDir = None,
    prefix_cache_bytes: o.PrefixCacheBytes = 8 << 30,
    drafts: so.Drafts = True,
    draft_model: o.DraftModel = None,
    draft_precision: o.DraftPrecision = None,
    batch_invariant: so.BatchInvariant = False,
    policy: so.Policy = "fixed",
    request_timeout: so.RequestTimeout = 600.0,
    drain_seconds: so.DrainSeconds = 30.0,
    max_body_bytes: so.MaxBodyBytes = None,
    max_pictures: so.MaxPictures = 64,
    state_dir: so.StateDir = None,
    response_days: so.ResponseDays = 30.0,
    response_mb: so.ResponseMb = 128.0,
    lora: so.Lora = None,
    allow_lora_loading: so.AllowLoraLoading = False,
    lora_dir: so.LoraDir = None,
    max_loras: so.MaxLoras = None,
    max_lora_rank: so.MaxLoraRank = 64,
    lora_dtype: so.LoraDtype = "auto",
    cache_window: so.CacheWindow = None,
    chat_template: o.ChatTemplate = None,
    generation_config: so.GenerationConfig = "model",
    max_answer_tokens: so.MaxAnswerTokens = 4096,
    tool_format: so.ToolFormat = None,
    reasoning: so.Reasoning = None,
    thinking: so.Thinking = None,
    pooling: so.Pooling = None,
    reranker: so.Reranker = "auto",
    prefill_assistant: so.PrefillAssistant = False,
    max_file_mb: so.MaxFileMb = 32.0,
    file_memory_mb: so.FileMemoryMb = 256.0,
    ocr: so.Ocr = None,
    max_scanned_pages: so.MaxScannedPages = 100,
) -> None:
    """Serve a model through an OpenAI-compatible API, with a chat page at /."""
    missing = [package for package in _NEEDED if importlib.util.find_spec(package) is None]
    if missing:
        raise ValueError(f'the server needs {", ".join(missing)}; install with: pip install "deepseek-optimizer[serve]"')

    from deepseek_optimizer.chat.named_template import read_template
    from deepseek_optimizer.checkpoint.sentence_transformers import POOLING_MODES
    from deepseek_optimizer.errors import ConfigError
    from deepseek_optimizer.server.keys import read_keys
    from deepseek_optimizer.server.served_model import ServedModel
    from deepseek_optimizer.server.settings import ServerSettings

    check_options(tool_format, generation_config, name)
    on_ray_options = on_ray.RayOptions(ray, ray_address, replicas, max_replicas, replica_cpus, scale_down_after, replica_nodes)
    on_ray_options.check(
        {
            "several models": models_dir is not None or model is None or len(model) > 1,
            "--ssl-certfile": ssl_certfile is not None,
            "--otlp-traces-endpoint": otlp_traces_endpoint is not None,
            "--ocr": ocr is not None,
            "--port 0": port == 0,
            "--prefix-cache-dir": prefix_cache_dir is not None,
            "--state-dir": state_dir is not None,
            "--allow-lora-loading": allow_lora_loading,
            "--enable-sleep-mode": sleep_mode,
            "--access-log": access_log,
            "--log-format": log_format != "text",
        }
    )
    if log_format not in ("text", "json"):
        raise ConfigError(f"--log-format must be text or json, got {log_format!r}")
    if policy not in ("fixed", "latency", "throughput"):
        raise ConfigError(f"--policy must be fixed, latency or throughput, got {policy!r}")
    if pooling is not None and pooling not in POOLING_MODES:
        raise ConfigError(f"--pooling must be one of {', '.join(POOLING_MODES)}, got {pooling!r}")
    drafting = (draft_model, draft_precision)
    if not drafts and drafting != (None, None):
        raise ConfigError("--no-drafts contradicts --draft-model and --draft-precision; leave out one of them")
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
        max_pictures=max_pictures,
        max_file_bytes=max(1, int(max_file_mb * 1e6)),
        max_file_bytes_total=file_memory,
        max_file_bytes_per_client=max(1, file_memory // 2) if keys else file_memory,
        max_scanned_pages=max_scanned_pages,
        state_dir=None if state_dir is None else Path(state_dir),
        max_response_bytes_total=response_bytes,
        max_response_bytes_per_client=max(1, response_bytes // 2) if keys else response_bytes,
        response_seconds=response_days * 86_400,
        request_seconds=request_timeout,
        drain_seconds=drain_seconds,
        tools_format=tool_format,
        reasoning=reasoning,
        thinking=thinking,
        reranker=reranker,  # type: ignore[arg-type]  # checked there
        prefill_assistant=prefill_assistant,
        max_answer_tokens=max_answer_tokens,
        strict=strict_requests,
        allow_lora_loading=allow_lora_loading,
        lora_dir=lora_dir,
        access_log=access_log,
        root_path=root_path,
        slots=slots,
        metrics=metrics,
        page=page,
        allowed_media_domains=tuple(allowed_media_domains or ()),
        media_seconds=media_timeout,
        sleep_mode=sleep_mode,
        idle_sleep=sleep_idle_seconds,
        ssl_certfile=ssl_certfile,
        ssl_keyfile=ssl_keyfile,
        ssl_keyfile_password=ssl_keyfile_password,
        ssl_ca_certs=ssl_ca_certs,
    )
    adapters = _adapters(lora or [])
    fields |= o.not_none(
        kl_budget=kl_budget,
        calibration=calibration,
        kv_cache_memory=kv_cache_memory,
        batch_invariant=batch_invariant or None,
        prefill_chunk=prefill_chunk,
    )
    if max_running is not None or "profile" not in fields:
        fields["batch_size_range"] = (1, max_running or 32)
    options: dict[str, Any] = {
        "max_waiting": max_waiting,
        "prefix_cache": prefix_cache,
        "prefix_cache_dir": prefix_cache_dir,
        "prefix_cache_bytes": prefix_cache_bytes,
        **({} if drafts and "profile" in fields else {"drafts": drafts}),
        "policy": policy,
        "cache_window": cache_window,
        "adapters": adapters,
        "max_loras": max_loras or max(len(adapters), 16 if allow_lora_loading else 0),
        "max_lora_rank": max_lora_rank,
        "lora_dtype": lora_dtype,
    }

    def served(path: str, name: str | None) -> ServedModel:
        return ServedModel(path, name, template, fields, options, generation_config, pooling, *drafting)

    def load(path: str, name: str | None) -> LoadedModel:
        return load_engine(served(path, name), settings)

    if models_dir is not None or model is None or len(model) > 1:
        if name is not None:
            raise ConfigError("--served-model-name names a single model; several have the names of their files")
        if fields.get("device", "cpu") != "cpu":
            raise ConfigError("--device: several models share the host's memory; serve a single one on a CUDA device")
        if adapters or allow_lora_loading or otlp_traces_endpoint is not None:
            raise ConfigError("--lora, --allow-lora-loading and --otlp-traces-endpoint need a single model")
        if drafting != (None, None):
            raise ConfigError("--draft-model and --draft-precision need a single model")
        if sleep_idle_seconds is not None:
            raise ConfigError("--sleep-idle-seconds needs a single model; several are unloaded by --models-memory")
        pool = several.PoolOptions(tuple(model or ()), models_dir, models_memory, tuple(pin or ()), load_timeout)
        several.serve_models(
            pool,
            settings,
            fields,
            lambda path, name: load(path, name)[:3],
            log_format == "json",
            ocr,
        )
        return
    if pin or models_memory is not None:
        raise ConfigError("--pin and --models-memory need several models: give more MODELs, or --models-dir")
    if ray:
        on_ray.serve_on_ray(on_ray_options, served(model[0], name), settings)
        return
    lines = banner_lines.draft_lines(*drafting), banner_lines.ocr_lines(ocr)
    granted = kv_cache_memory, fields.get("backend", "auto"), fields.get("device")
    _serve(settings, lambda: load(model[0], name), granted, log_format == "json", otlp_traces_endpoint, ocr, lines)


def _serve(
    settings: ServerSettings,
    load: Callable[[], LoadedModel],
    granted: tuple[int | None, str, Any],
    json_logs: bool,
    traces: str | None,
    ocr: str | None,
    lines: tuple[list[str], list[str]],
) -> None:
    """Serves the model that `load` loads, see `serve_engine`.

    Args:
        granted: memory of the KV cache, None for what is free, and the backend and the device that are asked for.
        lines: of the banner, before and after the address.
    """
    from deepseek_optimizer.integration.load.placement import target_of
    from deepseek_optimizer.integration.memory.cache_size import check_granted
    from deepseek_optimizer.server.http.logs import set_up_logs
    from deepseek_optimizer.server.http.tracing import Tracer, otlp_exporter
    from deepseek_optimizer.server.run import check_tls, listener
    from deepseek_optimizer.server.run import serve as run
    from deepseek_optimizer.system.memory import device_memory

    from .model import ocr_model

    set_up_logs(json_logs)
    check_tls(settings)
    exporter = None if traces is None else otlp_exporter(traces)
    sock = listener(settings.host, settings.port)
    memory, *target = granted
    if memory is not None:
        check_granted(memory, device_memory(target_of(*target)))
    with ocr_model(ocr) as reader:
        engine, settings, _, facts = load()

        def banner(host: str, port: int) -> None:
            typer.echo(_banner(engine, facts, settings, lines, host, port), err=True)

        run(engine, settings, sock, banner, None if exporter is None else Tracer(exporter, engine.model_name), reader)


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


def _banner(
    engine: Any, facts: Any, settings: ServerSettings, further: tuple[list[str], list[str]], host: str, port: int
) -> str:
    formats = ", ".join(row.format for row in facts.formats)
    lines = [
        f"model     {engine.model_name} ({facts.family}), {formats}, {facts.bytes_after / 1e6:,.0f} MB",
        f"backend   {facts.backend} ({facts.detail})",
        f"context   {engine.context:,} tokens" + (f", cache window {engine.cache_window:,}" if engine.cache_window else ""),
        *further[0],
        banner_lines.address_line(settings, host, port),
    ]
    if engine.generates:
        lines.insert(3, f"cache     {facts.kv_cache}, {engine.core.memory.size}")
    if engine.adapters:
        lines.append(f"adapters  {', '.join(adapter.name for adapter in engine.adapters)}")
    lines += further[1]
    lines += banner_lines.access_warning(settings)
    return "\n".join(lines)
