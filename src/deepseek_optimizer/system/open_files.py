"""The limit of open files of this process."""

from __future__ import annotations

try:
    import resource
except ImportError:  # Windows has no such limit
    resource = None  # type: ignore[assignment]

_MOST = 65_536


def raise_file_limit() -> None:
    """Raises the limit of open files, and so of connections, to the hard limit, if there is one."""
    if resource is None:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, _MOST) if hard != resource.RLIM_INFINITY else _MOST, hard))
