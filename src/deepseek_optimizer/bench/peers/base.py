"""What a peer has to say of itself."""

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
    """An engine that a side runs in.

    Attributes:
        name: as on the command line.
        requirements: what pip installs into its own environment; none: it runs in this interpreter's.
        unwanted: what pip then removes from it.
        environment: variables that pip's builds read.
    """

    name: str
    requirements: Sequence[str]
    unwanted: Sequence[str]
    environment: dict[str, str]

    def command(self, python: Path, model: Path, work: Work, *, threads: int, repeats: int, warmup: int) -> list[str]:
        """What starts the side, with the interpreter given.

        Raises: ConfigError where this engine does not read such a model, or cannot do such work.
        """


def script(name: str) -> str:
    """Path of a script in `sides/`."""
    return str(Path(__file__).parents[1] / "sides" / name)


def arguments(work: Work, *, threads: int, repeats: int, warmup: int) -> list[str]:
    """Options that every side takes."""
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
    """What starts one of `sides.load.SIDES`, which run in this package's own environment; fields: of DeepSeekConfig."""
    options = arguments(work, threads=threads, repeats=repeats, warmup=warmup)
    config = ["--config", json.dumps(dict(fields))] if fields else []
    return [sys.executable, "-m", "deepseek_optimizer.bench.sides.model", side, str(model), *config, *options]


def check_directory(peer: str, model: Path) -> None:
    """Raises ConfigError where `model` is no Transformers directory, or one that only this package reads."""
    from ...checkpoint.packed import is_packed

    config = model / "config.json"
    if not config.exists():
        raise ConfigError(f"{peer} reads Transformers directories, not {model}; name one with --peer-model {peer}=DIR")
    if is_packed(json.loads(config.read_text(encoding="utf-8"))):
        raise ConfigError(f"{model} is packed, which {peer} cannot read; name the model it was made from with --reference")


def check_depth(peer: str, work: Work) -> None:
    """Raises ConfigError: for engines that cannot begin behind a filled cache."""
    if work.depth:
        raise ConfigError(f"{peer} cannot begin behind a filled cache; leave --depth out, and give a longer --prompt")
