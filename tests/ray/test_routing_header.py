"""The session id in which keys and sessions travel to the router."""

from __future__ import annotations

import pytest

from deepseek_optimizer.ray.routing_header import Routing, read, write


@pytest.mark.parametrize("session", [None, "s", "a:b,c", "Bearer söme key%3A"])
@pytest.mark.parametrize("keys", [[], ["1f"], ["1f", "2e"]])
def test_what_is_written_is_read(session: str | None, keys: list[str]) -> None:
    text = write(session, keys)
    assert text.isascii() and read(text) == Routing(session, keys)


@pytest.mark.parametrize(("given", "session"), [("", None), ("abc", "abc"), ("a:b", "a:b")])
def test_session_ids_of_clients_are_sessions(given: str, session: str | None) -> None:
    assert read(given) == Routing(session, [])
