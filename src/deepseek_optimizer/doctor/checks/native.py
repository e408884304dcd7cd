"""Whether the native library is there, loads, and belongs to this package."""

from __future__ import annotations

from collections.abc import Iterator

from ..case import Case
from ..finding import Finding

NAME = "native build"


def check(case: Case) -> Iterator[Finding]:
    """Missing: the slow backend serves. There, but it doesn't load or is another version's: an installation to repair."""
    from ...backends.cpu import native

    path = native.library_path()
    reason = native.unavailable_reason()
    facts = {"library": str(path), "exists": path.exists()}
    if reason is None:
        yield Finding(NAME, "ok", f"the native library loads, ABI {native.ABI_VERSION}", facts=facts)
    elif path.exists():
        yield Finding(NAME, "error", "the native library is there but cannot be used", reason, "reinstall the package", facts)
    else:
        yield Finding(
            NAME, "warning", "there is no native library: the reference backend serves, in plain torch, much slower", reason,
            "on x86-64 Linux install a C++20 compiler (g++ 12 or newer) and reinstall; DSO_REQUIRE_NATIVE=1 pip install ... "
            "shows why the build fails", facts,
        )  # fmt: skip
