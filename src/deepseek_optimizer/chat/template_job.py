"""Renders chat templates in a worker (see `system.sandbox.worker`), with Transformers' own sandbox and rules."""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Callable
from typing import Any


def prepare(setup: dict[str, Any]) -> Callable[[dict[str, Any]], Any]:
    """See `system.sandbox.worker.Worker`.

    Args:
        setup: {"max_characters": maximum length of a rendered text}.
    """
    import jinja2
    import transformers.utils.chat_template_utils as utils

    def rendered_by_transformers(template: str, payload: dict[str, Any], variables: dict[str, Any]) -> Any:
        return utils.render_jinja_template(  # annotated as str, but it is (texts, positions)
            conversations=[payload["messages"]],
            tools=payload["tools"],
            chat_template=template,
            return_assistant_tokens_mask=payload.get("marked", False),
            continue_final_message=payload["continue_final"],
            add_generation_prompt=payload["add_generation_prompt"],
            **variables,
        )

    def render_with_places(template: str, payload: dict[str, Any]) -> tuple[str, list[tuple[int, int]]]:
        """The text, and the positions in it that `{% generation %}` marks."""
        try:
            try:
                rendered = rendered_by_transformers(template, payload, payload["variables"])
            except jinja2.UndefinedError as error:
                more = _of_firefunction(payload["tools"])
                if not any(f"'{name}' is undefined" in str(error) for name in more):
                    raise
                rendered = rendered_by_transformers(template, payload, {**more, **payload["variables"]})
        except MemoryError:
            raise
        except Exception as error:  # a template is a program and can raise anything
            raise ValueError(f"{type(error).__name__}: {error}") from None
        if len(rendered[0][0]) > setup["max_characters"]:
            raise ValueError("the rendered text is too long")
        try:
            rendered[0][0].encode()
        except UnicodeEncodeError:
            raise ValueError("the rendered text contains half of a surrogate pair") from None
        return str(rendered[0][0]), rendered[1][0] if payload.get("marked") else []

    def render(template: str, payload: dict[str, Any]) -> str:
        return render_with_places(template, payload)[0]

    def run(payload: dict[str, Any]) -> Any:
        if payload.get("inspect"):
            return _inspect(payload["template"], payload["variables"], render)
        if payload.get("marked"):
            return render_with_places(payload["template"], payload)
        if "answers" in payload:
            return _answers(payload, render)
        return [render(payload["template"], {**payload, **version}) for version in payload["versions"]]

    return run


def _of_firefunction(tools: Any) -> dict[str, str]:
    """Variables that Firefunction's template requires, and on which Transformers fails; as llama-server sets them."""
    return {"datetime": datetime.date.today().strftime("%b %d %Y"), "functions": json.dumps(tools, indent=2) if tools else ""}


def _inspect(template: str, variables: dict[str, Any], render: Callable[[str, dict[str, Any]], str]) -> dict[str, Any]:
    """Facts about a template: the variables that it reads, whether it renders calls, whether it expects their arguments as text
    rather than objects, whether it renders system messages, and whether it expects content as lists of parts."""
    import jinja2.meta
    from transformers.utils import chat_template_utils

    try:
        environment = chat_template_utils._compile_jinja_template(template).environment
        names = jinja2.meta.find_undeclared_variables(environment.parse(template))
    except (jinja2.TemplateError, SyntaxError, RecursionError) as error:  # Python compiles what Jinja makes of a template
        raise ValueError(f"{type(error).__name__}: {error}") from None

    def shows_json(arguments: Any) -> bool:
        try:
            return '"dso"' in render(template, _conversation(arguments, variables))
        except ValueError:
            return False

    def shows_system() -> bool:
        messages = [{"role": "system", "content": "dso-probe"}, {"role": "user", "content": "probe"}]
        try:
            return "dso-probe" in render(template, {**_conversation({}, variables), "messages": messages, "tools": None})
        except ValueError:
            return False

    def shows_user(content: Any) -> bool:
        messages = [{"role": "user", "content": content}]
        try:
            return "dso-probe" in render(template, {**_conversation({}, variables), "messages": messages, "tools": None})
        except ValueError:
            return False

    as_object = shows_json({"dso": "probe"})
    as_text = not as_object and shows_json('{"dso": "probe"}')
    return {
        "variables": sorted(names - set(environment.globals)),
        "calls": as_object or as_text,
        "arguments_as_text": as_text,
        "system": shows_system(),
        "lists": not shows_user("dso-probe") and shows_user([{"type": "text", "text": "dso-probe"}]),
    }


def _answers(payload: dict[str, Any], render: Callable[[str, dict[str, Any]], str]) -> Any:
    """(text of the whole chat; for each assistant message: number of characters that the text has in common with the prompt
    before it, whether that is the whole prompt, length of the text up to the message, and including it; -1: not a prefix)."""
    template, messages = payload["template"], payload["messages"]
    text = render(template, payload)

    def length(count: int) -> int:
        part = text if count == len(messages) else render(template, {**payload, "messages": messages[:count]})
        return len(part) if text.startswith(part) else -1

    places = []
    for i in payload["answers"]:
        prompt = render(template, {**payload, "messages": messages[:i], "add_generation_prompt": True})
        whole = text.startswith(prompt)
        common = len(prompt) if whole else len(os.path.commonprefix((prompt, text)))
        places.append([common, whole, common if whole else length(i), length(i + 1)])
    return text, places


def _conversation(arguments: Any, variables: dict[str, Any]) -> dict[str, Any]:
    """A conversation with one tool call."""
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
