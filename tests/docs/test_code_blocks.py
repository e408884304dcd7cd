"""Every code block of README and docs runs on a tiny model; with -m slow on SmolLM2, including those marked as slow."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from deepseek_optimizer.bench import roofline
from deepseek_optimizer_cli.app import app
from support.code_blocks import Session, blocks
from support.documents import pdf
from support.live_server import LiveServer
from support.saved_llama import saved_llama

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
LANGUAGES = {"python", "console", "yaml", "cpp", "text"}

pytestmark = pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")

# Names of models in the documentation, which the tests replace by a path.
MODELS = (
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B",
    "HuggingFaceTB/SmolLM2-135M-Instruct",
)


def every_block():
    return [block for page in PAGES for block in blocks(page, ROOT)]


def test_blocks_have_supported_languages_and_skipped_ones_a_reason():
    for block in every_block():
        place = f"{block.page}:{block.line}"
        assert block.language in LANGUAGES, place
        unknown = set(block.marks) - {"not tested", "tested", "file", "stdin", "training", "fixture"}
        assert not unknown, (place, unknown)
        if "not tested" in block.marks:
            assert len(block.marks["not tested"]) > 5, place
        if block.language == "python":
            compile(block.text, place, "exec")
        if block.language == "console":
            assert block.commands(), place


@pytest.fixture(scope="session")
def documented_model(tmp_path_factory, byte_tokenizer):
    """A random model with a context for the documentation's prompts."""
    return saved_llama(tmp_path_factory.mktemp("docs") / "model", byte_tokenizer, max_position_embeddings=8192)


@pytest.fixture
def folder(tmp_path):
    """The files that the documentation mentions."""
    words = random.Random(0)
    prose = "\n\n".join(f"Section {i}. The vault is opened by {words.choice(['Ada', 'Bo', 'Cy'])}." for i in range(40))
    (tmp_path / "handbook.pdf").write_bytes(pdf([prose[:400], prose[400:800]]))
    for name in ("notes.txt", "server.log"):
        (tmp_path / name).write_text(prose, encoding="utf-8")
    for name in ("notes", "contracts"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "one.md").write_text(f"# One\n\n{prose[:300]}", encoding="utf-8")
    schema = {"type": "object", "properties": {"party": {"enum": ["Ada", "Bo"]}}, "required": ["party"]}
    (tmp_path / "schema.json").write_text(json.dumps(schema), encoding="utf-8")
    chats = [[{"role": "user", "content": f"count {i}"}, {"role": "assistant", "content": "one two"}] for i in range(40)]
    lines = [json.dumps({"messages": chat}) for chat in chats]
    (tmp_path / "chats.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (tmp_path / "held-out.jsonl").write_text("\n".join(lines[:8]), encoding="utf-8")
    return tmp_path


@pytest.fixture
def session(folder, monkeypatch):
    """session(model) -> a Session whose servers end with the test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    monkeypatch.delenv("DSO_API_KEYS", raising=False)
    monkeypatch.setattr(roofline, "read_gb_s", lambda *_: 50.0)  # measured in tests/bench
    monkeypatch.setattr(roofline, "matrix_tera", lambda *_: {"bf16": 1.0})
    running = []

    def serve(arguments):
        """Runs the real command up to listening, which happens in a thread on a free port."""
        from deepseek_optimizer.server import run

        def start(engine, settings, sock, banner, tracer, ocr):
            sock.close()
            live = LiveServer(engine, settings)
            banner("127.0.0.1", live.port)
            running.append(live.__enter__())

        for live in running:
            live.__exit__()
        running.clear()
        monkeypatch.setattr(run, "serve", start)
        port = arguments.index("--port") + 1
        result = CliRunner().invoke(app, [*arguments[:port], "0", *arguments[port + 1 :]])
        assert result.exit_code == 0, result.output
        return f"127.0.0.1:{running[0].port}"

    def invoke(arguments, input):
        return CliRunner().invoke(app, arguments, input=input)

    yield lambda model: Session(folder, dict.fromkeys(MODELS, str(model)), invoke, serve)
    for live in running:
        live.__exit__()


def run_page(page: Path, session: Session, slow: bool) -> int:
    """Runs the blocks of a page; returns their number."""
    count, packed = 0, set[str]()
    for block in blocks(page, ROOT):
        if "not tested" in block.marks or (block.slow and not slow):
            continue
        name = block.marks.get("fixture", "").removeprefix("packed ")
        if name and name not in packed:
            packed.add(name)
            model = next(iter(session.names.values()))
            result = session.invoke(["convert", model, str(session.folder / name), "--precision", "int8"], None)
            assert result.exit_code == 0, result.output
        session.run(block)
        count += 1
    return count


def runs(block) -> bool:
    return block.language in ("python", "console") and "not tested" not in block.marks


RUNNABLE = [page for page in PAGES if any(runs(block) for block in blocks(page, ROOT))]
LONG = {"train.md", "prune.md", "long-documents.md", "serve.md"}  # several seconds each


@pytest.mark.every_run
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=pytest.mark.wide) if page.name in LONG else page for page in RUNNABLE],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_blocks_run(page, session, documented_model):
    assert run_page(page, session(documented_model), slow=False) > 0


@pytest.fixture(scope="session")
def smollm2():
    """The GGUF file and the same model in bf16, in the user's cache directory."""
    from deepseek_optimizer.bench import smollm2
    from deepseek_optimizer.bench.unoptimized_model import dequantized

    file = smollm2.fetch()
    return file, dequantized(file)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", RUNNABLE, ids=lambda page: str(page.relative_to(ROOT)))
def test_blocks_run_on_smollm2(smollm2, page, session, folder):
    file, bf16 = smollm2
    shutil.copy(file, folder / file.name)
    assert run_page(page, session(bf16), slow=True) > 0


def test_a_wrong_block_fails(session, documented_model, tmp_path):
    made = session(documented_model)
    for text in ("```python\nassert 1 == 2\n```\n", "```console\n$ dso run nowhere --no-such-flag x\n```\n"):
        page = tmp_path / "page.md"
        page.write_text(text, encoding="utf-8")
        with pytest.raises(AssertionError, match="page.md:1"):
            made.run(blocks(page, tmp_path)[0])
