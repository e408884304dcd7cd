"""Replicas of the server on Ray Serve. Needs the extra `ray`: pip install "deepseek-optimizer[ray]".

`deployment(model, num_replicas=2)` is an application for `ray.serve.run`, and `application` the same for a YAML file that
`serve deploy` reads.
"""

from __future__ import annotations

from typing import Any

_PUBLIC = ("application", "deployment")


def __getattr__(name: str) -> Any:
    """Imports the public functions when they are used, since Ray takes a second to import."""
    if name in _PUBLIC:
        from . import deploy

        return getattr(deploy, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
