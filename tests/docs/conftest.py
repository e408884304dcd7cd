"""The repository's root and pages; tests of the documentation are skipped where the package was installed without it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
if not (ROOT / "mkdocs.yml").exists():
    pytest.skip("the documentation is not part of the package", allow_module_level=True)
sys.path.append(str(ROOT))  # for docs.generate
