"""The user's cache directory."""

from __future__ import annotations

import os
from pathlib import Path


def user_cache() -> Path:
    """This package's directory in XDG_CACHE_HOME or ~/.cache. It need not exist."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "deepseek-optimizer"
