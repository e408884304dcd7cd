"""A pytest plugin for the process that runs llama.cpp's server tests: their `ServerProcess` starts `dso serve`.

Their `utils.py` stays as it is. Replaced are its fixtures: how a server is started and stopped, which models there are, and
what belongs to a model. llama-server's flags --seed and --verbose, the defaults of fields of requests, have no equivalent: they
are added to the requests that omit the field. Names of headers are compared without regard to case, as HTTP defines them.
"""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import requests
from requests.structures import CaseInsensitiveDict

from support.outcomes import Recorder

from . import models
from .left_out import RESULTS, LeftOut
from .llama_deviations import LLAMA_SERVER
from .pictures import bytes_of, picture_of, url_of
from .served import Shared
from .values import VALUES, is_text_of_their_model

# Attributes of ServerProcess without an effect on answers, for any value: memory, batching, caches, drafts.
_NO_EFFECT = frozenset({
    "debug", "server_port", "server_host", "offline", "n_threads", "n_gpu_layer", "n_ubatch", "n_prompts",
    "cache_prompt", "ctk", "ctv", "fa", "server_continuous_batching", "kv_unified", "swa_full", "jinja", "cache_ram",
    "no_cache_idle_slots", "log_path", "server_embeddings", "server_reranking", "external_server", "process",
    "model_hf_repo", "model_hf_file", "id_slot", "spec_draft_n_min", "spec_draft_n_max", "model_draft", "spec_type",
    "backend_sampling", "seed", "ready",
})  # fmt: skip
_GENERATING = re.compile(r"(/v1)?/(chat/)?completions?|/infill")
# Tests that count what a server has done so far, so that each needs its own.
_FRESH = re.compile(r"test_metrics|test_sleep|test_slot_save|test_kv_keep|cached_tokens|return_progress")


_PICTURE = re.compile(r"https://huggingface\.co/ggml-org/tinygemma3-GGUF/resolve/main/test/\w+\.png")
_MODEL_NAME = re.compile(r"""["']?model["']?\s*[=:]\s*"([^"]+)\"""")


class FlagError(RuntimeError):
    """A flag of llama-server that `dso serve` does not have."""


class LlamaServer:
    """The plugin.

    Args:
        folder: for the models' directories.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._shared, self._fresh = folder, Shared(), False
        self._name: str | None = None  # the model that the test asks for: llama-server does not check it

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Puts the values that belong to a model in the place of those of theirs."""
        for item in items:
            changed = VALUES.get(getattr(item, "originalname", ""))
            if changed is not None:
                params = item.callspec.params  # type: ignore[attr-defined]
                params.update(changed(params))

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        names = _MODEL_NAME.findall(inspect.getsource(item.function))  # type: ignore[attr-defined]
        params = getattr(item, "callspec", None)
        given = params.params.get("model") if params else None
        self._name = given or (names[0] if names else None)
        self._fresh = _FRESH.search(item.nodeid) is not None
        if self._fresh:
            self._shared.stop()

    def pytest_runtest_teardown(self) -> None:
        if self._fresh:
            self._shared.stop()

    def pytest_sessionfinish(self) -> None:
        self._shared.stop()

    def start(self, server: Any, timeout_seconds: int = 60) -> None:
        """In place of `ServerProcess.start`."""
        flags, environment = flags_of(server, self._name)
        if server.chat_template and not re.fullmatch(
            r"[\w.-]+", server.chat_template
        ):  # the template itself, not the name of one
            file = self._folder / "template.jinja"
            file.write_text(server.chat_template)
            flags[flags.index(server.chat_template)] = str(file)
        served = self._shared.get(self._model(server), flags, environment)
        server.server_port, server.process, server.ready = served.port, served.process, True

    def stop(self, server: Any) -> None:
        """In place of `ServerProcess.stop`: the next test may use the server."""
        server.process = None

    def _model(self, server: Any) -> Path:
        """A directory with the model's context and default temperature."""
        made = _model_of(server)
        if made == models.seeing():
            return made
        context = server.n_ctx and (server.n_ctx if server.kv_unified else server.n_ctx // (server.n_slots or 1))
        limit = None if made.name.startswith(("encoder", "reranker")) else context
        target = self._folder / f"{made.name}-{limit}-{server.temperature}"
        if not target.exists():
            sampling = {"do_sample": server.temperature > 0}
            if server.temperature > 0:
                sampling["temperature"] = server.temperature
            models.variant(made, target, context=limit, generation=sampling if limit else None)
        return target


def _model_of(server: Any) -> Path:
    if "tinygemma3" in (server.model_hf_repo or "") and not server.server_embeddings:
        return models.seeing()
    if server.server_reranking:
        return models.reranker()
    if server.server_embeddings:
        return models.encoder(1024)
    if "infill" in (server.model_hf_repo or ""):
        return models.smollm2_with_gaps()
    return models.smollm2()


def flags_of(server: Any, name: str | None = None) -> tuple[list[str], dict[str, str]]:
    """The options of `dso serve` for a `ServerProcess`, and environment variables.

    Args:
        name: of the model, in the place of the server's alias.

    Raises:
        FlagError: there is no equivalent to one that is set.
    """
    flags = ["--prefill-assistant"]  # llama-server's default
    environment = {}
    given = {**vars(type(server)), **vars(server)}
    given |= {"model_alias": name or given["model_alias"]}
    given |= {name: given[name] or default for name, default in _DEFAULTS.items()}
    flags += [flag for name, flag in _UNLESS.items() if not given[name]]
    for attribute, value in given.items():
        if attribute in _NO_EFFECT or attribute.startswith("__") or callable(value) or value is None or value is False:
            continue
        if attribute == "api_key":
            environment["DSO_API_KEYS"] = value
        elif attribute in _FLAGS:
            flags += _FLAGS[attribute](value)
        else:
            raise FlagError(f"dso serve has no equivalent to {attribute}={value!r}")
    return flags, environment


# llama-server's defaults that differ from those of `dso serve`.
_DEFAULTS = {"cors_origins": "*", "reasoning": "auto"}
# Flags for attributes that are not set.
_UNLESS = {"server_slots": "--no-slots", "server_metrics": "--no-metrics"}
_FLAGS: dict[str, Callable[[Any], list[str]]] = {
    "model_alias": lambda value: ["--served-model-name", value],
    "n_ctx": lambda value: [],  # of the model's directory
    "temperature": lambda value: [],
    "n_batch": lambda value: ["--prefill-chunk", str(value)],
    "n_slots": lambda value: ["--max-running", str(value)],
    "n_predict": lambda value: ["--max-answer-tokens", str(value)] if value > 0 else [],
    "chat_template": lambda value: ["--chat-template", value],
    "chat_template_file": lambda value: ["--chat-template", str(Path(value).resolve())],
    "reasoning_format": lambda value: {"none": ["--no-reasoning"], "deepseek": ["--reasoning"], "auto": []}[value],
    "reasoning": lambda value: ["--no-thinking" if value == "off" else "--thinking"],
    "pooling": lambda value: ["--pooling", {"last": "lasttoken"}.get(value, value)],
    "cors_origins": lambda value: ["--allow-origin", value],
    "sleep_idle_seconds": lambda value: ["--sleep-idle-seconds", str(value)],
    "server_slots": lambda value: [],
    "server_metrics": lambda value: [],
    "no_ui": lambda value: ["--no-ui"],
}


def with_defaults(server: Any, path: str, data: Any) -> Any:
    """A request with the seed, and the verbosity, that the server was started with."""
    if not isinstance(data, dict) or not _GENERATING.fullmatch(path):
        return data
    return {"seed": server.seed, **({"verbose": True} if server.debug and "chat" in path else {}), **data}


def with_pictures(data: Any) -> Any:
    """A request with data URLs in the place of the addresses of their pictures."""
    if isinstance(data, dict):
        return {name: with_pictures(one) for name, one in data.items()}
    if isinstance(data, list):
        return [with_pictures(one) for one in data]
    return url_of(picture_of(data)) if isinstance(data, str) and _PICTURE.fullmatch(data) else data


def without_downloads(get: Callable[..., requests.Response]) -> Callable[..., requests.Response]:
    """`requests.get`, which does not download their pictures."""

    def replaced(url: str, *args: Any, **kwargs: Any) -> requests.Response:
        if not _PICTURE.fullmatch(url):
            return get(url, *args, **kwargs)
        response = requests.Response()
        response.status_code, response._content = 200, bytes_of(picture_of(url))
        return response

    return replaced


def pytest_configure(config: pytest.Config) -> None:
    import utils  # theirs, in the folder that the tests run in

    folder = models.scratch()
    config.add_cleanup(folder.cleanup)
    plugin = LlamaServer(Path(folder.name))
    recorder = Recorder(os.environ[RESULTS], whole_id=True)
    for part in (recorder, LeftOut(LLAMA_SERVER, recorder), plugin):
        config.pluginmanager.register(part)
    plain_match, plain_request, plain_stream = (
        utils.match_regex,
        *(getattr(utils.ServerProcess, name) for name in ("make_request", "make_stream_request")),
    )

    def match_regex(regex: str, text: str) -> bool:
        return bool(text) if is_text_of_their_model(regex) else plain_match(regex, text)

    def make_request(self: Any, method: str, path: str, data: Any = None, *args: Any, **kwargs: Any) -> Any:
        data = with_pictures(with_defaults(self, path, data))
        response = plain_request(self, method, path, data, *args, **kwargs)
        response.headers = CaseInsensitiveDict(response.headers)
        return response

    def make_stream_request(self: Any, method: str, path: str, data: Any = None, *args: Any, **kwargs: Any) -> Any:
        return plain_stream(self, method, path, with_defaults(self, path, data), *args, **kwargs)

    requests.get = without_downloads(requests.get)
    utils.match_regex = match_regex
    utils.ServerProcess.make_request, utils.ServerProcess.make_stream_request = make_request, make_stream_request
    utils.ServerProcess.start = lambda self, timeout_seconds=60: plugin.start(self, timeout_seconds)
    utils.ServerProcess.stop = lambda self: plugin.stop(self)
    utils.ServerPreset.load_all = staticmethod(lambda: None)  # no downloads
