"""Chat templates that a user names: a file, or a template of this package, for checkpoints without one or with a wrong one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..checkpoint.chat_template import FOLDER as _PUBLISHED
from ..errors import ConfigError, RequestError
from .template import ChatTemplate

_FOLDERS = (Path(__file__).with_name("templates"), _PUBLISHED)
_MAX_BYTES = 1 << 20


def template_names() -> list[str]:
    """Names of the templates of this package."""
    return sorted(_files())


def _files() -> dict[str, Path]:
    return {path.stem: path for folder in _FOLDERS for path in folder.glob("*.jinja")}


def read_template(value: str) -> str:
    """The Jinja source of a chat template.

    Args:
        value: name of a template of this package, or path of a file.

    Raises:
        ConfigError: there is no such template or file, or the file is too large or not UTF-8.
    """
    files = _files()
    path = files[value] if value in files else Path(value).expanduser()
    if not path.is_file():
        raise ConfigError(f"--chat-template: there is no file {value!r}; give a file, or one of {', '.join(template_names())}")
    with path.open("rb") as file:
        data = file.read(_MAX_BYTES + 1)
    if len(data) > _MAX_BYTES:
        raise ConfigError(f"--chat-template: {value} is larger than {_MAX_BYTES:,} bytes")
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise ConfigError(f"--chat-template: {value} is not UTF-8 text") from None


def use_template(tokenizer: Any, source: str) -> None:
    """Sets a tokenizer's chat template, after rendering a message with it.

    Args:
        tokenizer: of Transformers.
        source: Jinja source.

    Raises:
        ConfigError: the template is invalid, or does not contain the message.
    """
    tokenizer.chat_template = source
    template = ChatTemplate(tokenizer)
    try:
        prompt = template.render([{"role": "user", "content": "Hello"}])
    except RequestError as error:
        raise ConfigError(f"--chat-template: {str(error).partition(': ')[2]}") from None
    finally:
        template.close()
    if "Hello" not in prompt.text:
        raise ConfigError("--chat-template: the template does not render messages; it must print their content")
