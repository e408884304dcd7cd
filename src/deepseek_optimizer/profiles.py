"""Profiles: settings that `dso tune` found for a model on a machine, kept in the user's cache directory.

A profile is for the machine and the model that it was found for, with the same options that change its steps, such as the
format of its weights. On another machine, with other files of the model or with other options it is not used, and a message
says so. It is never used unless asked for.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .checkpoint.atomic import atomic_file
from .errors import DataError
from .system.memory import free_memory
from .system.processor import cpu_name, usable_cpus
from .system.user_cache import user_cache

VERSION = 1
AUTO = "auto"
FIELDS = (
    "threads",
    "prefill_chunk",
    "batch_size_range",
    "kv_cache",
    "precision",
)  # of `DeepSeekConfig`, that a profile may set
# Other fields of `DeepSeekConfig` on which the best settings depend, and which a profile's user must set as they were set.
OPTIONS = (
    "precision", "attention_optimization", "attention_window", "attention_budget", "context_extension", "context_length",
    "parallel",
)  # fmt: skip
_GIGABYTE = 1 << 30


@dataclass(frozen=True)
class Profile:
    """Settings of a model on a machine.

    Attributes:
        machine, model: what it was found for, see `machine_identity` and `model_identity`.
        goal, trace: what it was found by.
        fields: of `DeepSeekConfig`; those that are not in it keep their defaults.
        drafts: maximum number of drafts of a round; 0: no drafts; None: the default.
        quality: of requests that name none, see `EngineOptions`; None: the default.
        figures: what was measured with the default settings and with these.
        made: date, ISO 8601.
        path: the file that it was read from.
        options: those of `OPTIONS` that were set when it was found.
    """

    machine: Mapping[str, Any]
    model: Mapping[str, Any]
    goal: str
    trace: str
    fields: Mapping[str, Any]
    drafts: int | None = None
    figures: Mapping[str, Any] = field(default_factory=dict)
    made: str = ""
    path: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    quality: str | None = None

    def __str__(self) -> str:
        values = [f"{name}={value}" for name, value in self.fields.items()]
        values += [
            f"{name}={value}" for name, value in (("drafts", self.drafts), ("quality", self.quality)) if value is not None
        ]
        return f"{', '.join(values) or 'the defaults'} (goal {self.goal}, trace {self.trace}, {self.path or 'not saved'})"


def machine_identity() -> dict[str, Any]:
    """What a profile's machine must agree in."""
    total = min((limit.total for limit in free_memory().limits if limit.kind != "reserved"), default=0)
    return {"cpu": cpu_name(), "cpus": usable_cpus(), "memory_gb": round(total / _GIGABYTE)}


def model_identity(path: Path) -> dict[str, Any]:
    """What a profile's model must agree in: its configuration, and the names and sizes of its other files.

    Args:
        path: a directory or a file, see `resolve`.
    """
    files = sorted(one for one in path.iterdir() if one.is_file()) if path.is_dir() else [path]
    digest = hashlib.sha256()
    for one in files:
        digest.update(f"{one.name} {one.stat().st_size}\n".encode())
        if one.name == "config.json":
            digest.update(one.read_bytes())
    return {"name": path.name if path.is_dir() else path.stem, "digest": digest.hexdigest()}


def directory() -> Path:
    """Where profiles are, in XDG_CACHE_HOME or ~/.cache."""
    return user_cache() / "profiles"


def place(machine: Mapping[str, Any], model: Mapping[str, Any], options: Mapping[str, Any]) -> Path:
    """The file of the profile of a model with some options on a machine, where `AUTO` looks for it."""
    known = json.dumps([dict(machine), model["digest"], dict(options)], sort_keys=True)
    key = hashlib.sha256(known.encode()).hexdigest()[:24]
    return directory() / f"{key}.json"


def save(profile: Profile, path: Path | None = None) -> Path:
    """Writes a profile, whole or not at all, and replaces the one that was there.

    Args:
        profile: what to write.
        path: None: where `AUTO` finds it.

    Raises:
        OSError: it cannot be written.
    """
    path = path or place(profile.machine, profile.model, profile.options)
    path.parent.mkdir(parents=True, exist_ok=True)
    values = {name: value for name, value in asdict(profile).items() if name != "path"}
    with atomic_file(path) as file:
        file.write(json.dumps({"version": VERSION, **values}, indent=1).encode() + b"\n")
    return path


def read(path: Path) -> Profile:
    """A profile from its file.

    Raises:
        DataError: the file is not a profile, or is one of another version; it names the field.
        OSError: it cannot be read.
    """
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise DataError(f"not a profile of dso tune ({error})", file=path) from None
    if not isinstance(value, dict) or "version" not in value:
        raise DataError("not a profile of dso tune; run it to get one", file=path)
    if value.pop("version") != VERSION:
        raise DataError(f"a profile of another version than {VERSION}; run dso tune again", file=path, field="version")
    for name, kind in (("machine", dict), ("model", dict), ("fields", dict), ("figures", dict), ("options", dict),
                       ("goal", str), ("trace", str)):  # fmt: skip
        if not isinstance(value.get(name), kind):
            raise DataError("missing or of another type; run dso tune again", file=path, field=name)
    if unknown := sorted(value["fields"].keys() - set(FIELDS)):
        raise DataError(f"a profile has no setting {unknown[0]!r}; it may have {', '.join(FIELDS)}", file=path, field="fields")
    drafts = value.get("drafts")
    if drafts is not None and (type(drafts) is not int or drafts < 0):
        raise DataError("must be a number of at least 0, or null", file=path, field="drafts")
    quality = value.get("quality")
    if quality is not None and not isinstance(quality, str):
        raise DataError("must be a name, or null", file=path, field="quality")
    fields = {name: tuple(given) if isinstance(given, list) else given for name, given in value["fields"].items()}
    known = ("machine", "model", "goal", "trace", "figures", "options")
    return Profile(
        **{name: value[name] for name in known}, fields=fields, drafts=drafts, quality=quality,
        made=str(value.get("made", "")), path=str(path),
    )  # fmt: skip


def find(model: Path, which: str | os.PathLike[str], options: Mapping[str, Any]) -> tuple[Profile | None, str]:
    """The profile to use for a model, and a message for the user: what is used, or why none is.

    Args:
        model: the model's files, see `resolve`.
        which: `AUTO`, or the path of a profile.
        options: those of `OPTIONS` that differ from the defaults, as JSON types.

    Raises:
        DataError, OSError: the file that was named is not a profile, or cannot be read. One that `AUTO` finds is then not used.
    """
    machine, identity = machine_identity(), model_identity(model)
    automatic = os.fspath(which) == AUTO
    path = place(machine, identity, options) if automatic else Path(which)
    try:
        profile = read(path)
    except FileNotFoundError:
        if not automatic:
            raise
        remedy = "`dso tune` searches settings of undivided models only" if "parallel" in options else "`dso tune` makes one"
        none = f"there is no profile of {identity['name']}{_shown(options)} on this machine, so the defaults are used"
        return None, f"{none}; {remedy}"
    except (DataError, OSError) as error:
        if not automatic:
            raise
        return None, f"the profile is not used: {error}"
    if profile.machine != machine:
        different = ", ".join(f"{name}: {profile.machine.get(name)}, here {machine[name]}" for name in machine
                              if profile.machine.get(name) != machine[name])  # fmt: skip
        return None, f"the profile {path} is of another machine ({different}) and is not used; run dso tune here"
    if profile.model.get("digest") != identity["digest"]:
        return None, f"the profile {path} is of another model ({profile.model.get('name')}) and is not used"
    if profile.options != options:
        was = f"was found with {'other' if profile.options else 'the default'} options{_shown(profile.options)}"
        remedy = "give the same options" + ("" if "parallel" in options else ", or run dso tune with these")
        return None, f"the profile {path} {was} and is not used; {remedy}"
    return profile, f"profile: {profile}"


def _shown(options: Mapping[str, Any]) -> str:
    """Options for a message; "": there are none."""
    return f" ({', '.join(f'{name}={value}' for name, value in options.items())})" if options else ""
