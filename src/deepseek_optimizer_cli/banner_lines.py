"""Lines that `dso serve` prints when it listens, for one model or several."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from deepseek_optimizer.server.settings import ServerSettings


def address_line(settings: ServerSettings, host: str, port: int) -> str:
    """Where the server listens, and whether it requires a key."""
    shown = f"[{host}]" if ":" in host else host
    scheme = "http" if settings.ssl_certfile is None else "https"
    keys = f"{len(settings.keys)} API key(s)" if settings.keys else "no API key required"
    return f"address   {scheme}://{shown}:{port}{settings.root_path}/ (API under /v1), {keys}"


def access_warning(settings: ServerSettings) -> list[str]:
    """A warning if others can use the server without a key."""
    from deepseek_optimizer.server.http.hosts import is_loopback

    if settings.keys or is_loopback(settings.host):
        return []
    return ["warning   anyone who can reach this address can use the model; require a key with --api-key-file"]


def ocr_lines(model: str | None) -> list[str]:
    """The model that reads scanned pages, if there is one."""
    return [] if model is None else [f"ocr       {model}, for scanned pages of uploaded documents"]


def draft_lines(draft_model: str | None, precision: str | None) -> list[str]:
    """The model that drafts tokens (`--draft-model`, `--draft-precision`), if there is one."""
    if draft_model is None and precision is None:
        return []
    return [f"drafts    by {draft_model or 'the model itself'}" + (f" in {precision}" if precision else "")]
