"""The build backend: scikit-build-core, after fetching the libraries of the chat page.

If they cannot be fetched, the package is built without them: the page then shows answers as plain text, and the server logs a
warning.
"""

from __future__ import annotations

from typing import Any

import page_assets
from scikit_build_core import build as scikit
from scikit_build_core.build import *  # noqa: F403


def build_wheel(*arguments: Any, **settings: Any) -> str:
    page_assets.main()
    return scikit.build_wheel(*arguments, **settings)


def build_editable(*arguments: Any, **settings: Any) -> str:
    page_assets.main()
    return scikit.build_editable(*arguments, **settings)


def build_sdist(*arguments: Any, **settings: Any) -> str:
    page_assets.main()
    return scikit.build_sdist(*arguments, **settings)
