"""Records calls of a function of the package."""

from __future__ import annotations

from typing import Any

import pytest


def spy(monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> list[tuple[Any, Any]]:
    """Records ((args, kwargs), result) of every later call of a module's function, in order."""
    calls: list[tuple[Any, Any]] = []
    called = getattr(module, name)

    def watched(*args: Any, **kwargs: Any) -> Any:
        calls.append(((args, kwargs), called(*args, **kwargs)))
        return calls[-1][1]

    monkeypatch.setattr(module, name, watched)
    return calls
