"""Adds the repository's root to the path, for `docs.generate`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2]))
