"""Renders chat templates in a worker (see `engine.worker`), by Transformers' own sandbox and rules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def prepare(setup: dict[str, Any]) -> Callable[[dict[str, Any]], Any]:
    """See `engine.worker.Worker`.

    Args:
        setup: {"most": characters that a rendered text may have}.
    """
    import transformers.utils.chat_template_utils as utils

    def render(template: str, payload: dict[str, Any]) -> str:
        try:
            rendered: Any = utils.render_jinja_template(  # its annotation says str: it is (texts, places)
                conversations=[payload["messages"]],
                tools=payload["tools"],
                chat_template=template,
                continue_final_message=payload["continue_final"],
                add_generation_prompt=payload["add_generation_prompt"],
                **payload["variables"],
            )
        except MemoryError:
            raise
        except Exception as error:  # a template is a program, and may fail in every way
            raise ValueError(f"{type(error).__name__}: {error}") from None
        if len(rendered[0][0]) > setup["most"]:
            raise ValueError("it makes a text that is too long")
        return str(rendered[0][0])

    def run(payload: dict[str, Any]) -> Any:
        if payload.get("inspect"):
            return _inspect(payload["template"], payload["variables"], render)
        return [render(payload["template"], {**payload, **version}) for version in payload["versions"]]

    return run


def _inspect(template: str, variables: dict[str, Any], render: Callable[[str, dict[str, Any]], str]) -> dict[str, Any]:
    """Which variables a template reads, and whether it wants the arguments of calls as text and not as objects."""
    import jinja2.meta
    from transformers.utils import chat_template_utils

    try:
        environment = chat_template_utils._compile_jinja_template(template).environment
        names = jinja2.meta.find_undeclared_variables(environment.parse(template))
    except jinja2.TemplateError as error:
        raise ValueError(f"{type(error).__name__}: {error}") from None

    def shows_json(arguments: Any) -> bool:
        try:
            return '"dso"' in render(template, _conversation(arguments, variables))
        except ValueError:
            return False

    as_text = not shows_json({"dso": "probe"}) and shows_json('{"dso": "probe"}')
    return {"variables": sorted(names - set(environment.globals)), "arguments_as_text": as_text}


def _conversation(arguments: Any, variables: dict[str, Any]) -> dict[str, Any]:
    """With one call in it."""
    function = {"name": "probe", "description": "", "parameters": {"type": "object", "properties": {}}}
    call = {"id": "call_000000", "type": "function", "function": {"name": "probe", "arguments": arguments}}
    return {
        "messages": [
            {"role": "user", "content": "probe"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "probe", "name": "probe", "tool_call_id": "call_000000"},
        ],
        "tools": [{"type": "function", "function": function}],
        "continue_final": False,
        "add_generation_prompt": False,
        "variables": variables,
    }
