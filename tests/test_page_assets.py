"""The chat page's libraries: downloaded with the pinned checksum or not at all, and in the wheel with their licences."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import io
import json
import sys
import tarfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def assets() -> ModuleType:
    spec = importlib.util.spec_from_file_location("page_assets", ROOT / "build_tools" / "page_assets.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def package(tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """A tarball like npm's, and its pin."""
    content = b"export default 1;\n"
    tarball = tmp_path / "some-1.0.0.tgz"
    with tarfile.open(tarball, "w:gz") as archive:
        member = tarfile.TarInfo("package/dist/some.js")
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    digest = base64.b64encode(hashlib.sha512(tarball.read_bytes()).digest()).decode()
    file = {"path": "dist/some.js", "sha256": hashlib.sha256(content).hexdigest()}
    return tarball, {"version": "1.0.0", "integrity": f"sha512-{digest}", "files": {"some.js": file}}


def test_matching_archives_are_unpacked(assets, package, tmp_path):
    tarball, pinned = package
    assets.unpack(tarball, pinned, tmp_path / "vendor")
    assert (tmp_path / "vendor" / "some.js").read_text() == "export default 1;\n"
    assert assets.missing(pinned["files"], tmp_path / "vendor") == []
    (tmp_path / "vendor" / "some.js").write_text("changed")
    assert assets.missing(pinned["files"], tmp_path / "vendor") == ["some.js"]


@pytest.mark.parametrize("wrong", ["integrity", "sha256", "path"])
def test_archives_that_do_not_match_are_rejected(assets, package, tmp_path, wrong):
    tarball, pinned = package
    if wrong == "integrity":
        pinned["integrity"] = "sha512-AAAA"
    else:
        pinned["files"]["some.js"][wrong] = "0"
    with pytest.raises(assets.AssetError, match="some-1.0.0.tgz"):
        assets.unpack(tarball, pinned, tmp_path / "vendor")
    assert not (tmp_path / "vendor" / "some.js").exists()


def test_missing_npm_is_reported_and_does_not_fail_the_build(assets, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(assets.fetch, "__defaults__", (assets.LOCK, tmp_path / "vendor"))
    assert assets.main() == 1
    assert "needs npm" in capsys.readouterr().err


def test_existing_files_are_not_downloaded_again(assets, monkeypatch, package, tmp_path):
    tarball, pinned = package
    lock = tmp_path / "vendor.json"
    lock.write_text(json.dumps({"packages": {"some": pinned}}))
    fetched = []
    monkeypatch.setattr(assets, "download", lambda name, folder: fetched.append(name) or tarball)
    assets.fetch(lock, tmp_path / "vendor")
    assets.fetch(lock, tmp_path / "vendor")
    assert fetched == ["some@1.0.0"]


def test_every_library_has_its_licence():
    packages = json.loads((ROOT / "src/deepseek_optimizer/server/page/vendor.json").read_text())["packages"]
    assert packages.keys() == {"markdown-it", "markdown-it-footnote", "katex", "@highlightjs/cdn-assets"}
    for pinned in packages.values():
        assert any(name.endswith(".LICENSE") for name in pinned["files"])
        assert pinned["integrity"].startswith("sha512-") and pinned["license"] in ("MIT", "BSD-3-Clause")


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib needs Python 3.11")
def test_the_backend_builds_with_the_libraries_or_without(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "build_tools"))
    backend = importlib.import_module("backend")
    calls = []
    monkeypatch.setattr(backend.page_assets, "fetch", lambda: calls.append("fetch"))
    monkeypatch.setattr(backend.scikit, "build_wheel", lambda *arguments: calls.append("wheel") or "name.whl")
    assert backend.build_wheel("folder") == "name.whl"

    def fail() -> None:
        raise backend.page_assets.AssetError("no network")

    monkeypatch.setattr(backend.page_assets, "fetch", fail)
    assert backend.build_wheel("folder") == "name.whl"
    assert calls == ["fetch", "wheel", "wheel"]
    assert {"build_sdist", "build_editable", "get_requires_for_build_wheel", "get_requires_for_build_sdist"} <= set(
        dir(backend)
    )
