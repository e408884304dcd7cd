"""Scripts that run in other engines' environments, with stand-ins for those engines: what they request and print."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from deepseek_optimizer.bench import sides
from deepseek_optimizer.bench.against import values_of

SCRIPTS = ["llama_cpp_side.py", "openvino_side.py", "vllm_side.py"]

OPENVINO = """
import numpy as np
Tensor = np.asarray
"""

# A step takes 10 ms on its own clock, the first 50; every call is recorded.
OPENVINO_GENAI = """
import json, sys
from types import SimpleNamespace as N
class LLMPipeline:
    def __init__(self, model, device, **options): print(json.dumps([model, device, options]), file=sys.stderr)
    def generate(self, inputs, options):
        batch, prompt = inputs[0].shape
        assert options.ignore_eos and not options.do_sample and options.min_new_tokens == options.max_new_tokens
        assert inputs[0].max() < 100 and inputs[1].all() and inputs[1].shape == inputs[0].shape
        print(json.dumps([batch, prompt, options.max_new_tokens]), file=sys.stderr)
        raw = N(m_times_to_first_token=[5e4] * batch, m_new_token_times=[7000 + 10 * i for i in range(options.max_new_tokens)])
        return N(tokens=[[1] * options.max_new_tokens] * batch, perf_metrics=N(raw_metrics=raw))
GenerationConfig = N
def TokenizedInputs(*given): return given
"""

# Sequences start one step after the other, so that the last one is later than the first.
VLLM = """
import json, os, sys, time
from types import SimpleNamespace as N
def SamplingParams(**options): return N(**options)
class LLM:
    def __init__(self, model, **options):
        bind = os.environ["VLLM_CPU_OMP_THREADS_BIND"].split(",")
        print(json.dumps([model, options, len(bind), os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"]]), file=sys.stderr)
        self.llm_engine, self.model_config, self.running, self.steps = self, N(get_vocab_size=lambda: 100), {}, 0
    def add_request(self, name, prompt, options):
        assert options.ignore_eos and options.temperature == 0 and options.min_tokens == options.max_tokens
        assert max(prompt["prompt_token_ids"]) < 100
        self.running[name], self.steps = [-len(self.running), options.max_tokens], 0
    def has_unfinished_requests(self): return bool(self.running)
    def step(self):
        print("a step's noise")
        time.sleep(0.01)
        outputs = []
        for name, state in list(self.running.items()):
            state[0] += 1
            if state[0] > 0: outputs.append(N(request_id=name, outputs=[N(token_ids=[1] * state[0])]))
            if state[0] == state[1]: del self.running[name]
        return outputs
"""


@pytest.mark.parametrize("name", SCRIPTS)
def test_foreign_scripts_do_not_import_this_package(name):
    script = Path(sides.__file__).with_name(name)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-S", script, "--help"]  # -S: no installed packages
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and "--prompt" in done.stdout
    assert "deepseek_optimizer" not in script.read_text()


@pytest.fixture
def side(tmp_path):
    """side(script, modules, options): the last output of the script, and the calls that the replacements recorded."""

    def run(script, modules, *options):
        for name, code in modules.items():
            (tmp_path / f"{name}.py").write_text(code)
        (tmp_path / "config.json").write_text('{"vocab_size": 100}')
        command = [sys.executable, str(Path(sides.__file__).with_name(script)), str(tmp_path), "--threads", "1", *options]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(tmp_path)})
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1]), [json.loads(line) for line in done.stderr.splitlines()]

    return run


WORK = ("--prompt", "12", "--new", "4", "--batch", "3", "--repeats", "2", "--warmup", "1")


def test_openvino(side, tmp_path):
    result, notes = side("openvino_side.py", {"openvino": OPENVINO, "openvino_genai": OPENVINO_GENAI}, *WORK)
    assert notes == [[str(tmp_path), "CPU", {"INFERENCE_NUM_THREADS": 1}], [1, 16, 1], [3, 12, 4], [3, 12, 4], [3, 12, 4]]
    assert [(r["prompt"], r["batch"], r["generated"]) for r in result["runs"]] == [(12, 3, 12)] * 2
    assert result["runs"][0]["times"] == pytest.approx([0.05, 0.06, 0.07, 0.08])
    values = values_of(result)
    assert values["decode_tok_s"] == pytest.approx(300) and values["memory_bytes"] > 0


def test_vllm_counts_a_step_when_the_last_sequence_has_its_token(side, tmp_path):
    result, notes = side("vllm_side.py", {"vllm": VLLM}, *WORK)
    options = {"dtype": "bfloat16", "max_model_len": 20, "enable_prefix_caching": False, "seed": 0}
    assert notes == [[str(tmp_path), options, 1, "0"]]
    assert [(r["prompt"], r["batch"], r["generated"]) for r in result["runs"]] == [(12, 3, 12)] * 2
    times = result["runs"][0]["times"]
    assert len(times) == 4 and times == sorted(times) and times[0] >= 0.03 and times[-1] >= 0.06
    assert "memory_bytes" not in values_of(result)
