"""Reads files that clients sent, in a worker (see `system.sandbox.worker`): a PDF can be made to take for ever."""

from __future__ import annotations

import base64
import importlib.util
import sys
from collections.abc import Callable
from typing import Any


def prepare(setup: dict[str, Any]) -> Callable[[dict[str, Any]], Any]:
    """See `system.sandbox.worker.Worker`.

    Args:
        setup: {"package": its name, "most": characters of text that a file may come to}.
    """
    # The package without what its __init__ does, which would load torch.
    spec = importlib.util.find_spec(setup["package"])
    assert spec is not None
    sys.modules[setup["package"]] = importlib.util.module_from_spec(spec)
    errors = importlib.import_module(f"{setup['package']}.errors")
    read = importlib.import_module(f"{setup['package']}.longdoc.read").read_upload

    def run(payload: dict[str, Any]) -> dict[str, Any]:
        try:
            file = read(payload["name"], base64.b64decode(payload["data"]))
        except errors.DocumentError as error:
            return {"problem": error.message}
        except errors.MissingPackageError as error:
            return {"missing": str(error)}
        if len(file.text) > setup["most"]:
            return {
                "problem": f"has {len(file.text):,} characters of text, and {setup['most']:,} are the most; send a part of it"
            }
        return {"text": file.text, "pages": file.pages, "headings": file.headings, "warnings": file.warnings}

    return run
