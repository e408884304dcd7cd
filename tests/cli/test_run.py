"""`dso run`: only the generated text goes to stdout."""

from __future__ import annotations

import json
import signal

import pytest
import torch

from deepseek_optimizer import load_model, make_engine
from deepseek_optimizer.backends.cpu import unavailable_reason
from deepseek_optimizer.chat import loading, stream


def test_json_and_text_agree(dso, tiny_model):
    plain = dso("run", tiny_model, "Hello", "-t", "0", "-n", "8")
    assert plain.exit_code == 0, plain.stderr
    facts = json.loads(dso("run", tiny_model, "Hello", "-t", "0", "-n", "8", "--json").stdout)
    assert facts["text"] + "\n" == plain.stdout
    assert facts["finish_reason"] in ("stop", "length") and 1 <= facts["new_tokens"] <= 8
    assert facts["prompt_tokens"] == len("Hello") + 3  # <|user|>, <|end|>, <|assistant|>
    assert facts["load_s"] > 0 and facts["first_token_s"] > 0


def test_a_seed_makes_sampling_repeatable(dso, tiny_model):
    texts = [dso("run", tiny_model, "Hi", "-t", "2", "--seed", seed, "-n", "24", "--json").stdout for seed in (7, 7, 8)]
    first, again, other = (json.loads(text)["text"] for text in texts)
    assert first == again != other


@pytest.mark.parametrize("chosen", [("--draft-precision", "int8"), ("--draft-model", "itself")])
def test_a_draft_model_gives_the_same_text(dso, tiny_model, chosen, monkeypatch):
    engines = []
    monkeypatch.setattr("deepseek_optimizer.make_engine", lambda *a, **f: engines.append(make_engine(*a, **f)) or engines[-1])
    command = ["run", tiny_model, "Hello", "-t", "0", "-n", "60"]
    plain = dso(*command)
    flag, value = chosen
    drafted = dso(*command, flag, str(tiny_model) if value == "itself" else value)
    assert drafted.exit_code == 0, drafted.stderr
    assert drafted.stdout == plain.stdout
    names = [[proposer.name for proposer, _ in engine.core.drafting._proposers] for engine in engines]
    assert "draft_model" not in names[0] and "draft_model" in names[1]


def test_prompt_from_standard_input_raw_and_system(dso, tiny_model):
    facts = json.loads(dso("run", tiny_model, "-", "--raw", "--json", "-n", "2", input="Hello").stdout)
    assert facts["prompt_tokens"] == len("Hello")
    facts = json.loads(dso("run", tiny_model, "Hello", "--system", "Be", "--json", "-n", "2").stdout)
    assert facts["prompt_tokens"] == len("Hello") + len("Be") + 5


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
@pytest.mark.parametrize("command", [("run", "Hello"), ("chat",), ("serve",)])
def test_a_device_that_is_not_there(dso, tiny_model, command):
    name, *prompt = command
    result = dso(name, tiny_model, *prompt, "--device", "cuda")
    assert result.exit_code == 2 and "device='cuda' is a CUDA device, but none is available; use device=" in result.stderr


@pytest.mark.parametrize("kind", ["yarn", "dynamic"])
def test_a_context_beyond_the_trained_length(dso, tiny_model, kind):
    prompt = "x" * 300  # the model was trained for 256 tokens
    result = dso("run", tiny_model, prompt, "-n", "8", "--json", "--context-extension", kind, "--context-length", "512")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["prompt_tokens"] == 303


@pytest.mark.parametrize(
    ("options", "mode"),
    [
        (("--attention", "sliding", "--attention-window", "32"), ("sliding", 32, 4)),
        (("--attention", "sparse", "--attention-window", "16", "--attention-budget", "128"), ("sparse", 16, 4)),
    ],
)
def test_attention_modes(dso, tiny_model, options, mode, monkeypatch):
    loaded = []
    monkeypatch.setattr(loading, "load_model", lambda *a, **f: loaded.append(load_model(*a, **f)) or loaded[-1])
    result = dso("run", tiny_model, "x" * 200, "-n", "8", "--json", *options)
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["prompt_tokens"] > 200
    actual = loaded[0].report().attention
    assert (actual.mode, actual.window, actual.sinks) == mode and actual.layers


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["  "], "prompt is empty"),
        (["x" * 300], "no room in the model's context"),
        (["Hi", "--precision", "int5"], "precision must be one of"),
        (["Hi", "--kv-cache", "bf17"], "kv_cache must be one of"),
        (["Hi", "--attention", "slide"], "attention_optimization must be one of"),
        (["Hi", "--attention", "sparse", "--attention-budget", "100"], "attention_budget"),
        (["Hi", "--context-extension", "ntk", "--context-length", "512"], "context_extension must be one of"),
        (["Hi", "--context-extension", "yarn"], "needs context_length"),
        (["Hi", "--context-length", "512"], "needs context_extension"),
        (["Hi", "--context-extension", "yarn", "--context-length", "256"], "the 256 tokens the model was trained for"),
        (["Hi", "--temperature", "nan"], "temperature"),
        (["Hi", "--top-p", "1.5"], "top_p"),
    ],
)
def test_bad_arguments_are_one_line(dso, tiny_model, arguments, message):
    result = dso("run", tiny_model, *arguments)
    assert result.exit_code == 2 and result.stdout == ""
    *notes, last = result.stderr.splitlines()
    assert last.startswith("dso: ") and message in last and all("reference backend" in note for note in notes)


def test_interrupt_ends_the_answer_with_code_130(dso, endless_model, monkeypatch):
    def write(text):
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(stream, "write_now", write)
    before = signal.getsignal(signal.SIGINT)
    result = dso("run", endless_model, "Hello", "-t", "2", "--seed", "1", "-n", "200")
    assert result.exit_code == 130 and "Traceback" not in result.output
    assert signal.getsignal(signal.SIGINT) is before


def test_piped_output_is_only_the_answer(dso_process, tiny_model):
    done = dso_process("run", tiny_model, "Hello", "-t", "0", "-n", "8")
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("\n") and "\x1b" not in done.stdout + done.stderr
    assert "%" not in done.stderr  # no progress bar


@pytest.mark.skipif(unavailable_reason() is not None, reason="needs the native backend")
def test_several_processes_give_the_same_text(dso, tiny_model):
    command = ["run", tiny_model, "Hello", "-t", "0", "-n", "12", "--threads", "1"]
    plain, divided = dso(*command), dso(*command, "--tensor-parallel", "2")
    assert divided.exit_code == 0, divided.stderr
    assert divided.stdout == plain.stdout
    refused = dso(*command, "--tensor-parallel", "3")
    assert refused.exit_code == 2 and "tensor=3 does not divide the model's 2 key and value heads" in refused.stderr
