"""The prefix cache's second level: a new engine continues from an earlier one's blocks, and every text is right whatever is
stored, damaged, deleted or short of memory."""

from __future__ import annotations

import random
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from deepseek_optimizer.checkpoint.prefix_files import PrefixFiles
from deepseek_optimizer.engine.engine import Completion, Engine
from deepseek_optimizer.engine.prometheus import EngineCollector
from deepseek_optimizer.engine.request import Request
from deepseek_optimizer.engine.speculative.prompt_lookup import PromptLookupProposer
from support.engine_runs import endless, run, text
from support.mock_model import (
    BLOCK_BYTES,
    CACHE_KINDS,
    STATE_TOKENS,
    blocks_in_use,
    expected,
    expected_of,
    make_core,
    run_with_arrivals,
)


def files_in(directory: Path, max_bytes: int = 1 << 24, states: bool = False) -> PrefixFiles:
    return PrefixFiles(directory, bytes(16), max_bytes, BLOCK_BYTES, 8 * STATE_TOKENS if states else 0)


def core_with(directory: Path, kind: str = "full", max_bytes: int = 1 << 24, **options):
    return make_core(store=files_in(directory, max_bytes, kind == "states"), **{**CACHE_KINDS[kind], **options})


def ask(core, prompt: list[int], count: int = 5, **fields) -> Completion:
    return run(core, Request(prompt, endless(count), id="1", **fields))["1"]


@pytest.mark.parametrize("kind", CACHE_KINDS)
def test_a_new_engine_continues_where_the_last_one_ended(tmp_path, kind):
    prompt, first = text(1, 400), core_with(tmp_path, kind)
    answer = ask(first, prompt, 60)
    first.scheduler.close()
    second = core_with(tmp_path, kind)
    follow = [*prompt, *answer.token_ids, *text(2, 30)]
    again = ask(second, follow)
    assert again.cached_tokens == 459 and again.token_ids == expected_of(kind, follow)  # all that the first one processed
    assert ask(second, prompt).cached_tokens == 384
    second.scheduler.close()
    edited = [*prompt[:390], *text(3, 40)]  # another question about the same text
    third = core_with(tmp_path, kind)
    other = ask(third, edited)
    assert other.cached_tokens == 384 and other.token_ids == expected_of(kind, edited)
    third.scheduler.close()


def test_states_are_read_only_where_the_text_continues(tmp_path, monkeypatch):
    """Those after the last full block are not needed if the partly filled one and its states are there."""
    prompt, first = text(1, 400), core_with(tmp_path, "states")
    answer = ask(first, prompt, 60)
    first.scheduler.close()
    read, groups = PrefixFiles.read, []

    def recorded(self, key, group):
        groups.append(group)
        return read(self, key, group)

    monkeypatch.setattr(PrefixFiles, "read", recorded)
    second = core_with(tmp_path, "states")
    follow = [*prompt, *answer.token_ids, *text(2, 30)]
    again = ask(second, follow)
    assert again.cached_tokens == 459 and again.token_ids == expected_of("states", follow)
    assert groups.count(-1) == 1 and groups.count(0) == 459 // 32 + 1
    second.scheduler.close()


@pytest.mark.parametrize("kind", CACHE_KINDS)
def test_parts_in_memory_and_in_files_are_joined(tmp_path, kind):
    prompt, first = text(1, 600), core_with(tmp_path, kind)
    ask(first, prompt)
    first.scheduler.close()
    second = core_with(tmp_path, kind)
    ask(second, prompt[:200])
    answer = ask(second, prompt)
    assert answer.cached_tokens == 576 and answer.token_ids == expected_of(kind, prompt)
    second.scheduler.close()


def test_other_salts_and_texts_find_nothing(tmp_path):
    prompt, first = text(1, 200), core_with(tmp_path)
    ask(first, prompt, salt="a key")
    first.scheduler.close()
    second = core_with(tmp_path)
    assert ask(second, prompt).cached_tokens == 0 and ask(second, prompt, salt="another").cached_tokens == 0
    assert ask(second, [0, *prompt[1:]], salt="a key").cached_tokens == 0
    assert ask(second, prompt, salt="a key").cached_tokens == 192
    second.scheduler.close()


@pytest.mark.parametrize("kind", CACHE_KINDS)
@pytest.mark.parametrize("harm", ["flip", "truncate", "delete", "unreadable"])
def test_a_damaged_file_costs_time_only(tmp_path, kind, harm, caplog):
    prompt, first = text(1, 400), core_with(tmp_path, kind)
    ask(first, prompt)
    first.scheduler.close()
    paths = sorted((tmp_path / bytes(16).hex()).iterdir())
    for path in random.Random(0).sample(paths, len(paths) // 3):
        data = bytearray(path.read_bytes())
        data[-9] ^= 1
        if harm in ("flip", "truncate"):
            path.write_bytes(data if harm == "flip" else data[:-9])
        else:
            path.unlink()
            if harm == "unreadable":
                path.mkdir()
    second = core_with(tmp_path, kind)
    answer = ask(second, prompt)
    assert answer.token_ids == expected_of(kind, prompt) and answer.cached_tokens < 384
    assert harm == "delete" or "prefix cache" in caplog.text
    second.scheduler.close()
    if harm != "unreadable":
        assert ask(core_with(tmp_path, kind), prompt).cached_tokens == 384  # written again


def test_requests_with_one_prefix_read_it_once(tmp_path):
    prompt, first = text(1, 640), core_with(tmp_path)
    ask(first, prompt)
    first.scheduler.close()
    second = core_with(tmp_path, batch_size_range=(1, 8))
    requests = [Request([*prompt, *text(n, 20)], endless(5), id=str(n), client=str(n)) for n in range(6)]
    answers = run(second, *requests)
    assert all(a.cached_tokens == 640 for a in answers.values()) and second.scheduler.stored.reader.parts == 20
    assert all(answers[r.id].token_ids == expected(r.prompt, 5, None) for r in requests)
    second.scheduler.close()


class Slow:
    """A store whose reads wait until they are allowed to end."""

    def __init__(self, store: PrefixFiles) -> None:
        self._store, self.allowed = store, threading.Event()

    def __getattr__(self, name: str):
        return getattr(self._store, name)

    def read(self, key: bytes, group: int) -> bytes | None:
        assert self.allowed.wait(30)
        return self._store.read(key, group)


def test_other_requests_continue_while_one_is_read(tmp_path):
    prompt, first = text(1, 400), core_with(tmp_path)
    ask(first, prompt)
    first.scheduler.close()
    slow = Slow(files_in(tmp_path))
    core = make_core(store=slow)
    core.add(Request(prompt, endless(5), id="known"))
    core.add(Request(text(5, 50), endless(30), id="new"))
    answers = {"known": Completion(), "new": Completion()}
    while answers["new"].finish is None:
        for output in core.step():
            answers[output.request_id].add(output)
    assert answers["new"].token_ids == expected(text(5, 50), 30, None) and answers["known"].finish is None
    for _ in range(3):
        assert core.step() == []  # waits; the request does not fail
    slow.allowed.set()
    while answers["known"].finish is None:
        for output in core.step():
            answers[output.request_id].add(output)
    assert answers["known"].cached_tokens == 384 and answers["known"].token_ids == expected(prompt, 5, None)
    core.scheduler.close()


def test_a_request_that_is_cancelled_while_it_is_read(tmp_path):
    prompt, first = text(1, 400), core_with(tmp_path)
    ask(first, prompt)
    first.scheduler.close()
    slow = Slow(files_in(tmp_path))
    core = make_core(store=slow)
    core.add(Request(prompt, endless(5), id="1"))
    core.step()
    core.cancel("1")
    assert [output.finish for output in core.step()] == ["cancelled"] and core.idle
    slow.allowed.set()
    answer = ask(core, prompt)
    assert answer.cached_tokens == 384 and answer.token_ids == expected(prompt, 5, None)
    core.add(Request(text(7, 100), endless(5), id="2"))
    core.step()
    core.scheduler.close()


def test_an_engine_that_ends_while_it_reads_leaks_no_block(tmp_path):
    prompt, first = text(1, 400), core_with(tmp_path)
    ask(first, prompt)
    first.scheduler.close()
    slow = Slow(files_in(tmp_path))
    core = make_core(store=slow)
    core.add(Request(prompt, endless(5), id="1"))
    core.step()
    slow.allowed.set()
    core.scheduler.close()
    assert blocks_in_use(core) == 0


@pytest.mark.parametrize("kind", CACHE_KINDS)
def test_a_cache_that_is_too_small_for_the_stored_prefix(tmp_path, kind):
    prompt, first = text(1, 600), core_with(tmp_path, kind)
    ask(first, prompt)
    first.scheduler.close()
    small = core_with(tmp_path, kind, step_tokens=64, blocks={"window": 14, "groups": 50}.get(kind, 24))
    others = [Request(text(n, 300), endless(40), id=f"o{n}") for n in range(3)]
    answers = run(small, *others, Request(prompt, endless(5), id="1"))
    assert answers["1"].token_ids == expected_of(kind, prompt)
    assert all(answers[r.id].token_ids == expected_of(kind, r.prompt, 40) for r in others)
    small.scheduler.close()


def test_the_size_limit_holds_and_recent_prefixes_stay(tmp_path):
    limit = 40 * (BLOCK_BYTES + 72)
    core = core_with(tmp_path, max_bytes=limit)
    for n in range(8):
        ask(core, text(n, 320))
    core.scheduler.close()
    sizes = [path.stat().st_size for path in (tmp_path / bytes(16).hex()).iterdir()]
    assert sum(sizes) <= limit and core.scheduler.stored.store.evicted_files >= 20
    again = core_with(tmp_path, max_bytes=limit)
    assert ask(again, text(7, 320)).cached_tokens == 288 and ask(again, text(0, 320)).cached_tokens == 0
    again.scheduler.close()


def test_errors_of_the_disk_do_not_reach_requests(tmp_path, monkeypatch, caplog):
    core = core_with(tmp_path)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(core.scheduler.stored.store, "write", full)
    assert ask(core, text(1, 200)).token_ids == expected(text(1, 200), 5, None)
    core.scheduler.close()
    assert caplog.text.count("cannot be written") == 1 and "No space" in caplog.text
    assert core.scheduler.stored.writer.dropped == 7  # blocks of 204 tokens


def test_prefixes_outlive_the_release_of_the_memory(tmp_path):
    prompt, core = text(1, 400), core_with(tmp_path)
    ask(core, prompt)
    core.release_memory()
    assert len(core.prefix) == 0
    answer = ask(core, prompt)
    assert answer.cached_tokens == 384 and answer.token_ids == expected(prompt, 5, None)
    core.scheduler.close()


def test_metrics(tmp_path):
    prompt, first = text(1, 200), core_with(tmp_path)
    ask(first, prompt)
    first.scheduler.close()
    second = core_with(tmp_path)
    ask(second, prompt)
    values = {
        sample.name.removeprefix("dso:prefix_files_"): sample.value
        for core in (first, second)
        for metric in EngineCollector(SimpleNamespace(core=core, model_name="m", admitted=0, refused=0)).collect()
        for sample in metric.samples
        if sample.name.startswith("dso:prefix_files") and sample.value
    }
    assert values == {
        "bytes": 7 * (BLOCK_BYTES + 72),  # the last block is filled in part
        "written_total": 7,
        "written_bytes_total": 7 * (BLOCK_BYTES + 72),
        "read_total": 6,
        "read_bytes_total": 6 * BLOCK_BYTES,
    }
    second.scheduler.close()


def test_an_engine_is_a_context_that_writes_the_rest(tmp_path):
    prompt = text(1, 100)
    with Engine(core_with(tmp_path)) as engine:
        engine.generate([prompt], endless(5))
    assert ask(core_with(tmp_path), prompt).cached_tokens == 96


@pytest.mark.parametrize("kind", CACHE_KINDS)
@pytest.mark.parametrize("seed", range(3))
def test_random_arrivals_with_engines_that_come_and_go(tmp_path, kind, seed):
    """Two engines at once on one directory that is too small, restarted twice; files are deleted and damaged meanwhile."""
    rng = random.Random(seed)
    shared = [text(100 + n, rng.randrange(40, 400)) for n in range(3)]
    forgetting = CACHE_KINDS[kind].get("forgetting")
    for _ in range(3):
        cores = [
            core_with(
                tmp_path, kind, max_bytes=120 * (BLOCK_BYTES + 72), step_tokens=rng.choice([32, 64, 512]),
                proposers=[(PromptLookupProposer(2, 1), 4)] if rng.random() < 0.5 else None,
                batch_size_range=(1, rng.randrange(2, 8)),
                **({"blocks": rng.randrange(20, 64)} if kind in ("full", "states") else {}),
            )
            for _ in range(2)
        ]  # fmt: skip
        workers = []
        for n, core in enumerate(cores):
            draw = random.Random((seed, n).__hash__())
            prompts = [draw.choice(shared)[: draw.randrange(30, 400)] + text(draw.randrange(9), 40) for _ in range(12)]
            requests = [
                Request(p, endless(draw.randrange(1, 60)), id=str(i), client=draw.choice("ab"), salt=draw.choice(["", "s"]))
                for i, p in enumerate(prompts)
            ]
            workers.append(_Worker(core, requests, random.Random(n), forgetting))
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
            assert worker.error is None, worker.error
        folder = tmp_path / bytes(16).hex()
        paths = sorted(folder.iterdir())
        for path in rng.sample(paths, min(5, len(paths))):  # files with states are large: only a few fit
            path.write_bytes(b"x" * rng.randrange(300)) if rng.random() < 0.5 else path.unlink()


class _Worker(threading.Thread):
    def __init__(self, core, requests, rng, forgetting) -> None:
        super().__init__()
        self.core, self.arguments, self.error = core, (requests, rng, forgetting), None

    def run(self) -> None:
        try:
            run_with_arrivals(self.core, *self.arguments)
            self.core.scheduler.close()
        except BaseException as error:
            self.error = error
