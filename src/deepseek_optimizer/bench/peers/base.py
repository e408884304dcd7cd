"""The protocol of a peer, and what peers share."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from ...errors import ConfigError
from ..work import Work


class Peer(Protocol):
    """Another engine to compare with.

    Attributes:
        name: as on the command line.
        requirements: pip requirements of its virtual environment; empty: it runs in the current one.
        unwanted: packages to uninstall afterwards.
        environment: variables for pip's builds.
    """

    name: str
    requirements: Sequence[str]
    unwanted: Sequence[str]
    environment: dict[str, str]

    def command(self, python: Path, model: Path, work: Work, *, threads: int, repeats: int, warmup: int) -> list[str]:
        """The command of the side, with this interpreter.

        Raises:
            ConfigError: this engine cannot read the model, or does not support the work.
        """


def script(name: str) -> str:
    """The path of a script in `sides/`."""
    return str(Path(__file__).parents[1] / "sides" / name)


def arguments(work: Work, *, threads: int, repeats: int, warmup: int) -> list[str]:
    """The options common to all sides."""
    options = {**asdict(work), "threads": threads, "repeats": repeats, "warmup": warmup}
    return [text for name, value in options.items() for text in (f"--{name}", str(value))]


def own_command(
    side: str,
    model: str | Path,
    work: Work,
    *,
    threads: int,
    repeats: int,
    warmup: int,
    fields: Mapping[str, Any] | None = None,
) -> list[str]:
    """The command of one of `sides.load.SIDES`, which run in this package's environment. fields: of DeepSeekConfig."""
    options = arguments(work, threads=threads, repeats=repeats, warmup=warmup)
    config = ["--config", json.dumps(dict(fields))] if fields else []
    return [sys.executable, "-m", "deepseek_optimizer.bench.sides.model", side, str(model), *config, *options]


def check_directory(peer: str, model: Path) -> None:
    """Raises ConfigError if `model` is not a Transformers directory, or is packed, which only this package can read."""
    from ...checkpoint.packed import is_packed

    config = model / "config.json"
    if not config.exists():
        raise ConfigError(f"{peer} needs a Transformers directory, got {model}; give one with --peer-model {peer}=DIR")
    if is_packed(json.loads(config.read_text(encoding="utf-8"))):
        raise ConfigError(f"{model} is packed, which {peer} cannot read; give the original model with --reference")


def check_depth(peer: str, work: Work) -> None:
    """Raises ConfigError for engines that cannot start with a filled cache."""
    if work.depth:
        raise ConfigError(f"{peer} cannot start with a filled cache; omit --depth, and use a longer --prompt")
