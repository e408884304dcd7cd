"""Pictures of chats: files and data URLs become RGB images."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigError, MissingPackageError, RequestError, excerpt
from ..system.sandbox.pool import WorkerPool
from ..system.sandbox.worker import JobError, WorkerError
from . import picture_job

MAX_BYTES, MAX_PIXELS = 20 << 20, 1 << 25  # of a picture
MAX_TOTAL_PIXELS = 4 * MAX_PIXELS  # of the pictures of a request, which are in memory together
_JOB = Path(__file__).with_name("picture_job.py")
_DATA = re.compile(r"data:[\w.+/-]*(?:;[\w=.+-]+)*;base64,", re.ASCII)
_SECONDS, _MEMORY = 10.0, 1 << 30  # CPU time and memory for decoding a picture


def load_processor(path: str) -> Any:
    """The processor of a multimodal checkpoint.

    Args:
        path: as for `load_model`.

    Raises:
        MissingPackageError: Pillow, or another package that this family's processor needs, is not installed.
        ConfigError: the checkpoint has none, or it cannot be loaded.
    """
    from ..integration.load.resolve import resolve
    from ..integration.multimodal import processor as processors

    try:
        processor = processors.load_processor(resolve(path))
    except ImportError as error:
        raise MissingPackageError(f"the processor of {path}", _missing(error), "vision") from error
    except Exception as error:  # damaged or missing files may cause any error
        raise ConfigError(f"{path}: the processor for pictures cannot be loaded: {' '.join(str(error).split())}") from error
    if not hasattr(processor, "image_processor"):
        raise ConfigError(f"{path}: has no processor for pictures (preprocessor_config.json)")
    return processor


def _missing(error: ImportError) -> str:
    """The package that a processor lacks."""
    return "torchvision" if "torchvision" in str(error).lower() else "Pillow"


def picture_of_file(path: Path) -> Any:
    """A PIL image in RGB.

    Raises:
        RequestError: the file cannot be read, or is no picture.
        MissingPackageError: Pillow is not installed.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise RequestError(str(path), f"is larger than {MAX_BYTES >> 20} MiB")
        data = path.read_bytes()
    except OSError as error:
        raise RequestError(str(path), f"cannot be read: {error.strerror}") from None
    try:
        return rgb_image(*picture_job.decode(data, MAX_PIXELS))
    except ImportError as error:
        raise MissingPackageError("a picture", "Pillow", "vision") from error
    except ValueError as error:
        raise RequestError(str(path), str(error)) from None


def data_of(url: str, field: str) -> bytes:
    """The bytes of a data URL.

    Args:
        url: data:...;base64,...
        field: for errors.

    Raises:
        RequestError: it is another URL, no base64, or too long.
    """
    head = _DATA.match(url)
    if head is None:
        raise RequestError(field, f"must be a data: URL in base64; got {excerpt(url)!r}")
    if len(url) - head.end() > MAX_BYTES * 4 // 3 + 4:
        raise RequestError(field, f"is larger than {MAX_BYTES >> 20} MiB")
    try:
        return base64.b64decode(url[head.end() :], validate=True)
    except binascii.Error as error:
        raise RequestError(field, f"is not valid base64: {error}") from None


class PictureReader:
    """Decodes pictures from clients in worker processes, which are started when they are needed.

    Args:
        workers: maximum number of processes.
        max_pixels: maximum number of pixels of a picture.
    """

    def __init__(self, workers: int, max_pixels: int = MAX_PIXELS) -> None:
        self.workers = WorkerPool(_JOB, {"max_pixels": max_pixels}, workers, seconds=_SECONDS, memory=_MEMORY)

    def read(self, pictures: Sequence[tuple[str, bytes]]) -> list[Any]:
        """PIL images in RGB.

        Args:
            pictures: of each the field of the request, for errors, and the content.

        Raises:
            RequestError: one is no picture, or they have more than MAX_TOTAL_PIXELS in total.
            WorkerLostError, EngineBusyError: see `WorkerPool.call`.
        """
        images: list[Any] = []
        for field, data in pictures:
            try:
                result = self.workers.call({"data": base64.b64encode(data).decode()})
            except JobError as error:
                raise RequestError(field, str(error)) from None
            except WorkerError as error:
                raise RequestError(field, f"cannot be decoded: {error}") from None
            width, height = result["size"]
            if width * height + sum(image.width * image.height for image in images) > MAX_TOTAL_PIXELS:
                raise RequestError(field, f"exceeds {MAX_TOTAL_PIXELS:,} pixels together with those before it; scale them down")
            images.append(rgb_image(width, height, base64.b64decode(result["pixels"])))
        return images

    def close(self) -> None:
        """Ends the processes."""
        self.workers.close()


def rgb_image(width: int, height: int, pixels: bytes) -> Any:
    """A PIL image of RGB bytes."""
    from PIL import Image

    if len(pixels) != 3 * width * height:
        raise RequestError("pictures", "were not decoded completely")
    return Image.frombytes("RGB", (width, height), pixels)
