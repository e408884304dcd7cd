"""At which quality a request is computed."""

from __future__ import annotations

from pydantic import Field

from ...backends.qualities import Quality
from .base import Body


class ByQuality(Body):
    """The precision of the weights, of models that have several."""

    quality: Quality | None = Field(
        None,
        description="Precision of the weights, if the model was loaded with precision int8_nested: exact reads all bits, fast "
        "the upper 4 of 8, balanced these in feed-forward networks while it generates. Default: exact. The answer says which "
        "was used.",
    )
    min_quality: Quality | None = Field(
        None, description="The lowest quality that the request may be computed at while others wait. Default: `quality`."
    )
