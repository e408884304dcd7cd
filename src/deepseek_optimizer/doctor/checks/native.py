"""Whether the native library exists, loads, and belongs to this package version."""

from __future__ import annotations

from collections.abc import Iterator

from ..case import Case
from ..finding import Finding

NAME = "native build"


def check(case: Case) -> Iterator[Finding]:
    """Missing: a warning, since the slow reference backend is used. Present but unusable: an error in the installation."""
    from ...backends.cpu import native

    path = native.library_path()
    reason = native.unavailable_reason()
    facts = {"library": str(path), "exists": path.exists()}
    if reason is None:
        yield Finding(NAME, "ok", f"the native library loads, ABI {native.ABI_VERSION}", facts=facts)
    elif path.exists():
        yield Finding(NAME, "error", "the native library exists but cannot be used", reason, "reinstall the package", facts)
    else:
        yield Finding(
            NAME, "warning", "no native library: the reference backend runs instead, in plain torch, which is much slower",
            reason,
            "on Linux install a C++20 compiler (g++ 12 or newer) and reinstall; DSO_REQUIRE_NATIVE=1 pip install ... "
            "shows why the build fails", facts,
        )  # fmt: skip
