"""`dso longdoc`: answers and citations on stdout, problems with files on stderr, one line per error."""

from __future__ import annotations

import json
import shutil
import signal

import pytest

from support.long_documents import prose

TEXT = prose(12)
KEYS = {"answer", "citations", "strategy", "tokens", "seconds", "peak_memory_gb"}
SMALL = ("--max-length", "512", "--stride", "64", "-n", "8")


@pytest.fixture
def model(tiny_model, tmp_path):
    """The tiny model with a context of a few pages; it never ends a text."""
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    for name in ("config.json", "generation_config.json"):
        fields = {**json.loads((folder / name).read_text()), "eos_token_id": None}
        fields |= {"max_position_embeddings": 2048} if name == "config.json" else {}
        (folder / name).write_text(json.dumps(fields))
    return folder


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text(TEXT)
    return path


def test_json_has_these_keys_and_citations_that_are_in_the_file(dso, model, file):
    result = dso("longdoc", model, file, "--ask", TEXT.split(".")[0] + "?", "--json", *SMALL)
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert set(facts) == KEYS and facts["strategy"] == "whole" and facts["seconds"] > 0
    assert set(facts["tokens"]) == {"read", "cached", "generated"} and facts["tokens"]["read"] > len(TEXT)
    for citation in facts["citations"]:
        assert citation["file"] == str(file) and TEXT[citation["start"] : citation["end"]] == citation["text"]
    assert facts["citations"]


def test_text_output_and_messages_on_stderr(dso, model, file):
    result = dso("longdoc", model, file, "--ask", TEXT.split(".")[0] + "?", "--strategy", "retrieve", *SMALL)
    assert result.exit_code == 0 and f"[1] {file}:1: {TEXT[:20]}" in result.stdout
    assert "retrieve: it was requested" in result.stderr and "retrieve" not in result.stdout


def test_scanned_pages(dso, model, tmp_path):
    """They are reported without an OCR model, and read with one."""
    pytest.importorskip("PIL", reason="needs Pillow")
    from support.documents import scanned_pdf
    from support.picture_processors import picture, save_pair

    save_pair(tmp_path / "seeing")
    scan = tmp_path / "scan.pdf"
    scan.write_bytes(scanned_pdf([TEXT[:300], picture(60, 80)]))
    without = dso("longdoc", model, scan, "--summarize", "--json", *SMALL)
    assert without.exit_code == 0 and "pages without text (empty or images): 2; " in without.stderr
    assert "--ocr MODEL" in without.stderr
    result = dso("longdoc", model, scan, "--summarize", "--json", "--ocr", tmp_path / "seeing", *SMALL)
    assert result.exit_code == 0, result.output
    assert "pages that the OCR model has read: 2" in result.stderr
    assert json.loads(result.stdout)["tokens"]["read"] > json.loads(without.stdout)["tokens"]["read"]
    blind = dso("longdoc", model, scan, "--summarize", "--ocr", model, *SMALL)
    assert blind.exit_code != 0 and "this model reads text only" in blind.stderr and "Traceback" not in blind.stderr


def test_unreadable_files_are_named_and_others_are_used(dso, model, file, tmp_path):
    (tmp_path / "broken.pdf").write_bytes(b"%PDF-1.7 and nothing")
    (tmp_path / "empty.txt").write_bytes(b"")
    result = dso("longdoc", model, file, tmp_path / "broken.pdf", tmp_path / "empty.txt", "--summarize", "--json", *SMALL)
    assert result.exit_code == 0, result.output
    for name in ("broken.pdf", "empty.txt"):
        assert any(line.startswith("dso: ") and name in line for line in result.stderr.splitlines())
    assert set(json.loads(result.stdout)) == KEYS


def test_data_by_a_schema(dso, model, file, tmp_path):
    schema = {"type": "object", "properties": {"kind": {"enum": ["x", "y"]}}, "required": ["kind"]}
    (tmp_path / "schema.json").write_text(json.dumps(schema))
    result = dso("longdoc", model, file, "--extract", tmp_path / "schema.json", "--json", *SMALL[:-1], "40")
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)["answer"]
    assert answer in ({"kind": "x"}, {"kind": "y"})


def test_a_cache_directory_is_reused(dso, model, file, tmp_path):
    command = ("longdoc", model, file, "--ask", "What?", "--cache", tmp_path / "cache", "--json", *SMALL)
    first, second = (json.loads(dso(*command).stdout) for _ in range(2))
    assert first["tokens"]["cached"] == 0 and second["tokens"]["cached"] >= len(TEXT) // 32 * 32
    assert first["answer"] == second["answer"] and first["citations"] == second["citations"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "exactly one of --ask QUESTION"),
        (["--ask", "x", "--summarize"], "exactly one of --ask QUESTION"),
        (["--ask", "  "], "question: is empty"),
        (["--ask", "x", "--strategy", "guess"], "unknown 'guess'"),
        (["--summarize", "--strategy", "retrieve"], "--strategy retrieve needs a question"),
        (["--summarize", "--memory-gb", "0"], "--memory-gb must be above 0"),
        (["--summarize", "--memory-gb", "0.001"], "memory: 0.001 GB"),
        (["--summarize", "--max-length", "3"], "max_length"),
        (["--summarize", "--stride", "9000"], "stride"),
        (["--extract", "missing.json"], "missing.json"),
        (["--summarize", "--precision", "int5"], "precision must be one of"),
    ],
)
def test_mistakes_are_one_line(dso, model, file, arguments, message):
    result = dso("longdoc", model, file, *arguments)
    assert result.exit_code == 2 and result.stdout == "" and "Traceback" not in result.stderr
    *notes, last = result.stderr.splitlines()
    assert last.startswith("dso: ") and message in last and all("reference backend" in note for note in notes)


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "not valid JSON"), ("[]", "must contain a JSON schema"), ('{"type": "array"}', "schema: must be")],
)
def test_bad_schemas_are_one_line(dso, model, file, tmp_path, content, message):
    (tmp_path / "schema.json").write_text(content)
    result = dso("longdoc", model, file, "--extract", tmp_path / "schema.json")
    assert result.exit_code == 2 and message in result.stderr


def test_a_missing_file_is_named_before_a_model_is_loaded(dso, tmp_path):
    result = dso("longdoc", "no/such/model", tmp_path / "missing.txt", "--summarize")
    assert result.exit_code == 2 and "missing.txt" in result.stderr and "no/such/model" not in result.stderr


def test_interrupt_ends_it_with_code_130(dso, model, file, monkeypatch):
    from deepseek_optimizer.engine.core import EngineCore

    step = EngineCore.step

    def interrupted(core):
        outputs = step(core)
        signal.raise_signal(signal.SIGINT)
        return outputs

    monkeypatch.setattr(EngineCore, "step", interrupted)
    before = signal.getsignal(signal.SIGINT)
    result = dso("longdoc", model, file, "--summarize", *SMALL)
    assert result.exit_code == 130 and result.stdout == "" and "Traceback" not in result.output
    assert signal.getsignal(signal.SIGINT) is before


def test_a_pipe_gets_only_the_answer(dso_process, model, file):
    done = dso_process("longdoc", model, file, "--summarize", "--json", *SMALL)
    assert done.returncode == 0, done.stderr
    assert set(json.loads(done.stdout)) == KEYS and "\x1b" not in done.stdout + done.stderr and "%" not in done.stderr
