"""Reads uploaded files in a worker process (see `system.sandbox.worker`), since a PDF can be crafted to take forever."""

from __future__ import annotations

import base64
import importlib.util
import sys
from collections.abc import Callable
from typing import Any


def prepare(setup: dict[str, Any]) -> Callable[[dict[str, Any]], Any]:
    """Returns the worker's function; see `system.sandbox.worker.Worker`.

    Args:
        setup: {"package": this package's name, "max_characters": of the text of a file}.
    """
    # The package without its __init__, which would load torch.
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
        if len(file.text) > setup["max_characters"]:
            size, limit = len(file.text), setup["max_characters"]
            return {"problem": f"has {size:,} characters of text, but at most {limit:,} are allowed; send a part of it"}
        return {"text": file.text, "pages": file.pages, "headings": file.headings, "warnings": file.warnings}

    return run
