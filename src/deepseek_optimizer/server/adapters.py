"""LoRA adapters that requests load and unload: which paths they may name, and the errors that they get."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from ..errors import AdapterError, CheckpointError, NotEnoughMemoryError, RequestError, excerpt
from .http.caller import Caller
from .http.fair_queue import FairQueue
from .http.problems import ApiError, busy
from .settings import ServerSettings

logger = logging.getLogger("deepseek_optimizer.server")
_MAX_JOBS = 16


class AdapterLoading:
    """Loads and unloads adapters of one engine, one at a time.

    Args:
        engine: an `AsyncEngine`.
        settings: the server's.
    """

    def __init__(self, engine: Any, settings: ServerSettings) -> None:
        self._engine, self._directory = engine, settings.lora_dir
        self.queue = FairQueue("adapters", 1, max_running=1, max_per_client=_MAX_JOBS, max_jobs=4 * _MAX_JOBS)

    async def load(self, name: str, path: str, caller: Caller, replace: bool = False) -> None:
        """Loads an adapter.

        Args:
            name: its name.
            path: in the directory of the settings, absolute or relative to it.
            caller: who sent the request.
            replace: whether it takes the place of an adapter of this name.

        Raises:
            ApiError: 400, the name is taken, or the adapter cannot be used; 404, the path is not in the directory; 503, there
                is no memory for it.
        """

        def work() -> None:
            self._engine.load_adapter(name, self._inside(path), replace)

        try:
            await self.queue.run(caller.key, work, caller.deadline)
        except AdapterError as error:
            raise ApiError(400, f"lora_path: {excerpt(error.message)}", param="lora_path") from error
        except CheckpointError as error:
            message = str(error) if error.file is None else str(error).replace(error.file, os.path.basename(error.file))
            raise ApiError(400, f"lora_path: {message}", param="lora_path") from error
        except NotEnoughMemoryError as error:
            logger.error("adapter %s: %s", name, error)
            raise busy("the server has no memory for this adapter now", 30) from error
        logger.info("adapter %s was loaded", name)

    def unload(self, name: str) -> None:
        """Unloads an adapter.

        Raises:
            ApiError: 404, there is none of this name.
        """
        try:
            self._engine.unload_adapter(name)
        except RequestError as error:
            raise ApiError(404, str(error), param="lora_name", code="model_not_found") from error
        logger.info("adapter %s was unloaded", name)

    def _inside(self, path: str) -> Path:
        """The directory that a request names. It blocks."""
        refusal = ApiError(404, "lora_path: there is no such directory inside the server's --lora-dir", param="lora_path")
        if self._directory is None:
            raise refusal
        try:
            root = Path(self._directory).resolve()
            real = (root / path).resolve()
            inside = real.is_relative_to(root) and real != root and real.is_dir()
        except (OSError, RuntimeError, ValueError):  # RuntimeError: a loop of links
            raise refusal from None
        if not inside:
            raise refusal
        return real
