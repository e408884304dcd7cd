"""The files beside a checkpoint from which Transformers creates the processor of its pictures."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Final

_FILES: Final = (
    "processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json", "chat_template.json",
    "chat_template.jinja",
)  # fmt: skip


def copy_processor_files(source: Path, target: Path) -> None:
    """Copies these files, as far as there are any.

    Args:
        source: directory of a checkpoint.
        target: directory of its converted copy. What its tokenizer has written stays.
    """
    for name in _FILES:
        if (source / name).is_file() and not (target / name).exists():
            shutil.copyfile(source / name, target / name)
