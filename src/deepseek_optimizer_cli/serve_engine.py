"""The engine of a server, for `dso serve` and `dso batch`."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from deepseek_optimizer.server.loading import LoadedModel
    from deepseek_optimizer.server.served_model import ServedModel
    from deepseek_optimizer.server.settings import ServerSettings


def check_options(tool_format: str | None, generation_config: str, name: str | None) -> None:
    """Raises a ConfigError if one of these options of a command has no valid value; before a model is loaded."""
    from deepseek_optimizer.chat.sampling_defaults import SOURCES
    from deepseek_optimizer.chat.tools import FORMATS
    from deepseek_optimizer.errors import ConfigError

    if tool_format is not None and tool_format not in FORMATS:
        raise ConfigError(f"--tool-format must be one of {', '.join(FORMATS)}, got {tool_format!r}")
    if generation_config not in SOURCES:
        raise ConfigError(f"--generation-config must be one of {', '.join(SOURCES)}, got {generation_config!r}")
    if name is not None and not name.strip():
        raise ConfigError("--served-model-name must not be empty")


def load_engine(served: ServedModel, settings: ServerSettings) -> LoadedModel:
    """Loads a server's model, see `load_served_model`; warnings go to stderr."""
    from deepseek_optimizer.server.loading import load_served_model

    from .model import no_bars_in_pipes, warn

    no_bars_in_pipes()
    return load_served_model(served, settings, warn)
