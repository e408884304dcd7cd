"""Processors of multimodal checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_VIDEOS = "video_processor"


def load_processor(folder: Path) -> Any:
    """The processor of a checkpoint. If torchvision is not installed, a processor that needs it only for videos is loaded
    without that part, and refuses videos.

    Raises:
        ImportError: a package is not installed, whose name is in the message.
        Exception: of any other type for damaged or missing files.
    """
    from transformers import AutoProcessor

    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        return AutoProcessor.from_pretrained(str(folder), **options)
    except ImportError as error:
        kind = _without_videos(folder) if "torchvision" in str(error).lower() else None
        if kind is None:
            raise
        return kind.from_pretrained(str(folder), **options)


def _without_videos(folder: Path) -> Any:
    """The class of a checkpoint's processor without the part for videos; None: it has no such part, or is unknown."""
    from transformers import AutoConfig
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    try:
        config = AutoConfig.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError):  # the error about the missing package is then the one to report
        return None
    kind: Any = PROCESSOR_MAPPING.get(type(config), None)
    if kind is None or _VIDEOS not in kind.get_attributes():
        return None

    def get_attributes(cls: Any) -> list[str]:
        return [name for name in kind.get_attributes() if name != _VIDEOS]

    def _process_videos(self: Any, *_: Any, **__: Any) -> Any:
        raise ImportError(f"{kind.__name__} needs torchvision for videos")

    # The attribute exists, since videos are ignored silently otherwise.
    methods = {_VIDEOS: None, "get_attributes": classmethod(get_attributes), "_process_videos": _process_videos}
    return type(kind.__name__, (kind,), methods)
