"""Methods that an optimised model cannot offer."""

from __future__ import annotations

from typing import Any

from ...errors import UnsupportedRequestError

RESIZE = "resize the embeddings of the float model, then optimise it"


class Refuse:
    """A method that a packed model cannot offer."""

    def __init__(self, remedy: str) -> None:
        self.remedy = remedy

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise UnsupportedRequestError(f"a packed model cannot do this; {self.remedy}")
