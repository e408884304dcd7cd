"""What a peer has to say of itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Protocol

from ..work import Work


class Peer(Protocol):
    """An engine that a side runs in.

    Attributes:
        name: as on the command line.
        requirements: what pip installs into its own environment; none: it runs in this interpreter's.
        environment: variables that pip's builds read.
    """

    name: str
    requirements: Sequence[str]
    environment: dict[str, str]

    def command(self, python: Path, model: Path, work: Work, *, threads: int, repeats: int, warmup: int) -> list[str]:
        """What starts the side, with the interpreter given.

        Raises: ConfigError where this engine does not read such a model.
        """


def script(name: str) -> str:
    """Path of a script in `sides/`."""
    return str(Path(__file__).parents[1] / "sides" / name)


def arguments(work: Work, *, threads: int, repeats: int, warmup: int) -> list[str]:
    """Options that every side takes."""
    options = {**asdict(work), "threads": threads, "repeats": repeats, "warmup": warmup}
    return [text for name, value in options.items() for text in (f"--{name}", str(value))]
