"""`LongDocument` over a real engine with a random model: what is read, reused, saved and cited; the answers are meaningless."""

from __future__ import annotations

import errno
import gc
import json

import pytest

from deepseek_optimizer import LongDocument
from deepseek_optimizer.chat.conversation import StopSignal
from deepseek_optimizer.errors import CheckpointError, ConfigError, DocumentError, RequestError
from deepseek_optimizer.longdoc import long_document
from deepseek_optimizer.longdoc.document import Document
from deepseek_optimizer.longdoc.own_memory import own_bytes
from support import warm_python
from support.long_documents import prose

SHORT, LONG = prose(12), prose(150)
SMALL = {"max_length": 512, "stride": 64, "max_tokens": 12}
SCHEMA = {
    "type": "object",
    "properties": {"names": {"type": "array", "maxItems": 2, "items": {"enum": ["a", "b", "c"]}}, "kind": {"enum": ["x", "y"]}},
    "required": ["names", "kind"],
}
PEAK = """
import time
from deepseek_optimizer.longdoc.own_memory import PeakSampler, own_bytes

with PeakSampler() as peak:
    before = own_bytes()
    taken = bytearray(b"x") * (64 << 20)
    end = time.monotonic() + 20.0
    while peak.bytes - before < 60 << 20 and time.monotonic() < end:
        time.sleep(0.01)  # on a busy machine the sampler may have to wait for a processor
    del taken
assert own_bytes() - before < 10 << 20
assert peak.bytes - before >= 60 << 20, (peak.bytes, before)
"""


def opened(loaded, source, **options) -> LongDocument:
    return LongDocument(*loaded, source, **{**SMALL, **options})


def text_of(made: LongDocument, name: str) -> str:
    return next(file.text for file in made.document.files if file.name == name)


@pytest.mark.parametrize("strategy", ["whole", "window", "map_reduce", "retrieve"])
def test_each_strategy_cites_the_text(loaded, strategy):
    with opened(loaded, SHORT if strategy == "whole" else LONG) as made:
        answer = made.ask(SHORT.split(".")[0] + "?", strategy=strategy)
        assert answer.strategy == strategy and answer.reason == "it was requested"
        assert isinstance(answer.answer, str) and (answer.citations or strategy == "map_reduce")  # if it answers nothing at all
        for citation in answer.citations:
            assert text_of(made, citation.file)[citation.start : citation.end] == citation.text != ""
        least = len(SHORT) if strategy in ("whole", "retrieve") else len(LONG)
        assert answer.tokens.read >= min(least, 400) and answer.tokens.generated >= 1 and answer.seconds > 0
        if strategy in ("window", "map_reduce"):
            assert answer.tokens.read >= len(LONG.encode())
        assert answer.peak_memory_gb is None or 0 <= answer.peak_memory_gb < 5


def test_auto_chooses_whole_if_it_fits_and_gives_the_reason(loaded):
    with opened(loaded, SHORT) as made:
        answer = made.summarize()
        assert answer.strategy == "whole" and "fit" in answer.reason
    with opened(loaded, LONG) as made:
        assert made.summarize().strategy == "map_reduce"


def test_a_second_question_prefills_only_itself(loaded):
    with opened(loaded, SHORT) as made:
        first, second = made.ask("What is it?"), made.ask("And who wrote it?")
        assert first.tokens.cached == 0
        assert second.tokens.cached >= len(SHORT) // 32 * 32 and second.tokens.read - second.tokens.cached < 250


@pytest.mark.parametrize("strategy", ["auto", "map_reduce"])
def test_data_is_valid_under_its_schema(loaded, strategy):
    with opened(loaded, SHORT, max_tokens=64) as made:
        answer = made.extract(SCHEMA, strategy=strategy)
        assert set(answer.answer) >= {"names"} and set(answer.answer["names"]) <= {"a", "b", "c"}
        assert answer.answer.get("kind") in ("x", "y") or answer.notes
        json.dumps(answer.answer)


def test_a_saved_document_is_opened_instead_of_the_files(loaded, tmp_path):
    with opened(loaded, Document.of_texts({"a.txt": SHORT})) as made:
        made.ask("What is it?")
        expected = made.ask("And who wrote it?")
        made.save(tmp_path / "saved")
        with pytest.raises(CheckpointError, match="exists"):
            made.save(tmp_path / "saved")
        made.save(tmp_path / "saved", overwrite=True)
    with LongDocument.open(tmp_path / "saved", *loaded, max_tokens=12) as again:
        assert again.document == made.document and again.chunks == made.chunks
        answer = again.ask("And who wrote it?")
        assert answer.answer == expected.answer and answer.citations == expected.citations
        assert answer.tokens.cached >= len(SHORT) // 32 * 32


@pytest.mark.parametrize("name", ["document.json", "blocks.bin"])
def test_damaged_saved_documents_are_rejected(loaded, tmp_path, name):
    with opened(loaded, SHORT) as made:
        made.ask("What is it?")
        made.save(tmp_path / "saved")
    file = tmp_path / "saved" / name
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=name):
        LongDocument.open(tmp_path / "saved", *loaded)
    file.write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match=name):
        LongDocument.open(tmp_path / "saved", *loaded)
    with pytest.raises(CheckpointError, match="LongDocument.save"):
        LongDocument.open(tmp_path / "missing", *loaded)


def test_a_cache_directory_is_reused_and_survives_damage(loaded, tmp_path):
    with opened(loaded, SHORT, cache_dir=tmp_path) as made:
        expected = made.ask("What is it?")
        assert expected.tokens.cached == 0
    [file] = tmp_path.iterdir()
    with opened(loaded, SHORT, cache_dir=tmp_path) as made:
        answer = made.ask("What is it?")
        assert answer.tokens.cached >= len(SHORT) // 32 * 32 and answer.notes == expected.notes
    with opened(loaded, prose(12, seed=5), cache_dir=tmp_path) as made:
        assert made.ask("What is it?").tokens.cached == 0
    file.write_bytes(file.read_bytes()[:-1])
    with opened(loaded, SHORT, cache_dir=tmp_path) as made:
        answer = made.ask("What is it?")
        assert answer.tokens.cached == 0 and any("read again" in note for note in answer.notes)
    with opened(loaded, SHORT, cache_dir=tmp_path) as made:
        assert made.ask("What is it?").tokens.cached > 0  # written again


def test_an_answer_does_not_need_a_writable_cache(loaded, tmp_path, monkeypatch):
    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path))

    monkeypatch.setattr(long_document, "save_prefix", full)
    with opened(loaded, SHORT, cache_dir=tmp_path) as made:
        answer = made.ask("What is it?")
        assert isinstance(answer.answer, str)
        assert any("could not be saved" in note and "No space" in note for note in answer.notes)


def test_paths_texts_and_documents(loaded, tmp_path):
    (tmp_path / "a.txt").write_text(SHORT)
    (tmp_path / "b.md").write_text("# Two\n\nMore.\n")
    (tmp_path / "c.bin").write_bytes(bytes(range(256)) * 9)
    with opened(loaded, [tmp_path / "a.txt", str(tmp_path / "b.md"), tmp_path / "c.bin"]) as made:
        assert len(made.document.files) == 2 and [p.file for p in made.document.problems] == [str(tmp_path / "c.bin")]
    with opened(loaded, str(tmp_path / "a.txt")) as made:
        assert made.document.files[0].text == SHORT
    with opened(loaded, SHORT) as made:
        assert made.document.files[0].text == SHORT and made.chunks[-1].end == len(SHORT)
    with pytest.raises(DocumentError, match="missing"):
        opened(loaded, tmp_path / "missing.txt")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"strategy": "guess"}, "strategy"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"top": True}, "top"),
        ({"memory": 1000}, "memory: 1e-06 GB"),
        ({"memory": -1}, "memory"),
        ({"max_length": 3}, "max_length"),
        ({"stride": 500}, "stride"),
    ],
)
def test_invalid_arguments_are_named(loaded, options, words):
    with pytest.raises(ConfigError, match=words):
        opened(loaded, SHORT, **options)


def test_memory_limits_the_cache(loaded):
    with opened(loaded, LONG, memory=90_000_000) as small, opened(loaded, LONG, memory=150_000_000) as large:
        caches = [made._engines.arena.store.num_blocks * made._engines.arena.store.block_bytes for made in (small, large)]
        assert 0 < caches[0] < 90_000_000 and caches[1] - caches[0] >= 40_000_000
        answer = small.ask(LONG.split(".")[0] + "?")
        assert answer.peak_memory_gb is None or answer.peak_memory_gb <= 0.09


def test_everything_is_freed_with_the_document(loaded):
    made = opened(loaded, SHORT)
    made.ask("What is it?")
    arena = made._engines.arena
    assert arena.manager.free_blocks < arena.manager.num_blocks
    made.close()
    assert arena.manager.free_blocks == arena.manager.num_blocks
    assert made.ask("What was it?").tokens.cached == 0  # the document still works
    made.close()
    del made
    gc.collect()


def test_a_stopped_question_does_not_affect_the_next(loaded):
    with opened(loaded, LONG) as made:
        stop = StopSignal()
        stop.ask()
        with pytest.raises(KeyboardInterrupt):
            made.summarize(stop=stop)
        assert made.ask(LONG.split(".")[0] + "?").answer is not None


def test_invalid_questions_are_errors_before_prefill(loaded):
    with opened(loaded, LONG) as made:
        for call in (
            lambda: made.ask("  "),
            lambda: made.ask("x" * 10_000),
            lambda: made.ask("Qwertzuiop?", strategy="retrieve"),
            lambda: made.summarize(strategy="whole"),
            lambda: made.extract({"type": "array"}),
        ):
            with pytest.raises(RequestError):
                call()


def test_a_progress_bar_is_shown_on_a_terminal(loaded, monkeypatch):
    from contextlib import contextmanager

    seen: list[tuple[int, int]] = []

    @contextmanager
    def shown(_words):
        yield lambda done, total: seen.append((done, total))

    monkeypatch.setattr(long_document, "show_progress", shown)
    with opened(loaded, LONG) as made:
        seen.clear()
        made.summarize()
    assert seen[-1][0] == seen[-1][1] >= len(LONG.encode())


def test_peak_memory_includes_freed_memory():
    if own_bytes() is None:
        pytest.skip("this system does not tell")
    # In its own process: here, what earlier tests leave may be freed meanwhile.
    done = warm_python.run(PEAK)
    assert done.returncode == 0, done.stderr
