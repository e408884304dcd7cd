"""Alternating sides, ratios, peers and their environments; and the gain of each fusion rule."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from deepseek_optimizer.bench import against
from deepseek_optimizer.bench.ablation import ablate, variants
from deepseek_optimizer.bench.peers import PEERS, environments, get_peer
from deepseek_optimizer.bench.work import Work
from deepseek_optimizer.errors import BackendError, ConfigError

WORK = Work(7, 5, batch=2)


def _side(log: Path, name: str, ttft: float) -> list[str]:
    result = {
        "load_s": 2.0,
        "memory_bytes": None,
        "runs": [{"prompt": 10, "batch": 1, "times": [ttft, 2 * ttft], "generated": 2}],
    }
    code = f"open({str(log)!r}, 'a').write({name!r}); print('noise'); print({json.dumps(result)!r})"
    return [sys.executable, "-c", code]


def test_sides_alternate(tmp_path):
    log, notes = tmp_path / "log", []
    actual = against.alternate({"a": _side(log, "a", 0.5), "b": _side(log, "b", 0.25)}, 3, notes.append)
    assert log.read_text() == "ababab" and notes[0] == "round 1 of 3: a" and len(notes) == 6
    assert [v["ttft_ms"] for v in actual["b"]] == [250] * 3
    assert actual["a"][0]["load_s"] == 2 and "memory_bytes" not in actual["a"][0]
    rows = against.ratio_rows(actual, "a", ["prefill_tok_s", "memory_bytes"])
    assert [(r["name"], r["figure"], r["better"]) for r in rows] == [("b", "prefill_tok_s", 2.0)]


def test_ratios_are_per_round_and_above_one_is_better():
    theirs = [
        {"decode_tok_s": 10.0, "ttft_ms": 10.0},
        {"decode_tok_s": 20.0, "ttft_ms": 20.0},
        {"decode_tok_s": 10.0, "ttft_ms": 5.0},
    ]
    ours = [
        {"decode_tok_s": 20.0, "ttft_ms": 5.0},
        {"decode_tok_s": 30.0, "ttft_ms": 5.0},
        {"decode_tok_s": 30.0, "ttft_ms": 10.0},
    ]
    row = against.ratio_row("decode_tok_s", theirs, ours)
    assert (row["baseline"], row["side"]) == (10, 30)
    assert (row["lowest"], row["better"], row["highest"]) == (1.5, 2, 3)
    row = against.ratio_row("ttft_ms", theirs, ours)
    assert (row["lowest"], row["better"], row["highest"]) == (0.5, 2, 4)


def test_a_side_that_fails_is_an_error_with_its_output():
    with pytest.raises(BackendError, match="^went wrong .exit code 1 of: ") as caught:
        against.run_json([sys.executable, "-c", "raise SystemExit('first\\nwent wrong')"])
    assert "first" in str(caught.value.__cause__)


@pytest.mark.parametrize("side", ["transformers", "optimized"])
def test_the_model_side_prints_runs(tiny_model, side):
    command = [sys.executable, "-m", "deepseek_optimizer.bench.sides.model", side, tiny_model, "--threads", "1"]
    options = ["--prompt", "12", "--new", "3", "--batch", "2", "--repeats", "2", "--cold", "--config", '{"precision": "int8"}']
    result = against.run_json([*map(str, command), *options])
    assert [(r["prompt"], r["batch"], len(r["times"]), r["generated"]) for r in result["runs"]] == [(12, 2, 3, 6)] * 2
    values = against.values_of(result)
    assert 0 < values["load_s"] < values["to_first_token_s"] and values["decode_tok_s"] > 0


@pytest.fixture
def models(tmp_path):
    """Peer -> a path that looks like one of its models."""
    plain, exported, file = tmp_path / "plain", tmp_path / "exported", tmp_path / "m.gguf"
    for folder, name in ((plain, "config.json"), (exported, "openvino_model.xml")):
        folder.mkdir()
        (folder / name).write_text("{}")
    return {name: plain if name in ("transformers", "vllm") else exported if name == "openvino" else file for name in PEERS}


def _command(peer, model, work=WORK):
    return get_peer(peer).command(Path("/env/bin/python"), model, work, threads=4, repeats=6, warmup=1)


@pytest.mark.parametrize("name", PEERS)
def test_commands_of_peers(name, models):
    command = _command(name, models[name])
    python = sys.executable if name == "transformers" else "/env/bin/python"
    assert command[0] == python and str(models[name]) in command
    assert "--prompt 7 --new 5 --depth 0 --batch 2 --threads 4 --repeats 6 --warmup 1" in " ".join(command)


def test_unreadable_models_of_peers_name_the_remedy(models, tmp_path):
    with pytest.raises(ConfigError, match="transformers, llama.cpp"):
        get_peer("llama")
    for name in ("llama.cpp", "llama.cpp-avx2"):
        with pytest.raises(ConfigError, match=f"--peer-model {name}=FILE"):
            _command(name, models["vllm"])
    with pytest.raises(
        ConfigError, match="/env/bin/optimum-cli export openvino -m .*plain .*--weight-format int4.*openvino=OUT"
    ):
        _command("openvino", models["vllm"])
    packed = tmp_path / "packed"
    packed.mkdir()
    (packed / "config.json").write_text('{"quantization_config": {"quant_method": "deepseek_optimizer"}}')
    for name in ("transformers", "vllm"):
        with pytest.raises(ConfigError, match=f"{name} cannot read; .*--reference"):
            _command(name, packed)
        with pytest.raises(ConfigError, match=f"--peer-model {name}=DIR"):
            _command(name, models["openvino"])


@pytest.mark.parametrize("name", ["openvino", "vllm"])
def test_depth_is_rejected_for_engines_without_it(name, models):
    with pytest.raises(ConfigError, match=f"{name} cannot start with a filled cache"):
        _command(name, models[name], Work(7, 5, 3))


@pytest.fixture
def fake_venv(tmp_path, monkeypatch):
    """`setup(peer)` without pip: an interpreter that records its arguments and exits with a given code."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    state = {"code": 0, "calls": []}

    def create(target, clear, with_pip):
        (Path(target) / "bin").mkdir(parents=True, exist_ok=True)
        (Path(target) / "bin" / "python").touch()

    def run(command, env, **_):
        state["calls"].append((command, env))
        return subprocess.CompletedProcess(command, state["code"], "", "WARNING: x\nERROR: no compiler\n")

    monkeypatch.setattr(environments.venv, "create", create)
    monkeypatch.setattr(environments.subprocess, "run", run)
    return state


def test_environments_are_created_once(fake_venv, tmp_path):
    peer = PEERS["llama.cpp"]
    with pytest.raises(ConfigError, match="--setup-peers --against llama.cpp"):
        environments.interpreter(peer)
    python = environments.setup(peer)
    assert environments.setup(peer) == environments.interpreter(peer) == python and python.is_relative_to(tmp_path)
    ((command, env),) = fake_venv["calls"]
    assert list(peer.requirements) == command[-len(peer.requirements) :] and env["CMAKE_ARGS"] == "-DGGML_NATIVE=ON"
    assert environments.setup(PEERS["transformers"]) == Path(sys.executable)


def test_conflicting_packages_are_removed_and_builds_are_separate(fake_venv):
    environments.setup(PEERS["vllm"])
    actions = [command[3:] for command, _ in fake_venv["calls"]]
    assert actions[0] == ["install", "--quiet", *PEERS["vllm"].requirements]
    assert actions[1] == ["uninstall", "--quiet", "--yes", "torchaudio", "torchcodec"]
    assert len({environments.directory(peer) for peer in PEERS.values()}) == len(PEERS)


def test_failed_environments_are_not_reused(fake_venv):
    fake_venv["code"] = 1
    with pytest.raises(BackendError, match="llama.cpp: ERROR: no compiler"):
        environments.setup(PEERS["llama.cpp"])
    assert not environments.directory(PEERS["llama.cpp"]).exists()
    environments.directory(PEERS["llama.cpp"]).mkdir(parents=True)  # as left by a killed process
    with pytest.raises(ConfigError):
        environments.interpreter(PEERS["llama.cpp"])
    fake_venv["code"] = 0
    assert environments.setup(PEERS["llama.cpp"]).exists()


def test_variants():
    actual = variants(("a", "b"))
    assert actual == {"all rules": ("a", "b"), "without a": ("b",), "without b": ("a",), "no rules": ()}


def test_ablation_measures_every_rule_and_restores_the_model(optimized):
    import torch

    ids = torch.tensor([[5, 6, 7]])
    before = optimized.report().to_dict()
    expected = optimized.generate(ids, max_new_tokens=6, do_sample=False)
    seen = []
    rows = ablate(optimized, context=20, new=3, batches=(1, 2), rounds=2, note=seen.append)
    rules = before["config"]["fusion_rules"] or [row["rule"] for row in before["rules"]]
    names = ["all rules", *(f"without {r}" for r in rules), "no rules"]
    assert [(r["variant"], r["work"]["batch"], r["figure"]) for r in rows] == [
        (name, batch, figure) for name in names for batch in (1, 2) for figure in ("prefill_tok_s", "decode_tok_s")
    ]
    assert all(r["better"] == 1 for r in rows if r["variant"] == "all rules") and all(r["side"] > 0 for r in rows)
    assert [text.rpartition(": ")[2] for text in seen] == names * 2
    after = optimized.report().to_dict()
    assert (after["rules"], after["kernels"], after["config"]) == (before["rules"], before["kernels"], before["config"])
    assert torch.equal(optimized.generate(ids, max_new_tokens=6, do_sample=False), expected)


def test_ablation_without_rules_is_an_error(tiny_model):
    from deepseek_optimizer import load_model

    with pytest.raises(ConfigError, match="kernel_fusion=True"):
        ablate(load_model(tiny_model, kernel_fusion=False), context=8)
