"""The session id in which keys and sessions travel to the router."""

from __future__ import annotations

import pytest

from deepseek_optimizer.ray.routing_header import Routing, read, session_of, write


@pytest.mark.parametrize("session", [None, session_of("mine")])
@pytest.mark.parametrize("keys", [[], ["1f"], ["1f", "2e"]])
@pytest.mark.parametrize("stays", [False, True])
def test_what_is_written_is_read(session: str | None, keys: list[str], stays: bool) -> None:
    text = write(Routing(session, keys, stays))
    assert text.isascii() and read(text) == Routing(session, keys, stays)


@pytest.mark.parametrize("given", ["abc", "a:b", "dso:", "dso:x:y:z", "dso:stays:y", "\udcff"])
def test_session_ids_of_clients_are_sessions(given: str) -> None:
    assert read("") == Routing(None, [])
    assert read(given) == Routing(session_of(given), [])


@pytest.mark.parametrize("text", ["Bearer secret", "x" * 100_000])
def test_sessions_are_short_hashes(text: str) -> None:
    assert len(session_of(text)) == 32 and "secret" not in session_of(text)
    assert session_of(text) == session_of(text) != session_of(text + "x")
