"""Versions of what is installed, as reports and the command line show them."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def versions(*names: str) -> dict[str, str]:
    """Version of each distribution; "not installed" where there is none (a source tree on PYTHONPATH)."""
    found = {}
    for name in names or ("deepseek-optimizer", "torch", "transformers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
