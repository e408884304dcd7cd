"""Which options of `dso bench` belong to which of its modes: a model, long texts (`--long`), or a server (`--url`)."""

from __future__ import annotations

import typer

_MODEL_OPTIONS = {
    "precision", "kv_cache", "attention_window", "attention_budget", "context_extension", "context_length", "threads",
}  # fmt: skip
_OWN = {
    "--long": {"long", "lengths", "modes", "tasks", "samples"},
    "--url": {"url", "name", "api_key", "concurrency", "rate", "requests", "endpoint", "seed"},
}
_SHARED = {"--long": {"model", "html", "as_json", *_MODEL_OPTIONS}, "--url": {"prompt", "new", "as_json"}}  # also without it


def check_options(ctx: typer.Context, mode: str) -> None:
    """Checks that every option on the command line has an effect.

    Args:
        mode: "--long", "--url", or "" for neither.

    Raises:
        ValueError: an option needs another mode, or cannot be combined with this one.
    """
    for parameter in ctx.command.params:
        name = parameter.name or ""
        if getattr(ctx.get_parameter_source(name), "name", "") != "COMMANDLINE":
            continue
        owner = next((owner for owner, names in _OWN.items() if name in names), "")
        allowed = not mode or owner == mode or name in _SHARED[mode]
        option = parameter.opts[0] if parameter.param_type_name == "option" else name.upper()
        if not allowed:
            raise ValueError(f"{option} cannot be combined with {mode}")
        if owner and owner != mode:
            raise ValueError(f"{option} needs {owner}")
