"""The benchmark set: verdicts from made-up figures, GGUF files read back, results and the README's tables."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[2]
if not (ROOT / "benchmarks" / "standing.py").exists():
    pytest.skip("the benchmarks are not part of the package", allow_module_level=True)
sys.path.append(str(ROOT))

from benchmarks import gguf_file, gguf_shapes, measure, models, reads, results, run, spine, tables, verdict  # noqa: E402
from benchmarks.deepseek import DEEPSEEK  # noqa: E402
from benchmarks.long_context import LONG  # noqa: E402
from benchmarks.standing import DECODE, STANDING, Bar, Rival, Row  # noqa: E402

from deepseek_optimizer.bench.memory_traffic import Reads  # noqa: E402
from deepseek_optimizer.bench.metrics import METRICS  # noqa: E402
from deepseek_optimizer.bench.peers import PEERS  # noqa: E402
from deepseek_optimizer.bench.unoptimized_model import load_unoptimized  # noqa: E402
from deepseek_optimizer.bench.work import Work  # noqa: E402

FAST, SLOW = Rival("a", "x", "fast"), Rival("b", "x", "slow")
ROW = Row("row", "A row", "smol", Work(10, 3), DECODE, (Bar((SLOW, FAST), 1.5, 2.0), Bar((SLOW,), 4.0)))
OURS = ROW.ours.label


def _rounds(*speeds):
    return [{DECODE: speed} for speed in speeds]


FOUND = {"fast": _rounds(10, 20, 10), "slow": _rounds(5, 5, 5), OURS: _rounds(15, 26, 17)}


def test_the_set_is_well_formed():
    names = [row.name for row in STANDING] + [c.name for c in spine.SPINE]
    assert len(set(names)) == len(names)
    for row in (*STANDING, *DEEPSEEK, *LONG):
        assert METRICS[row.figure].more_is_better and row.model in models.TITLES
        assert all(rival.engine in {*PEERS, "ours"} for rival in row.rivals)
        assert len({side.label for side in (*row.rivals, row.ours)}) == len(row.rivals) + 1
        assert row.figure != DECODE or row.work.new > 1 and row.work.batch == 1
        assert all(bar.reach is None or bar.reach > bar.at_least for bar in row.bars)
        quick = row.quick()
        assert quick.work.prompt <= 32 and quick.work.new <= 4 and quick.work.batch == row.work.batch


def test_ratios_are_per_round_to_the_faster_side():
    first, second = verdict.judge(ROW, FOUND, OURS, {})
    assert (first["against"], first["lowest"], first["better"], first["highest"]) == ("fast", 1.3, 1.5, 1.7)
    assert (second["against"], second["better"]) == ("slow", 3.4)
    assert (first["verdict"], second["verdict"]) == (verdict.REACHED, verdict.MISSED)


@pytest.mark.parametrize(
    "machine_gb_s, expected",
    [
        (10.0, verdict.MISSED),  # 85% of it are 85 tokens/s, 17 times the slow side's: more than the target of 4
        (2.1, verdict.MISSED),  # 17.85 tokens/s: 3.57 times, which our side does not reach
        (1.9, verdict.LIMITED),  # 16.15: 3.23 times, and our side has 3.4
    ],
)
def test_targets_do_not_exceed_the_machine(machine_gb_s, expected):
    read = {OURS: verdict.share(1e8, [17.0], [machine_gb_s])}
    judged = verdict.judge(ROW, FOUND, OURS, read)[1]
    assert judged["verdict"] == expected
    assert judged["allowed"] == pytest.approx(0.85 * machine_gb_s * 1e9 / 1e8 / 5)


def test_targets_may_be_a_share_of_the_bandwidth():
    row = replace(ROW, bars=(Bar((SLOW,), 1.0),), read_percent=85)
    for machine, expected in ((1.9, verdict.REACHED), (2.1, verdict.MISSED)):
        (judged,) = verdict.judge(row, FOUND, OURS, {OURS: verdict.share(1e8, [17.0], [machine])})
        assert judged["verdict"] == expected
    assert verdict.share(1e8, [10.0, 17.0, 20.0], [4.0, 2.0, 2.0]) == {
        "token_bytes": 1e8, "read_gb_s": pytest.approx(1.7), "machine_gb_s": 2.0, "percent": pytest.approx(85),
    }  # fmt: skip


def test_a_row_alternates_sides_on_their_own_formats(monkeypatch):
    row = next(row for row in STANDING if row.name == "smol-decode")
    seen = {}

    def alternate(commands, rounds, note, run):
        seen.update(commands, rounds=rounds)
        for label in [*commands] * rounds:
            assert run(label, commands[label]) == printed[label]
        return {label: _rounds(*[30.0 + place] * rounds) for place, label in enumerate(commands)}

    sizes = []
    speeds = iter([50.0, 45.0, 50.0, 60.0, 30.0, 40.0] * 3)  # before and after each side
    printed = {"llama.cpp Q4_0": {"runs": []}, "llama.cpp Q4_1": {"runs": [1]}, "ours int4": {"own_read_gb_s": 35.0}}
    monkeypatch.setattr(
        measure, "run_json", lambda command: printed[next(k for k, own in seen.items() if k != "rounds" and own == command)]
    )
    monkeypatch.setattr(measure, "model", lambda name, form: Path(f"{name}.{form}.gguf"))
    monkeypatch.setattr(measure, "setup", lambda peer: Path(f"/{peer.name}/python"))
    monkeypatch.setattr(measure, "alternate", alternate)
    monkeypatch.setattr(measure, "read_gb_s", lambda size, threads, seconds: sizes.append(size) or next(speeds))
    monkeypatch.setattr(measure.reads, "of_gguf", lambda path: Reads(7 * 10**7 if "Q4_0" in str(path) else 8 * 10**7, 1000))
    monkeypatch.setattr(measure.reads, "of_ours", lambda path, fields: Reads(6 * 10**7, 1000))
    entry = measure.measure(row, threads=2, rounds=3, note=print)
    labels = ["llama.cpp Q4_0", "llama.cpp Q4_1", "ours int4"]
    assert list(entry["sides"]) == labels and seen["rounds"] == 3
    assert seen["llama.cpp Q4_1"][0] == "/llama.cpp/python" and "smol.Q4_1.gguf" in seen["llama.cpp Q4_1"]
    assert seen["ours int4"][:2] == [sys.executable, "-m"] and "smol.int4.gguf" in seen["ours int4"]
    context = 1000 * (512 + 65 / 2)
    assert sizes == [size * 10**7 + context for size in (7, 7, 8, 8, 6, 6)] * 3
    assert [entry["read"][label]["machine_gb_s"] for label in labels] == [50, 60, 35]  # the larger of two; its own weights'
    assert "--beside" in seen["ours int4"] and "--beside" not in seen["llama.cpp Q4_1"]
    assert entry["bars"][0]["against"] == "llama.cpp Q4_1" and entry["bars"][0]["better"] == pytest.approx(32 / 31)
    json.dumps(entry)


def test_a_busy_row_is_compared_with_itself_on_an_idle_machine(monkeypatch):
    row = next(row for row in STANDING if row.busy)
    monkeypatch.setattr(measure, "model", lambda name, form: Path("m"))
    alone, busy = (measure._command(row, side, 2) for side in (*row.rivals, row.ours))
    assert busy[:3] == [sys.executable, "-m", "benchmarks.neighbor"] and busy[3:] == alone
    assert "--beside" not in alone


def test_the_background_load_runs_and_ends(tmp_path):
    code = (
        "import subprocess, time; time.sleep(0.5); from pathlib import Path\n"
        "parent = Path('/proc/self/status').read_text().split('PPid:')[1].split()[0]\n"
        "children = Path(f'/proc/{parent}/task/{parent}/children').read_text().split()\n"
        "cpu = {c: sum(map(int, Path(f'/proc/{c}/stat').read_text().split()[13:15])) for c in children}\n"
        "print(max(cpu, key=cpu.get), max(cpu.values()))"
    )
    command = [sys.executable, "-m", "benchmarks.neighbor", sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    process, ticks = map(int, done.stdout.split())
    assert done.returncode == 0 and ticks >= 5 and not Path(f"/proc/{process}").exists()
    assert subprocess.run([*command[:3], "false"], cwd=ROOT).returncode == 1


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def checkpoint(request, tmp_path, byte_tokenizer):
    """Llama with a tied head, Qwen2 with a separate one and biases: saved by Transformers, and loaded."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config_class, model_class = (LlamaConfig, LlamaForCausalLM) if request.param else (Qwen2Config, Qwen2ForCausalLM)
    config = config_class(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=320,
        max_position_embeddings=64, tie_word_embeddings=request.param,
        rope_parameters={"rope_type": "default", "rope_theta": 777.0},
    )  # fmt: skip
    model = model_class(config).eval()
    for name, p in model.named_parameters():
        torch.nn.init.normal_(p, 1 if "norm" in name else 0, 0.2)
    model.save_pretrained(tmp_path / "plain")
    return tmp_path / "plain", model


def test_a_gguf_file_is_the_same_model(checkpoint, tmp_path):
    """Loaded by Transformers, which undoes llama.cpp's order of rows: names, order and config."""
    import torch

    source, model = checkpoint
    path = tmp_path / "m.gguf"
    gguf_file.write(source, path, "Q8_0")
    back = load_unoptimized(path, torch.float32)
    fields = ("hidden_size", "num_hidden_layers", "num_key_value_heads", "vocab_size", "tie_word_embeddings")
    assert [getattr(back.config, f) for f in fields] == [getattr(model.config, f) for f in fields]
    assert back.config.rope_parameters["rope_theta"] == 777 and back.config.rms_norm_eps == pytest.approx(1e-6)
    actual = back.state_dict()
    assert actual.keys() == model.state_dict().keys()
    for name, values in model.state_dict().items():
        worst = values.abs().max() / 127 * 0.51 if values.ndim == 2 else 1e-6  # half a step of the coarsest block
        assert (actual[name] - values).abs().max() <= worst, name


def test_what_llama_cpp_reads(checkpoint, tmp_path):
    source, model = checkpoint
    path = tmp_path / "m.gguf"
    gguf_file.write(source, path, "Q4_0")
    layer = 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 96
    assert reads.of_gguf(path) == Reads((2 * layer + 320 * 64) // 32 * 18, 2 * 2 * 2 * 2 * 16)


@pytest.mark.parametrize(
    "name, layer, layers, window, states",
    [
        ("qwen3.5-4b", 4 * 4 * 256, 8, (), 24 * (32 * 128 * 128 + 3 * 8192)),
        ("gemma-3-4b", 4 * 4 * 256, 5, (29, 1024), 0),
        ("qwen3-30b-a3b", 4 * 4 * 128, 16, (), 0),
        ("gpt-oss-20b", 4 * 8 * 64, 6, (6, 128), 0),
    ],
)
def test_what_llama_cpp_reads_of_current_families(monkeypatch, name, layer, layers, window, states):
    """Only some layers keep keys and values, or all of them."""
    import gguf

    shape = gguf_shapes.SHAPES[name]
    tensors = [
        SimpleNamespace(name=tensor, shape=sizes[::-1], n_bytes=math.prod(sizes)) for tensor, sizes, _ in shape.tensors()
    ]
    values = {f"{shape.arch}.{key}": value for key, value in shape.keys.items()} | {"general.architecture": shape.arch}
    fields = {key: SimpleNamespace(contents=lambda value=value: value) for key, value in values.items()}
    reader = SimpleNamespace(tensors=tensors, fields=fields, get_field=fields.get)
    monkeypatch.setattr(gguf, "GGUFReader", lambda path: reader)
    actual = reads.of_gguf(Path("m.gguf"))
    assert (actual.kv_bytes, actual.state_bytes) == (layer * layers, 4 * states)
    assert actual.windows == (((float(layer * window[0]), window[1]),) if window else ())


def test_a_failed_model_leaves_no_files(tmp_path):
    def half(target):
        target.write_text("half")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        models._once(tmp_path / "m", half)
    assert models._once(tmp_path / "m", lambda target: target.write_text("whole")).read_text() == "whole"
    assert models._once(tmp_path / "m", half).read_text() == "whole" and len(list(tmp_path.iterdir())) == 1


def test_results_are_merged_by_name(tmp_path):
    results.merge("standing", {"a": {"v": 1}, "b": {"v": 2}}, tmp_path)
    results.merge("standing", {"b": {"v": 3}}, tmp_path)
    assert results.read("standing", tmp_path) == {"a": {"v": 1}, "b": {"v": 3}} and results.read("spine", tmp_path) == {}


def test_rows_are_written_as_they_finish(monkeypatch, tmp_path, capsys):
    entry = {"title": "T", "work": {}, "figure": DECODE, "sides": {"x": [1.0], "ours": [2.0]}, "read": {}, "bars": []}

    def measured(row, **options):
        if row.name == "r1q15-decode":
            raise RuntimeError("a side failed")
        return entry

    monkeypatch.setattr(run.measure, "measure", measured)
    monkeypatch.setattr(run, "read_gb_s", lambda *_: 50.0)
    monkeypatch.setattr(sys, "argv", ["run", "smol-decode", "r1q15-decode", "--results", str(tmp_path)])
    with pytest.raises(RuntimeError):
        run.main()
    (actual,) = results.read("standing", tmp_path).values()
    assert actual["sides"] == entry["sides"] and actual["rounds"] == 3 and actual["read_gb_s"] == {"76 MB": 50, "900 MB": 50}
    assert "2.00 tok/s" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["run", "nothing"])
    with pytest.raises(SystemExit):
        run.main()


def test_tables():
    row = STANDING[0]
    sides = {"llama.cpp Q4_0": [200.0, 210.0, 220.0], "llama.cpp Q4_1": [150.0] * 3, "ours int4": [400.0] * 3}
    actual = {label: _rounds(*speeds) for label, speeds in sides.items()}
    read = {label: verdict.share(8e7, [400.0], [80.0]) for label in ("llama.cpp Q4_0", "ours int4")}
    facts = {"cpu": "A CPU", "threads": 2, "date": "2026-01-01", "rounds": 3}
    entry = {**facts, "title": row.title, "figure": DECODE, "sides": sides, "read": read}
    lines = list(tables.standing_table({row.name: {**entry, "bars": verdict.judge(row, actual, "ours int4", read)}}))
    assert lines[0] == "A CPU, 2 threads, 2026-01-01: medians of 3 rounds, engines taking turns."
    cells = "| 210.0 tok/s | 400.0 tok/s | 1.90x (1.82 - 2.00) | 1.5x | 80 MB, 40%; 80 MB, 40% | reached |"
    assert lines[4] == f"| {row.title} | llama.cpp Q4_0 {cells}"
    assert len(lines) == 4 + sum(len(row.bars) for row in STANDING) and lines[5].endswith("| not measured |")


@pytest.mark.parametrize("page", tables.PAGES, ids=lambda page: page.name)
def test_pages_match_the_results(page):
    text = page.read_text(encoding="utf-8")
    assert "<!-- bench:" in text and tables.filled(text) == text
    emptied = re.sub(r"(<!-- bench:\w+ -->\n).*?(<!-- /bench -->)", r"\1\2", text, flags=re.DOTALL)
    assert emptied != text and tables.filled(emptied) == text
