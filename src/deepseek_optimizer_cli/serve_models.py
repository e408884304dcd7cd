"""`dso serve` with several models: options, and how each model is loaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import banner_lines

if TYPE_CHECKING:
    from deepseek_optimizer.server.pool.model_list import ModelFile
    from deepseek_optimizer.server.settings import ServerSettings

_CACHE_PART = 8  # a model's cache may take this part of the memory for models, unless --kv-cache-memory is given
_SEVERAL: dict[str, Any] = {"rich_help_panel": "Several models"}

ModelsDir = Annotated[
    str | None,
    typer.Option(
        "--models-dir",
        metavar="DIRECTORY",
        help="Serve all models in this directory: its subdirectories and .gguf files, by name. A model is loaded when a "
        "request names it, and unloaded when others need the memory.",
        **_SEVERAL,
    ),
]
ModelsMemory = Annotated[
    int | None,
    typer.Option(
        "--models-memory",
        min=1,
        metavar="BYTES",
        help="Maximum memory of all loaded models, weights and caches. Default: the free memory, less a reserve.",
        **_SEVERAL,
    ),
]
Pin = Annotated[
    list[str] | None,
    typer.Option("--pin", metavar="NAME", help="Load this model at the start and keep it loaded. Repeatable.", **_SEVERAL),
]
LoadTimeout = Annotated[
    float,
    typer.Option(
        "--load-timeout",
        min=0.1,
        metavar="SECONDS",
        help="Maximum time that a request waits for its model; then it receives status 503 with Retry-After.",
        **_SEVERAL,
    ),
]


@dataclass(frozen=True)
class PoolOptions:
    """The options of several models, by the names of their parameters in `serve`."""

    models: tuple[str, ...]
    models_dir: str | None
    models_memory: int | None
    pin: tuple[str, ...]
    load_timeout: float


def serve_models(
    given: PoolOptions,
    settings: ServerSettings,
    fields: dict[str, Any],
    load: Callable[[str, str], tuple[Any, ServerSettings, int]],
    json_logs: bool,
    ocr: str | None,
) -> None:
    """Serves several models.

    Args:
        given: which models.
        settings: the server's.
        fields: of `DeepSeekConfig`, for each model; a size of the cache is added.
        load: loads the model of a path under a name; returns its engine, the settings for it, and the memory that it may take.
        json_logs: whether to log JSON.
        ocr: see `ocr_model`.
    """
    from deepseek_optimizer.server.http.logs import set_up_logs
    from deepseek_optimizer.server.pool.model_list import models_at, models_of
    from deepseek_optimizer.server.pool.model_pool import ModelPool
    from deepseek_optimizer.server.pool_app import opener
    from deepseek_optimizer.server.run import check_tls, listener
    from deepseek_optimizer.server.run import serve_models as run
    from deepseek_optimizer.system.memory import free_memory, less_reserve, mb

    from .model import ocr_model

    if not given.models and given.models_dir is None:
        raise ValueError("give the MODEL to serve, or a directory of models with --models-dir")
    set_up_logs(json_logs)
    check_tls(settings)
    sock = listener(settings.host, settings.port)
    with ocr_model(ocr) as reader:
        memory = given.models_memory or max(1, less_reserve(free_memory().free))
        cache = fields.setdefault("kv_cache_memory", max(1, memory // _CACHE_PART))

        def list_files() -> dict[str, ModelFile]:
            return {**({} if given.models_dir is None else models_of(given.models_dir)), **models_at(given.models)}

        pool = ModelPool(
            settings,
            list_files,
            opener(lambda file: load(file.path, file.name)),
            memory=memory,
            cache=cache,
            pinned=given.pin,
            default=None if not given.models else next(iter(models_at(given.models))),
            load_seconds=given.load_timeout,
            ocr=reader,
        )

        def banner(host: str, port: int) -> None:
            lines = [
                f"models    {', '.join(sorted(pool.models)) or 'none yet'}",
                f"memory    at most {mb(memory)}, of which {mb(cache)} for the cache of each model",
                banner_lines.address_line(settings, host, port),
                *banner_lines.ocr_lines(ocr),
                *banner_lines.access_warning(settings),
            ]
            typer.echo("\n".join(lines), err=True)

        run(pool, sock, banner)
