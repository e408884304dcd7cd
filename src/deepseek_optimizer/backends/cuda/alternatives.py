"""The registry of alternatives to kernels of this backend, and which of them are used. No Triton is imported here.

An alternative is used if it is installed, fits, and was measured to be faster on this card by `dso tune --kernels`, with the
version that is installed. Otherwise, and without a record, all kernels are this package's own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from ...errors import BackendError
from ...versions import versions
from .alternative import Alternative, Choice, Chosen
from .buckets import MOST_ROWS
from .scaled_mm import SCALED_MM

ALTERNATIVES: tuple[Alternative, ...] = (SCALED_MM,)


def why_not(alternative: Alternative, device: torch.device) -> str | None:
    """Why an alternative cannot run on a device, with what it requires; None: it can."""
    from packaging.version import InvalidVersion, Version  # of Transformers' requirements

    wanted = f"{alternative.name} needs {alternative.package} {alternative.oldest} or later"
    found = versions(alternative.package)[alternative.package]
    try:
        old = Version(found) < Version(alternative.oldest)
    except InvalidVersion:  # also "not installed"
        return f"{wanted}, which is {found}"
    if old:
        return f"{wanted}, but {found} is installed"
    if device.type != "cuda":
        return f"{alternative.name} needs a GPU, but the device is {device.type}"
    capability = torch.cuda.get_device_capability(device)
    if capability[0] not in alternative.majors:
        cards = " or ".join(f"{major}.x" for major in alternative.majors)
        name = torch.cuda.get_device_name(device)
        return f"{alternative.name} needs compute capability {cards}, but {name} has {capability[0]}.{capability[1]}"
    return alternative.why_not(device)


def available(device: torch.device, among: Iterable[Alternative] | None = None) -> list[Alternative]:
    """The alternatives that can run on a device, whether they are faster or not."""
    return [each for each in (ALTERNATIVES if among is None else among) if why_not(each, device) is None]


def chosen(
    choices: Sequence[Choice], device: torch.device, among: Sequence[Alternative] | None = None
) -> tuple[tuple[Chosen, ...], list[str]]:
    """The alternatives that are used on a device, and a text for each, also for those that were measured but are not used.

    Args:
        choices: what was measured to be faster.
        among: the registry; None: `ALTERNATIVES`.
    """
    known = {each.name: each for each in (ALTERNATIVES if among is None else among)}
    used, texts = [], []
    for choice in choices:
        alternative = known.get(choice.name)
        if alternative is None:
            texts.append(f"{choice.name} not used (unknown)")
            continue
        installed = versions(alternative.package)[alternative.package]
        if (reason := why_not(alternative, device)) is not None:
            texts.append(f"{choice.name} not used ({reason})")
        elif installed != choice.version:
            texts.append(f"{choice.name} not used (measured with {alternative.package} {choice.version}, not {installed})")
        else:
            used.append(with_rows(alternative, choice.rows))
            texts.append(f"{choice.name} for {alternative.replaces} from {used[-1].rows} rows")
    return tuple(used), texts


def with_rows(alternative: Alternative, rows: int) -> Chosen:
    """The alternative, from a number of rows, or more if it cannot be captured."""
    return Chosen(alternative, rows if alternative.captured else max(rows, MOST_ROWS + 1))


def named(name: str) -> Alternative:
    """The alternative of this name. Raises BackendError if there is none."""
    for each in ALTERNATIVES:
        if each.name == name:
            return each
    raise BackendError(f"there is no alternative {name!r}; choose among {', '.join(each.name for each in ALTERNATIVES)}")


def choice_of(alternative: Alternative, rows: int) -> Choice:
    """The record of an alternative that was measured to be faster, with the version that is installed."""
    return Choice(alternative.name, rows, versions(alternative.package)[alternative.package])
