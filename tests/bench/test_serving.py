"""Serving benchmarks: values and verdicts from made-up figures; the clients and the engine's side for real on a tiny model."""

from __future__ import annotations

import argparse
import asyncio
import io
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
if not (ROOT / "benchmarks" / "serving.py").exists():
    pytest.skip("the benchmarks are not part of the package", allow_module_level=True)
sys.path.append(str(ROOT))

from benchmarks import edits, load, measure_serving, offline, prompts, run, tables  # noqa: E402
from benchmarks.deepseek import DEEPSEEK  # noqa: E402
from benchmarks.long_context import LONG  # noqa: E402
from benchmarks.serving import HTTP, OFFLINE, SERVING, VLLM, Claim, Serving, Side  # noqa: E402
from benchmarks.speculation import SPECULATION  # noqa: E402
from benchmarks.spine import SPINE  # noqa: E402
from benchmarks.standing import STANDING  # noqa: E402
from benchmarks.verdict import MISSED, REACHED  # noqa: E402

from support.fake_engine import FakeEngine  # noqa: E402
from support.live_server import LiveServer  # noqa: E402

FACTS = {"cpu": "A CPU", "threads": 2, "date": "2026-01-01", "rounds": 3}
ROW = Serving(
    "row", "A row", {"a": Side(OFFLINE, "throughput"), "b": Side(HTTP, "throughput")},
    (
        Claim("faster", ("b", "output_tok_s"), ("a", "output_tok_s"), least=0.85),
        Claim("later", ("b", "ttft_ms"), ("a", "ttft_ms"), most=15, difference=True),
        Claim("shown", ("b", "held"), ("b", "proposed")),
    ),
)  # fmt: skip


def test_the_rows_are_well_formed():
    names = [row.name for row in (*STANDING, *DEEPSEEK, *LONG, *SPINE, *SPECULATION, *SERVING)]
    assert len(set(names)) == len(names)
    known = {OFFLINE: offline.MEASURES, HTTP: load.MEASURES, VLLM: {"throughput": None}}
    for row in SERVING:
        assert all(claim.of[0] in row.sides and claim.against[0] in row.sides for claim in row.claims)
        assert all(side.what in known[side.where] for side in row.sides.values())
        assert all(side.numbers.get("new", 8) <= 8 and side.numbers["repeats"] == 1 for side in row.quick().sides.values())
    asked = [claim.asked for row in SERVING for claim in row.claims if claim.asked]
    assert asked == [
        "at least 0.85x", "at least 3x", "at most 15 ms", "at most 4x", "at most 4x", "at least 1.8x", "at least 0.7x",
        "at least 0.97x", "at least 0.97x",
    ]  # fmt: skip


def test_sides_alternate_and_rounds_are_judged_separately(monkeypatch):
    names = ("output_tok_s", "ttft_ms", "held", "proposed")
    given = {
        "a": [dict(zip(names[:2], values, strict=True)) for values in ((100, 10), (200, 10), (100, 10))],
        "b": [dict(zip(names, values, strict=True)) for values in ((90, 20, 1, 2), (160, 30, 1, 0), (84, 24, 1, 4))],
    }
    order = []

    def figures(side, turn, threads):
        label = "a" if side.where == OFFLINE else "b"
        order.append((turn, label))
        return given[label][turn]

    monkeypatch.setattr(measure_serving, "figures", figures)
    entry = measure_serving.measure(ROW, threads=2, rounds=3, note=lambda text: None)
    assert order == [(turn, label) for turn in range(3) for label in "ab"]
    faster, later, shown = entry["claims"]
    assert (faster["lowest"], faster["value"], faster["highest"], faster["verdict"]) == (0.8, 0.84, 0.9, MISSED)
    assert (faster["against"], faster["of"], faster["unit"]) == (100, 90, "tok/s")
    assert (later["value"], later["lowest"], later["highest"], later["verdict"]) == (14.0, 10.0, 20.0, REACHED)
    assert (shown["value"], shown["verdict"]) == (0.25, None)
    lines = measure_serving.lines(entry)
    assert "100.0 tok/s -> 90.00 tok/s" in lines[1] and lines[1].endswith("0.84x (0.80 - 0.90), at least 0.85x: missed")
    assert lines[2].endswith("+14.00 ms (+10.00 - +20.00), at most 15 ms: reached") and lines[3].endswith("(0.00 - 0.50)")


def test_all_sides_of_a_round_get_the_same_requests(monkeypatch):
    commands = []

    class Server:
        port = 5

        def __init__(self, path, *options):
            commands.append(["serve", str(path), *options])

        def __enter__(self):
            return self

        def __exit__(self, *_):
            commands.append(["stop"])

    monkeypatch.setattr(measure_serving, "Served", Server)
    monkeypatch.setattr(measure_serving, "run_json", lambda command: commands.append(command) or {"x": 1.0})
    monkeypatch.setattr(measure_serving, "model", lambda name, form: Path(f"{name}.{form}"))
    numbers = {"batch": 3, "prompt": 5}
    for side in (
        Side(OFFLINE, "prefill", "bf16", ("--no-drafts",), numbers),
        Side(HTTP, "stall", options=("--no-drafts",), numbers=numbers),
    ):
        assert measure_serving.figures(side, 2, 7) == {"x": 1.0}
    ours, serve, clients, stop = commands
    same = ["--seed", "201", "--batch", "3", "--prompt", "5"]
    assert ours[1:] == ["-m", "benchmarks.offline", "prefill", "smol.bf16", "--threads", "7", "--no-drafts", *same]
    assert serve == ["serve", "smol.int4", "--threads", "7", "--no-drafts"] and stop == ["stop"]
    assert clients[1:] == ["-m", "benchmarks.load", "stall", "--port", "5", "--vocabulary", "49152", *same]


def test_the_table_is_followed_by_windows():
    claim = {
        "title": "faster", "against": 100.0, "of": 90.0, "unit": "tok/s", "value": 0.9, "lowest": 0.8, "highest": 1.0,
        "difference": False, "asked": "at least 0.85x", "verdict": REACHED,
    }  # fmt: skip
    first = SERVING[0]
    window = {
        "title": "W", "read": 10_240, "perplexity": 27.41, "fresh_perplexity": 27.4, "perplexity_ratio": 1.0003,
        "max_blocks": 32, "window_blocks": 32, "verdict": REACHED,
    }  # fmt: skip
    pinned = {**window, "code_nats_pinned": 0.5, "code_nats_dropped": 4.0}
    entries = {first.name: {**FACTS, "title": first.title, "sides": {}, "claims": [claim]}}
    lines = list(tables.serving_table(entries, {"w": window, "p": pinned}))
    assert lines[0].startswith("A CPU, 2 threads")
    assert f"| {first.title}: faster | 100.0 tok/s | 90.00 tok/s | 0.90x (0.80 - 1.00) | at least 0.85x | reached |" in lines
    assert sum(line.endswith("| not measured |") for line in lines) == len(SERVING) - 1
    assert lines[-2].startswith("| window: W, 10,240 read") and "1.000x; 32 of 32 blocks |" in lines[-2]
    assert "a pinned string 0.5 nats per token, dropped 4.0" in lines[-1] and lines[-1].endswith("| reached |")


def test_run_knows_the_rows(monkeypatch, tmp_path, capsys):
    entry = {"title": "T", "sides": {}, "claims": []}
    monkeypatch.setattr(run.measure_serving, "measure", lambda row, **options: entry)
    monkeypatch.setattr(run, "read_gb_s", lambda *_: 50.0)
    monkeypatch.setattr(sys, "argv", ["run", "serve-16", "--results", str(tmp_path)])
    run.main()
    assert run.results.read("serving", tmp_path)["serve-16"]["title"] == "T" and "T" in capsys.readouterr().out


def test_requests_of_clients():
    assert prompts.random_prompts(1, 2, 5, 100) == prompts.random_prompts(1, 2, 5, 100) != prompts.random_prompts(2, 2, 5, 100)
    asked = [messages[0]["content"] for messages in prompts.chats(3, 26)]
    assert len(set(asked)) == 26 and asked == [messages[0]["content"] for messages in prompts.chats(3, 26)]
    for (messages, before), (text, changes) in zip(edits.edits(), edits.EDITS, strict=True):
        assert [m["role"] for m in messages] == ["user", "assistant"] * 2 + ["user"] and text in messages[0]["content"]
        assert all(old in text for old, _ in changes)
        assert messages[3]["content"] == before and changes[2][0] in before
        assert changes[0][0] not in before and changes[1][1] in before
    assert edits.kept("a b c d", "a b x d") == (3, 4) and edits.kept("a", "") == (0, 0)


def test_gaps_count_in_the_interval_in_which_they_end():
    streams = [[0.0, 1.0, 1.5, 4.0], [0.9, 3.0]]
    assert load._gaps(streams, [(0.5, 2.0)]) == [1000.0, 500.0]
    assert load._gaps(streams, [(0.0, 1.0), (3.5, 9.0)]) == [1000.0, 2500.0]


@pytest.fixture(scope="module")
def engine(tiny_model):
    """The engine's side on the tiny model."""
    return offline._engine(argparse.Namespace(model=tiny_model, threads=1, fields={"precision": "int8"}, no_drafts=False))


def asked(**numbers) -> argparse.Namespace:
    return argparse.Namespace(**{"seed": 1, "prompt": 12, "new": 6, "batch": 3, "repeats": 2, "temperature": 0.0, **numbers})


def test_the_engines_side_for_real(engine, monkeypatch, capsys):
    monkeypatch.setattr(offline, "PAUSE", 0.0)
    assert offline.throughput(asked(), engine)["output_tok_s"] > 0
    monkeypatch.setattr(sys, "stdin", io.StringIO("1\n2\n"))
    assert offline.batches(asked(), engine) == {}
    assert all(float(line) > 0 for line in capsys.readouterr().out.splitlines()[-2:])
    assert offline.prefill(asked(), engine)["prefill_tok_s"] > 0
    actual = offline.first(asked(), engine)
    assert 0 < actual["ttft_ms"] <= actual["ttft_p90_ms"]
    actual = offline.question(asked(new=60, temperature=0.7), engine)
    assert actual["plain_tok_s"] > 0 and actual["drafts_tok_s"] > 0 and 0 <= actual["held"] <= actual["proposed"]
    assert actual["steps"] <= actual["tokens"]


def test_drafts_that_change_the_text_are_detected(engine, monkeypatch):
    monkeypatch.setattr(offline, "_timed", lambda engine, prompt, params, drafts: (1, [65 + drafts], 1, 1.0))
    with pytest.raises(SystemExit, match="not the plain one"):
        offline.question(asked(), engine)


def test_first_token_for_real(byte_tokenizer, monkeypatch):
    monkeypatch.setattr(load, "PAUSE", 0.0)
    with LiveServer(FakeEngine(byte_tokenizer, step_seconds=0.005)) as live:
        actual = asyncio.run(load.first(asked(port=live.port)))
    assert 5 <= actual["ttft_ms"] <= actual["ttft_p90_ms"]
    with LiveServer(FakeEngine(byte_tokenizer, script=lambda request: "")) as live:
        with pytest.raises(SystemExit, match="no answer"):
            asyncio.run(load.first(asked(port=live.port)))


def test_clients_for_real(tiny_model, monkeypatch):
    from transformers import AutoTokenizer

    from deepseek_optimizer import load_model
    from deepseek_optimizer.serving import make_async_engine

    monkeypatch.setattr(load, "LONGEST", 190)
    model = load_model(tiny_model, precision="int8", threads=1, kv_cache_memory=1 << 24)
    engine = make_async_engine(model, AutoTokenizer.from_pretrained(tiny_model), drafts=False)
    step = engine.core.step

    def slow_step():
        time.sleep(0.004)
        return step()

    monkeypatch.setattr(engine.core, "step", slow_step)
    with LiveServer(engine) as live:
        a = asked(port=live.port, vocabulary=250, seconds=0.1, prompt=150)
        assert asyncio.run(load.throughput(a))["output_tok_s"] > 0
        actual = asyncio.run(load.stall(a))
        assert 4 <= actual["idle_p50_ms"] <= actual["idle_p99_ms"] and actual["busy_gaps"] > 0 and actual["long_prompt_ms"] >= 2
        with pytest.raises(SystemExit, match="400"):
            asyncio.run(load.throughput(asked(port=live.port, vocabulary=250, prompt=5000)))
        monkeypatch.setattr(load, "LONGEST", 3)
        with pytest.raises(SystemExit, match="ended while it was watched"):
            asyncio.run(load.stall(a))
