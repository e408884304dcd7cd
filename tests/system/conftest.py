"""Trees of system files that a test writes."""

from __future__ import annotations

import pytest


@pytest.fixture
def tree(tmp_path):
    """tree({"/proc/meminfo": text, ...}) -> a root directory with exactly these files."""

    def make(files):
        for path, text in files.items():
            file = tmp_path / path.lstrip("/")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        return tmp_path

    return make
