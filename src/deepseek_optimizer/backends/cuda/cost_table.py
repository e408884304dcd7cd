"""How work is divided on a card: defaults by compute capability, and what `dso tune --kernels` has measured on this machine.

The defaults are derived from facts about the cards, not measured: matrices and attention are divided into four programs for
each processor, so that loads of some hide those of others.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from ...errors import DataError
from ...system.user_cache import user_cache
from ...versions import versions
from .alternative import Choice
from .division import Division

VERSION = 1
_PROGRAMS_PER_PROCESSOR = 4
_MOST_PROGRAMS = 1 << 16


@dataclass(frozen=True)
class Facts:
    """A generation of cards.

    Attributes:
        card: the one that the facts are of, its largest that is common.
        processors: streaming multiprocessors.
        shared_kib: shared memory that a program may use.
        warps: that a processor holds.
        bandwidth: of the card's memory, GB/s.
    """

    card: str
    processors: int
    shared_kib: int
    warps: int
    bandwidth: int


# Shared memory and warps: NVIDIA, CUDA C++ Programming Guide, "Technical Specifications per Compute Capability". Processors and
# bandwidth: NVIDIA's whitepapers of the architectures (Ampere GA100 and GA102, Ada, Hopper, Blackwell) and data sheets.
FACTS: Mapping[tuple[int, int], Facts] = {
    (8, 0): Facts("A100 80GB SXM", 108, 163, 64, 2039),
    (8, 6): Facts("RTX 3090", 82, 99, 48, 936),
    (8, 9): Facts("RTX 4090", 128, 99, 48, 1008),
    (9, 0): Facts("H100 SXM", 132, 227, 64, 3350),
    (10, 0): Facts("B200", 148, 227, 64, 8000),
}


def facts_of(capability: tuple[int, int]) -> Facts:
    """The facts about a generation; of one that is not in the table those of the last one before it."""
    return FACTS[max((known for known in FACTS if known <= capability), default=min(FACTS))]


def shipped(capability: tuple[int, int], processors: int | None = None) -> Division:
    """The default for a card.

    Args:
        capability: its compute capability.
        processors: that it has; None: as many as the card of `FACTS`.
    """
    return Division(programs=_PROGRAMS_PER_PROCESSOR * (processors or facts_of(capability).processors))


@dataclass(frozen=True)
class Card:
    """What measured settings are for. Any other card, driver, Triton or version of this package is measured anew.

    Attributes:
        name, capability, processors: of the card.
        driver: version of the kernel module; "": unknown.
        triton, package: versions.
    """

    name: str
    capability: tuple[int, int]
    processors: int
    driver: str
    triton: str
    package: str

    @property
    def path(self) -> Path:
        """The file with its settings."""
        key = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:24]
        return user_cache() / "kernels" / f"{key}.json"


def card_of(device: torch.device, version_file: Path = Path("/proc/driver/nvidia/version")) -> Card:
    """The card of a CUDA device.

    Args:
        version_file: where the driver's version is.
    """
    properties: Any = torch.cuda.get_device_properties(device)
    text = version_file.read_text(encoding="utf-8", errors="replace") if version_file.is_file() else ""
    found = re.search(r"Module(?: for \S+)?\s+(\d+[\d.]*)", text)
    installed = versions("triton", "deepseek-optimizer")
    return Card(
        properties.name, (properties.major, properties.minor), properties.multi_processor_count, found[1] if found else "",
        installed["triton"], installed["deepseek-optimizer"],
    )  # fmt: skip


def division_for(card: Card) -> tuple[Division, str]:
    """How work is divided on a card, and where that is from, for the report.

    A file that cannot be read is not used, and the text says so.
    """
    try:
        read_choices(card)  # a file is used as a whole or not at all
        return read(card), "kernels tuned on this card"
    except FileNotFoundError:
        return shipped(card.capability, card.processors), "kernels not tuned"
    except (
        DataError,
        OSError,
        RuntimeError,
    ) as error:  # the last: no home directory, or JSON nested too deeply
        return shipped(card.capability, card.processors), f"kernels not tuned ({error})"


def read(card: Card) -> Division:
    """The settings that were measured on a card.

    Raises:
        FileNotFoundError: there are none.
        DataError: the file is damaged; it names the field.
        OSError: it cannot be read.
    """
    path, found = card.path, _record(card)["division"]
    for each in fields(Division):
        given, allowed = found.get(each.name), ALLOWED[each.name]
        if type(given) is not int or not (given in allowed if isinstance(allowed, tuple) else 0 < given <= _MOST_PROGRAMS):
            raise DataError(f"has the value {given!r}; run dso tune --kernels again", file=path, field=each.name)
    return Division(**{each.name: found[each.name] for each in fields(Division)})


def read_choices(card: Card) -> tuple[Choice, ...]:
    """The alternatives that were measured to be faster on a card. Raises as `read` does."""
    path, found = card.path, _record(card).get("alternatives", [])
    wanted = {"name": str, "rows": int, "version": str}
    for each in found if isinstance(found, list) else [found]:
        right = isinstance(each, dict) and all(type(each.get(name)) is kind for name, kind in wanted.items())
        if not right or each["rows"] <= 0:
            raise DataError(f"has the value {each!r}; run dso tune --kernels again", file=path, field="alternatives")
    return tuple(Choice(*(each[name] for name in wanted)) for each in found)


def choices_for(card: Card) -> tuple[Choice, ...]:
    """The same; none if there is no file, or one that cannot be read, which `division_for` says."""
    try:
        read(card)
        return read_choices(card)
    except (DataError, OSError):
        return ()


def _record(card: Card) -> dict[str, Any]:
    """The content of `Card.path`, with a division that is not checked yet. Raises as `read` does."""
    path = card.path
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise DataError(f"not settings of kernels ({error}); run dso tune --kernels again", file=path) from None
    if not isinstance(value, dict) or value.get("version") != VERSION or not isinstance(value.get("division"), dict):
        raise DataError("not settings of kernels of this version; run dso tune --kernels again", file=path, field="version")
    return value


def content(card: Card, division: Division, figures: Mapping[str, Any], choices: Sequence[Choice] = ()) -> bytes:
    """The content of `Card.path`.

    Args:
        figures: what was measured.
        choices: alternatives that are faster.
    """
    value = {
        "version": VERSION,
        "card": asdict(card),
        "division": asdict(division),
        "alternatives": [asdict(choice) for choice in choices],
        "figures": dict(figures),
    }
    return json.dumps(value, indent=1).encode() + b"\n"


# The values of each setting that kernels are compiled for; None: any number of programs.
ALLOWED: Mapping[str, tuple[int, ...] | None] = {
    "programs": None,
    "most_splits": (1, 2, 4, 8, 16),
    "vector_warps": (1, 2, 4, 8),
    "block_n": (32, 64),
    "tile_warps": (4, 8),
    "tile_stages": (1, 2),  # with more, some format's programs take more shared memory than some card has
    "chunk_blocks": (2, 4, 8, 16),
}
