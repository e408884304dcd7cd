"""The chat page's files: only these are served, with a policy that permits no other code or requests."""

from __future__ import annotations

import re

import pytest
from fastapi import FastAPI

from deepseek_optimizer.server.http.page_files import FOLDER, PageFile, missing_libraries, page_files
from deepseek_optimizer.server.routes import page as page_route


def directives(response) -> dict[str, list[str]]:
    policy = response.headers["content-security-policy"]
    return {words[0]: words[1:] for part in policy.split(";") if (words := part.split())}


def test_the_page_and_its_resources(client):
    page = client.get("/")
    assert page.status_code == 200 and page.headers["content-type"] == "text/html; charset=utf-8"
    named = re.findall(r'(?:src|href)="([^"#]+)"', page.text)
    assert named
    for address in named:
        assert not re.match(r"[a-z]+:|//", address), "a URL of another server"
        assert client.get(f"/{address}").status_code == 200, address


@pytest.mark.parametrize("path", ["/", "/page/main.js", "/page/style.css", "/page/icon.svg"])
def test_the_policy(client, path):
    response = client.get(path)
    assert response.status_code == 200
    actual = directives(response)
    assert actual["default-src"] == ["'none'"] and actual["script-src"] == ["'self'"] and actual["style-src"] == ["'self'"]
    assert actual["connect-src"] == ["'self'"] and actual["frame-ancestors"] == ["'none'"] and actual["base-uri"] == ["'none'"]
    assert actual["form-action"] == ["'none'"]
    assert "unsafe" not in response.headers["content-security-policy"]
    assert response.headers["x-content-type-options"] == "nosniff" and response.headers["x-frame-options"] == "DENY"
    assert response.headers["referrer-policy"] == "no-referrer"


def test_unchanged_files_are_not_resent(client):
    first = client.get("/page/main.js")
    again = client.get("/page/main.js", headers={"If-None-Match": first.headers["etag"]})
    assert again.status_code == 304 and again.content == b"" and "content-security-policy" in again.headers


def test_only_listed_files_are_served(client):
    assert {f"/page/{name}" for name in page_files()} >= {"/page/index.html", "/page/main.js"}
    for path in ("/page/index.html", "/page/", "/page", "/page/../app.py", "/page/page_files.py", "/main.js", "/index.html"):
        assert client.get(path).status_code == 404, path


def test_unlisted_files_in_the_folder_are_not_served(tmp_path):
    (tmp_path / "index.html").write_text("<p>")
    (tmp_path / "notes.txt").write_text("secret")
    (tmp_path / "sub.js").mkdir()
    assert list(page_files(tmp_path)) == ["index.html"]
    assert page_files(tmp_path / "nowhere") == {}
    assert FOLDER.name == "page"


def test_libraries_are_served_from_their_folder_and_licences_are_not(tmp_path):
    (tmp_path / "vendor").mkdir()
    (tmp_path / "index.html").write_text("<p>")
    (tmp_path / "vendor" / "some.js").write_text("1")
    (tmp_path / "vendor" / "some.LICENSE").write_text("MIT")
    assert list(page_files(tmp_path)) == ["index.html", "vendor/some.js"]
    assert page_route.paths(page_files(tmp_path)).keys() == {"/", "/page/vendor/some.js"}


def test_missing_libraries_are_logged(caplog):
    file = PageFile(b"", "text/javascript", "")
    names = missing_libraries({})
    assert "katex.js" in names
    assert missing_libraries({f"vendor/{name}": file for name in names}) == []
    page_route.add(FastAPI(), {"index.html": file})
    assert "plain text" in caplog.text and "katex.js" in caplog.text
