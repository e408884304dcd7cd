"""A pytest plugin for the process that runs vLLM's server tests: their `RemoteOpenAIServer` starts `dso serve`.

`tests/utils.py` of the staged folder takes its names from here. Models that the tests name are replaced, also where a test
loads their tokenizer or downloads an adapter.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from deepseek_optimizer.versions import versions
from support.outcomes import Recorder

from . import models
from .left_out import RESULTS, LeftOut
from .served import Shared
from .vllm_deviations import VLLM
from .vllm_flags import translate, translate_environment
from .vllm_stand_ins import Answer, Platform, StandIns
from .vllm_values import ModelConfig, set_values

_ENCODERS = re.compile(r"embed|e5|bge-(small|base|m3)|gte|MiniLM|snowflake|arctic", re.IGNORECASE)
_RERANKERS = re.compile(r"rerank|cross-encoder", re.IGNORECASE)
_CLASSIFIERS = re.compile(r"classif|apeach", re.IGNORECASE)
_ANSWERS = (
    "vllm.entrypoints.pooling.pooling.protocol.PoolingResponse",
    "vllm.entrypoints.pooling.scoring.protocol.RerankResponse",
    "vllm.entrypoints.pooling.scoring.protocol.ScoreResponse",
    "vllm.entrypoints.pooling.embed.protocol.EmbeddingResponse",
    "vllm.entrypoints.pooling.classify.protocol.ClassificationResponse",
    "vllm.entrypoints.serve.engine.protocol.ErrorResponse",
)
_shared = Shared()
_folder: Path


def directory_of(name: str) -> Path:
    """The model that takes the place of the one with this name."""
    if Path(name).is_dir():
        return Path(name)
    kinds = ((_RERANKERS, models.reranker), (_CLASSIFIERS, models.classifier), (_ENCODERS, models.encoder))
    return next((model() for names, model in kinds if names.search(name)), models.smollm2())


class RemoteOpenAIServer:
    """In place of vLLM's class of this name.

    Args:
        model: name of the model.
        vllm_serve_args: flags of `vllm serve`.
        env_dict: environment variables.

    Raises:
        FlagError: `dso serve` has no equivalent to a flag.
    """

    DUMMY_API_KEY = "token-abc123"

    def __init__(
        self, model: str, vllm_serve_args: list[str] | str | None = None, *, env_dict: dict[str, str] | None = None, **_: Any
    ) -> None:
        given = vllm_serve_args.split() if isinstance(vllm_serve_args, str) else list(vllm_serve_args or [])
        flags = translate(model, given)
        if flags.template is not None:
            (_folder / "template.jinja").write_text(flags.template)
            flags.options += ["--chat-template", str(_folder / "template.jinja")]
        source = directory_of(model)
        target = _folder / f"{source.name}-{flags.context}"
        if not target.exists():
            models.variant(source, target, context=flags.context)
        served = _shared.get(target, *translate_environment(flags, env_dict or {}))
        self.host, self.port, self.proc, self.model = "127.0.0.1", served.port, served.process, model
        self.uds = None
        self.show_hidden_metrics = True

    def __enter__(self) -> RemoteOpenAIServer:
        return self

    def __exit__(self, *_: Any) -> None:
        """The next test may use the server."""

    @property
    def url_root(self) -> str:
        return f"http://{self.host}:{self.port}"

    def url_for(self, *parts: str) -> str:
        return "/".join([self.url_root, *(part.strip("/") for part in parts)])

    def get_client(self, **options: Any) -> Any:
        import openai

        return openai.OpenAI(**self._connection(self.url_for("v1"), options))

    def get_async_client(self, **options: Any) -> Any:
        import openai

        return openai.AsyncOpenAI(**self._connection(self.url_for("v1"), options))

    def get_client_anthropic(self, **options: Any) -> Any:
        import anthropic

        return anthropic.Anthropic(**self._connection(self.url_for(), options))

    def get_async_client_anthropic(self, **options: Any) -> Any:
        import anthropic

        return anthropic.AsyncAnthropic(**self._connection(self.url_for(), options))

    def _connection(self, url: str, options: dict[str, Any]) -> dict[str, Any]:
        return {"base_url": url, "api_key": self.DUMMY_API_KEY, "max_retries": 0, "timeout": 600, **options}


def any_decorator(*args: Any, **_: Any) -> Any:
    """In place of decorators about GPUs and processes: leaves the function as it is."""
    if len(args) == 1 and callable(args[0]):
        return args[0]
    return lambda function: function


def _local(load: Callable[..., Any]) -> Callable[..., Any]:
    """A loader of tokenizers by name."""

    def loaded(name: Any = None, *args: Any, tokenizer_name: Any = None, **kwargs: Any) -> Any:
        name = tokenizer_name if name is None else name
        kept = {key: value for key, value in kwargs.items() if key in ("use_fast", "padding_side", "truncation_side")}
        return load(directory_of(str(name)), *args, **kept)

    return loaded


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for module in {item.module for item in items if isinstance(item, pytest.Function)}:
        set_values(module, directory_of)


def pytest_configure(config: pytest.Config) -> None:
    global _folder
    folder = models.scratch()
    config.add_cleanup(folder.cleanup)
    config.add_cleanup(_shared.stop)
    _folder = Path(folder.name)
    recorder = Recorder(os.environ[RESULTS], whole_id=True)
    for part in (recorder, LeftOut(VLLM, recorder)):
        config.pluginmanager.register(part)
    import huggingface_hub
    import transformers

    tokenizer = _local(transformers.AutoTokenizer.from_pretrained)
    transformers.AutoTokenizer.from_pretrained = tokenizer
    huggingface_hub.snapshot_download = lambda *_, **__: str(models.adapter())
    version = versions("deepseek-optimizer")["deepseek-optimizer"]
    hub = SimpleNamespace(snapshot_download=huggingface_hub.snapshot_download)
    StandIns({
        **{name: Answer for name in _ANSWERS},
        "vllm.config.ModelConfig": lambda model, **_: ModelConfig(directory_of(model)),
        "vllm.platforms.current_platform": Platform(),
        "vllm.tokenizers.get_tokenizer": tokenizer,
        "vllm.transformers_utils.repo_utils.hf_api": lambda: hub,
        "vllm.transformers_utils.tokenizer.get_tokenizer": tokenizer,
        "vllm.version": SimpleNamespace(__version__=version, _prev_minor_version=lambda: version),
        "vllm.version.__version__": version,
    }).install()  # fmt: skip
