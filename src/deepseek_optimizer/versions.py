"""Versions of installed packages, for reports and the command line."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def versions(*names: str) -> dict[str, str]:
    """Returns the version of each distribution, or "not installed" (as for a source tree on PYTHONPATH).

    Args:
        names: names of distributions; without any, this package, torch and Transformers.
    """
    installed = {}
    for name in names or ("deepseek-optimizer", "torch", "transformers"):
        try:
            installed[name] = version(name)
        except PackageNotFoundError:
            installed[name] = "not installed"
    return installed
