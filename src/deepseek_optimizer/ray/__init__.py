"""Replicas of the server on Ray Serve, and training on Ray. Needs the extra `ray` for the one, `ray-train` for the other.

`deployment(model, num_replicas=2)` is an application for `ray.serve.run`, and `application` the same for a YAML file that
`serve deploy` reads. `trainer(config, num_workers=2).fit()` is `dso train` in the workers of a cluster.
"""

from __future__ import annotations

import importlib
from typing import Any

_PUBLIC = {"application": "deploy", "deployment": "deploy", "trainer": "training"}


def __getattr__(name: str) -> Any:
    """Imports the public functions when they are used, since Ray takes a second to import."""
    if name in _PUBLIC:
        return getattr(importlib.import_module(f".{_PUBLIC[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
