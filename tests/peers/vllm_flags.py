"""Flags of `vllm serve` as options of `dso serve`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field


class FlagError(RuntimeError):
    """A flag without an equivalent."""


@dataclass
class Flags:
    """What a server is started with.

    Attributes:
        options: command-line options.
        environment: environment variables.
        context: length of the context, which is set in the model's directory; None: the model's.
        template: text of the chat template; None: it is the model's, or in a file.
    """

    options: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    context: int | None = None
    template: str | None = None


# Flags without an effect on answers: memory, parallelism, logs, compilation.
_WITH_VALUE_NO_EFFECT = frozenset({
    "api-server-count", "attention-backend", "block-size", "compilation-config", "convert", "data-parallel-size", "dtype",
    "gpu-memory-utilization", "guided-decoding-backend", "hf-overrides", "kv-cache-memory-bytes", "load-format",
    "max-cpu-loras", "max-logprobs", "max-lora-rank", "max-loras", "max-num-batched-tokens", "num-gpu-blocks-override",
    "runner", "seed", "show-hidden-metrics-for-version", "structured-outputs-config.backend",
    "swap-space", "task", "tensor-parallel-size", "tokenizer-mode",
    "tool-call-parser", "uvicorn-log-level",
})  # fmt: skip
_NO_VALUE_NO_EFFECT = frozenset({
    "async-scheduling", "disable-frontend-multiprocessing", "disable-log-requests", "disable-log-stats",
    "disable-uvicorn-access-log", "enable-auto-tool-choice", "enable-chunked-prefill", "enable-log-requests", "enable-lora",
    "enable-per-request-metrics", "enable-prefix-caching", "enable-prompt-tokens-details", "enable-request-id-headers",
    "enforce-eager", "no-async-scheduling", "no-enable-log-requests", "trust-remote-code",
})  # fmt: skip


def _adapter(value: str) -> list[str]:
    if value.startswith("{"):
        one = json.loads(value)
        return ["--lora", f"{one['name']}={one['path']}"]
    return ["--lora", value]


# Flags with one value, and those with any number of values.
_VALUE: dict[str, Callable[[str], list[str]]] = {
    "max-num-seqs": lambda value: ["--max-running", value],
    "limit-mm-per-prompt": lambda value: ["--max-pictures", str(json.loads(value)["image"])],
    "chat-template": lambda value: ["--chat-template", value],
    "reasoning-parser": lambda value: [],  # detected from the chat template
    "root-path": lambda value: ["--root-path", value],
    "generation-config": lambda value: ["--generation-config", value],
    "ssl-certfile": lambda value: ["--ssl-certfile", value],
    "ssl-keyfile": lambda value: ["--ssl-keyfile", value],
}
_VALUES: dict[str, Callable[[str], list[str]]] = {"lora-modules": _adapter}
_SWITCH: dict[str, list[str]] = {
    "no-enable-prefix-caching": ["--no-prefix-cache"],
    "enable-sleep-mode": ["--enable-sleep-mode"],
    "enable-tokenizer-info-endpoint": [],
    "enable-server-load-tracking": [],
}


def translate(model: str, given: list[str]) -> Flags:
    """The options for a model under its name in the API.

    Raises:
        FlagError: there is no equivalent to a flag.
    """
    made = Flags()
    names: list[str] = [model]
    keys: list[str] = []
    at = 0
    while at < len(given):
        flag, joined, value = given[at].partition("=")
        name = flag.removeprefix("--").replace("_", "-")
        at += 1
        if not flag.startswith("-"):
            raise FlagError(f"dso serve has no equivalent to {flag}")
        if name in _NO_VALUE_NO_EFFECT:
            continue
        if name in _SWITCH:
            made.options += _SWITCH[name]
            continue
        values = [value] if joined else []
        several = name in _VALUES or name in ("served-model-name", "api-key")
        while not joined and at < len(given) and not given[at].startswith("--") and (several or not values):
            values.append(given[at])
            at += 1
        if name in _WITH_VALUE_NO_EFFECT:
            continue
        if name == "served-model-name":
            names = values
        elif name == "api-key":
            keys += values
        elif name == "max-model-len":
            made.context = int(values[0])
        elif name == "chat-template" and "{" in values[0]:
            made.template = values[0]
        elif name in _VALUES:
            made.options += [option for one in values for option in _VALUES[name](one)]
        elif name in _VALUE:
            made.options += _VALUE[name](values[0])
        else:
            raise FlagError(f"dso serve has no equivalent to --{name}")
    made.options += ["--served-model-name", names[0]]
    if keys:
        made.environment["DSO_API_KEYS"] = "\n".join(keys)
    return made


def translate_environment(flags: Flags, given: Mapping[str, str]) -> tuple[list[str], dict[str, str]]:
    """The options and the environment of a server, with those to which vLLM's variables correspond.

    Args:
        flags: what `translate` returned.
        given: the variables that a test sets.
    """
    options, environment = list(flags.options), {**given, **flags.environment}
    if key := given.get("VLLM_API_KEY"):
        environment["DSO_API_KEYS"] = key
    if given.get("VLLM_ALLOW_RUNTIME_LORA_UPDATING"):
        options += ["--allow-lora-loading", "--lora-dir", "/", "--max-loras", "64"]
    return options, environment
