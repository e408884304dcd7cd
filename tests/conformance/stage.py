"""Arranges Transformers' tests for pytest, with replacements for the modules that the source distribution lacks.

`tests/generation/test_utils.py` is `generation.py` of this folder, unless a checkout of Transformers has its own; exports are
not tested. The families' tests are `families.py`: a small config for each, tested by Transformers' mixins.
"""

from __future__ import annotations

import shutil
from pathlib import Path

HERE = Path(__file__).parent
_NO_EXPORTS = "class ExportTesterMixin:\n    pass\n\n\nclass ExportGenerateTesterMixin(ExportTesterMixin):\n    pass\n"
_ROOT = "[pytest]\n"  # no configuration of parent folders


def stage(tests: Path, target: Path, checkout: Path | None = None) -> Path:
    """Creates the folder to run pytest in.

    Args:
        tests: `tests` of the source distribution.
        target: a folder that does not exist yet.
        checkout: `tests` of a checkout of Transformers, whose generation tests are then used.

    Returns: the file to run.
    """
    root = target / "tests"
    shutil.copytree(tests, root)
    for folder in (root, root / "generation", root / "exporters"):
        folder.mkdir(exist_ok=True)
        (folder / "__init__.py").touch()
    (root / "exporters" / "test_export.py").write_text(_NO_EXPORTS)
    own = HERE / "generation.py" if checkout is None else checkout / "generation" / "test_utils.py"
    shutil.copy(own, root / "generation" / "test_utils.py")
    shutil.copy(HERE / "families.py", root / "test_families.py")
    (target / "pytest.ini").write_text(_ROOT)
    return root / "test_families.py"
