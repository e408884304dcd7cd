"""Methods that an optimized model does not support."""

from __future__ import annotations

from typing import Any

from ...errors import UnsupportedRequestError

DIVIDED = "its weights are divided among processes; load it without parallel"
RESIZE = "resize the embeddings of the float model and then optimize it"


class Refuse:
    """Replaces a method that a packed model does not support: it raises UnsupportedRequestError with `remedy`."""

    def __init__(self, remedy: str) -> None:
        self.remedy = remedy

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise UnsupportedRequestError(f"a packed model cannot do this; {self.remedy}")
