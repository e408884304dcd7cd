"""Pictures in the place of those of the suites."""

from __future__ import annotations

import pytest

pytest.importorskip("PIL")
requests = pytest.importorskip("requests")

from peers.llama_server import with_pictures, without_downloads  # noqa: E402
from peers.pictures import bytes_of, picture_at, picture_of, url_of  # noqa: E402

ADDRESS = "https://huggingface.co/ggml-org/tinygemma3-GGUF/resolve/main/test/91_cat.png"


def test_a_picture_in_its_url():
    picture = picture_of("a.png")
    assert picture_at(url_of(picture)).tobytes() == picture.tobytes() != picture_of("b.png").tobytes()


def test_pictures_are_not_downloaded():
    get = without_downloads(lambda url: f"downloaded {url}")
    assert (
        get(ADDRESS).content == bytes_of(picture_of(ADDRESS)) and get("http://127.0.0.1:1") == "downloaded http://127.0.0.1:1"
    )
    body = {"messages": [{"content": [{"image_url": {"url": ADDRESS}}, {"text": f"see {ADDRESS}"}]}], "n": 1}
    changed = with_pictures(body)
    parts = changed["messages"][0]["content"]
    assert parts == [{"image_url": {"url": url_of(picture_of(ADDRESS))}}, {"text": f"see {ADDRESS}"}] and changed["n"] == 1
