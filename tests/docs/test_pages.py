"""README and docs: links and paths are valid, flags exist, both READMEs say the same, nothing points outside the repository."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from support.code_blocks import blocks

ROOT = Path(__file__).parents[2]
READMES = (ROOT / "README.md", ROOT / "README.zh-CN.md")
DOCS = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [*READMES, *DOCS, ROOT / "CONTRIBUTING.md"]
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_PATH = re.compile(r"`((?:src|native|tests|benchmarks|examples|docs)/[\w./-]+)`")
_OUTSIDE = re.compile(r"\.\./shared|shared/(?:peers|notes|models)|/work/|/home/(?!dso)|/root/|/tmp/")


def anchors(path: Path) -> set[str]:
    """What a page's headings are called in links: GitHub's way, which mkdocs shares for these pages."""
    text = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    found = set()
    for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE):
        plain = re.sub(r"[`*]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)).strip().lower()
        found.add(re.sub(r"[^\w\- ]", "", plain).replace(" ", "-"))
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_resolve(page):
    for link in _LINK.findall(page.read_text(encoding="utf-8")):
        if re.match(r"https?:|mailto:", link):
            continue
        name, _, anchor = link.partition("#")
        target = page if not name else (page.parent / name).resolve()
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link


@pytest.mark.parametrize("page", [*READMES, *DOCS], ids=lambda page: str(page.relative_to(ROOT)))
def test_paths_exist_inside_the_repository(page):
    text = page.read_text(encoding="utf-8")
    assert not (found := _OUTSIDE.search(text)), found[0]
    for path in _PATH.findall(text):
        assert (ROOT / path).exists(), path


def test_the_readme_is_short():
    assert READMES[0].stat().st_size <= 8192


def test_both_readmes_have_the_same_code_links_and_figures():
    english, chinese = ([(b.language, b.text, b.marks) for b in blocks(page, ROOT)] for page in READMES)
    assert english == chinese and len(english) >= 5
    texts = [page.read_text(encoding="utf-8") for page in READMES]
    links = [[link for link in _LINK.findall(text) if not link.startswith("README")] for text in texts]
    assert sorted(links[0]) == sorted(links[1])
    figures = [sorted(re.findall(r"\d[\d,]*\.\d+", text)) for text in texts]
    assert figures[0] == figures[1] and len(figures[0]) > 50


def test_the_readme_has_no_internal_targets():
    for page in READMES:
        assert not re.search(r"missed|reached|at least", page.read_text(encoding="utf-8"))


def test_commands_and_their_options_exist():
    """Also in blocks that are not run."""
    from docs.generate.command_line import commands, flags

    known = commands().commands
    seen = set()
    for page in (READMES[0], *DOCS):
        for block in blocks(page, ROOT):
            for line in block.commands() if block.language == "console" else ():
                words = shlex.split(line)
                if words[0] != "dso":
                    continue
                assert words[1] in known, f"{page}:{block.line}: {line}"
                seen.add(words[1])
                used = {word.partition("=")[0] for word in words[2:] if re.match(r"--?[a-z]", word)}
                assert used <= flags(known[words[1]]) | {"--help"}, f"{page}:{block.line}: {line}"
    assert seen >= {"run", "chat", "serve", "train", "convert", "longdoc", "doctor", "bench", "info"}


def test_tables_of_other_engines_name_our_options():
    from docs.generate.command_line import commands, flags

    known = commands().commands
    rows = re.findall(r"^\|([^|]+)\|([^|]+)\|", (ROOT / "docs" / "coming-from.md").read_text(encoding="utf-8"), re.MULTILINE)
    named = {flag for _, ours in rows for flag in re.findall(r"(--[a-z][a-z-]+)", ours)}
    assert len(named) > 15
    all_flags = set().union(*(flags(command) for command in known.values()))
    assert named <= all_flags, named - all_flags


def test_options_in_running_text_exist():
    """Of any command: `--flag` in a page that speaks of `dso` alone."""
    from docs.generate.command_line import commands, flags

    every = set().union(*(flags(command) for command in commands().commands.values()))
    others = {"--cpuset-cpus", "--cpus", "--memory", "--gpus", "--debug", "--version", "--help", "--quick", "--check"}
    for page in DOCS:
        if page.name in ("coming-from.md", "benchmarks.md"):
            continue
        text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
        for code in re.findall(r"`([^`\n]+)`", text):
            for flag in re.findall(r"(?<![\w-])(--[a-z][a-z-]+)", code):
                assert flag in every | others, f"{page.name}: {flag}"


def test_engine_options_in_running_text_exist():
    from dataclasses import fields

    from deepseek_optimizer.engine.options import EngineOptions

    known = {field.name for field in fields(EngineOptions)} | {"drafts", "draft_model", "arena"}
    named = {name for page in DOCS for name in re.findall(r"`make_engine\([^`]*?(\w+)=", page.read_text(encoding="utf-8"))}
    assert named and named <= known, named - known


def test_pages_follow_the_glossary():
    """None of the phrases that docs/glossary.md replaces, in what is written by hand."""
    replaced = (
        "tokens a second", "bits a weight", "made again", "by chance", "the midst", "goes before", "argument more", "goes on",
        "turned key", "mend ", "taken in", "whoever", "as it lies", "is told",
    )  # fmt: skip
    for page in [READMES[0], *DOCS]:
        if page.name != "glossary.md" and page.parent.name != "reference":
            text = page.read_text(encoding="utf-8")
            assert not (found := [phrase for phrase in replaced if phrase in text]), (page.name, found)


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2]
    named = set(re.findall(r": ([\w/-]+\.md)", navigation))
    assert named == {str(page.relative_to(ROOT / "docs")) for page in DOCS}


def test_every_error_and_environment_variable_is_documented():
    from deepseek_optimizer import errors

    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    raised = [e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, errors.DeepSeekOptimizerError)]
    internal = {errors.DeepSeekOptimizerError, errors.GraphError, errors.ForgottenError}
    assert not [error.__name__ for error in raised if error not in internal and f"`{error.__name__}`" not in text]
    variables = (ROOT / "docs" / "reference" / "environment.md").read_text(encoding="utf-8")
    sources = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "src").rglob("*.py"))
    used = set(re.findall(r"environ(?:\.get\(|\[)\"(DSO_\w+)\"", sources))
    assert used and not [name for name in used if f"`{name}`" not in variables]


def test_every_route_is_documented(byte_tokenizer):
    from deepseek_optimizer.server.app import create_app
    from support.fake_engine import FakeEngine

    text = (ROOT / "docs" / "reference" / "http-api.md").read_text(encoding="utf-8")
    paths = set(create_app(FakeEngine(byte_tokenizer)).openapi()["paths"])
    missing = [path for path in paths if f"`{path.replace(':path', '')}`" not in text]
    assert len(paths) > 10 and not missing


def test_security_has_the_server_s_limits():
    """The figures that the page states are the defaults."""
    from deepseek_optimizer.server.settings import ServerSettings

    text = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
    s = ServerSettings()
    stated = (
        f"| {s.max_body_bytes >> 20} MB,", f"{s.max_body_bytes_per_client >> 20} MB, {s.max_body_bytes_total >> 20} MB",
        f"{s.max_header_bytes >> 10} KB, {s.max_headers} headers", f"| {s.max_json_depth} |", f"| {s.max_connections:,} |",
        f"| {s.max_answers} |", f"{s.header_seconds:g} s, {s.body_seconds:g} s, {s.write_seconds:g} s",
        f"| {s.request_seconds:g} s,", f"| {s.grammar_seconds:g} s |", f"| {s.max_file_bytes >> 20} MB,",
        f"| {s.max_file_bytes_total >> 20} MB,", f"{s.file_read_seconds:g} s; {s.upload_seconds:g} s; 1 day",
    )  # fmt: skip
    assert s.file_seconds == 86_400 and s.host == "127.0.0.1" and not s.keys
    assert not [figure for figure in stated if figure not in text]
