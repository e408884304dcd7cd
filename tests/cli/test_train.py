"""`dso train`: from chats to a model that answers, and errors before a model is loaded."""

from __future__ import annotations

import json
import math
import shutil
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import deepseek_optimizer
from deepseek_optimizer.train.checkpoints import directory
from deepseek_optimizer.train.job import TrainingJob
from support.family_configs import deepseek_v4
from support.models import random_model
from support.quantized_files import SECTIONS, gptq, quantized_copy
from support.tiny_v3 import tiny_v3


@pytest.fixture
def chats(tmp_path):
    """Forty chats in which the assistant always gives the same answer."""
    file = tmp_path / "chats.jsonl"
    turns = [[{"role": "user", "content": f"count {i}"}, {"role": "assistant", "content": "one two"}] for i in range(40)]
    file.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in turns))
    return file


@pytest.fixture
def train(dso, tiny_model, tmp_path, monkeypatch):
    """train(*flags) -> typer's result of training the tiny model into tmp_path/out."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def run(*flags, model=tiny_model, out=tmp_path / "out"):
        return dso("train", "--model", model, "--output", out, *flags)

    return run


FAST = ("--steps", "30", "--lr", "1e-2", "--max-length", "64", "--eval-fraction", "0.1")


def answer(model, folder):
    """A model's answer to a question similar to the training data."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chat = [{"role": "user", "content": "count 3"}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    made = model.generate(**ids, max_new_tokens=10, do_sample=False)
    return tokenizer.decode(made[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)


def test_a_whole_model_is_trained_and_answers(train, dso, chats, tmp_path):
    out = tmp_path / "out"
    result = train("--data", chats, *FAST)
    assert result.exit_code == 0, result.output
    assert f"chat with it: dso chat {out}" in result.stdout and "steps    30" in result.stderr
    talk = dso("chat", out, "-t", "0", "-n", "10", input="count 3\n")
    assert talk.stdout == "one two\n", talk.output
    plain = AutoModelForCausalLM.from_pretrained(out)
    assert type(plain).__name__ == "LlamaForCausalLM" and plain.dtype == torch.bfloat16 and plain.config.use_cache
    assert answer(plain, out) == "one two" == answer(deepseek_optimizer.load_model(out), out)
    points = json.loads((out / "loss.json").read_text())["points"]
    evals = [point["eval_loss"] for point in points if "eval_loss" in point]
    assert points[0]["step"] == 0 and points[-1]["step"] == 30 and evals[-1] < 0.7 * evals[0] and len(evals) == 4
    assert points[-1]["tokens"] > 0 and (out / "loss.png").stat().st_size > 1000
    assert not list(out.rglob("*.bin")) and not list(out.rglob("*.pt"))  # no pickle files
    planned = json.loads(train("--data", chats, *FAST, "--dry-run", "--json", out=tmp_path / "other").stdout)["disk"]
    written = [sum(f.stat().st_size for f in folder.glob("*.safetensors")) for folder in (out / "checkpoint-30", out)]
    assert [planned["checkpoint"], planned["result"]] == pytest.approx(written, rel=0.1)
    assert planned["checkpoints"] == 3 and planned["total"] == 3 * planned["checkpoint"] + planned["result"]


def test_a_deepseek_v4_is_trained_and_answers(train, dso, chats, byte_tokenizer, tmp_path):
    ends = {"eos_token_id": byte_tokenizer.eos_token_id, "pad_token_id": byte_tokenizer.pad_token_id}
    model, out = tmp_path / "v4", tmp_path / "out"
    random_model(deepseek_v4(vocab_size=len(byte_tokenizer), moe_intermediate_size=48, **ends)).save_pretrained(model)
    byte_tokenizer.save_pretrained(model)
    result = train("--data", chats, "--json", *FAST, model=model)
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert facts["eval_after"] < 0.5 * facts["eval_before"] and "each document is a row of its own" in result.stderr
    plain = AutoModelForCausalLM.from_pretrained(out)
    assert type(plain).__name__ == "DeepseekV4ForCausalLM" and plain.dtype == torch.bfloat16
    assert answer(deepseek_optimizer.load_model(out), out) == answer(plain, out) == "one two"
    talk = dso("chat", out, "-p", "int4", "-t", "0", "-n", "10", input="count 3\n")
    assert talk.exit_code == 0 and talk.stdout.strip(), talk.output


def test_an_adapter_is_trained_and_merged(train, dso, chats, tiny_model, tmp_path):
    peft = pytest.importorskip("peft")
    few = ("--steps", "6", *FAST[2:])
    result = train("--data", chats, *few, "--lora", "8", "--json")
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert facts["kind"] == "adapter" and facts["eval_after"] < facts["eval_before"] and facts["steps"] == 6
    out, merged = tmp_path / "out", tmp_path / "merged"
    with_adapter = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), out)
    assert all(weight.abs().max() > 0 for name, weight in with_adapter.named_parameters() if "lora_B" in name)
    talk = dso("chat", out, input="count 3\n")
    assert talk.exit_code == 2 and "is an adapter, not a model" in talk.stderr
    result = train("--data", chats, *few, "--lora", "8", "--merge", out=merged)
    assert result.exit_code == 0 and f"dso chat {merged}" in result.stdout, result.output
    assert (merged / "adapter" / "adapter_model.safetensors").is_file() and not list(merged.rglob("*.bin"))
    plain, ours = AutoModelForCausalLM.from_pretrained(merged), deepseek_optimizer.load_model(merged)
    ids = torch.tensor([[5, 6, 7, 8]])
    want = with_adapter(ids).logits
    torch.testing.assert_close(plain.float()(ids).logits, want, rtol=0.05, atol=0.1)  # merged in bf16
    assert answer(plain, merged) == answer(ours, merged)
    assert dso("chat", merged, "-t", "0", "-n", "4", input="count 3\n").exit_code == 0


def test_an_adapter_on_packed_weights_is_merged_into_the_original(train, chats, tiny_model, tmp_path):
    pytest.importorskip("peft")
    result = train("--data", chats, "--steps", "6", *FAST[2:], "--lora", "8", "-p", "int8", "--merge")
    assert result.exit_code == 0, result.output
    plain, before = AutoModelForCausalLM.from_pretrained(tmp_path / "out"), AutoModelForCausalLM.from_pretrained(tiny_model)
    moved = (plain.model.layers[0].self_attn.q_proj.weight.float() - before.model.layers[0].self_attn.q_proj.weight).abs().max()
    assert plain.dtype == torch.bfloat16 and moved > 1e-3


def test_a_dry_run_prints_the_plan(train, chats, tmp_path, monkeypatch):
    monkeypatch.setattr(TrainingJob, "_load_model", None)
    result = train("--data", chats, *FAST, "--dry-run", "--json", "--batch-size", "3", "--accumulate", "2")
    assert result.exit_code == 0, result.output
    plan = json.loads(result.stdout)
    assert (plan["records"], plan["sequences"], plan["eval_sequences"]) == (40, 36, 4)
    assert (plan["steps"], plan["batch"], plan["family"], plan["row"]) == (30, 6, "llama", 64)
    assert plan["tokens"] > plan["trained_tokens"] == 36 * len("one two|") and plan["rows"] == 12
    assert plan["memory"]["weights"] == 2 * plan["weights"] == 2 * plan["trained"] and plan["memory"]["tokens"] == 192
    epochs = json.loads(train("--data", chats, "--epochs", "2", "--no-packing", "--dry-run", "--json").stdout)
    assert epochs["steps"] == 2 * math.ceil(40 / 2) and epochs["rows"] == 40
    text = train("--data", chats, "--dry-run", "--lora", "4", "--precision", "int4")
    assert (
        f"{plan['weights']:,} weights" in text.stdout and "LoRA of rank 4 on q_proj" in text.stdout and "memory" in text.stdout
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flags,kept", [((), 3), (("--set", "save_total_limit=1"), 3), (("--set", "save_strategy=no"), 0)])
def test_a_full_disk_is_reported_before_the_model_loads(train, chats, tmp_path, monkeypatch, flags, kept):
    monkeypatch.setattr(TrainingJob, "_load_model", None)
    steps = ("--steps", "100", "--lr", "1e-2", "--max-length", "64", "--eval-fraction", "0.1")
    plan = json.loads(train("--data", chats, *steps, *flags, "--dry-run", "--json").stdout)["disk"]
    assert plan["checkpoints"] == kept and plan["free"] > plan["total"]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=plan["total"] - 1))
    result = train("--data", chats, *steps, *flags)
    assert result.exit_code == 2 and "dso: output: " in result.stderr and "save_total_limit=1" in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("where", ["file/out", "file", "/proc/out"])
def test_an_unwritable_output_is_reported_before_the_data_is_read(train, chats, tmp_path, monkeypatch, where):
    monkeypatch.setattr(TrainingJob, "_load_data", None)
    (tmp_path / "file").write_text("")
    result = train("--data", chats, *FAST, out=tmp_path / where)
    assert result.exit_code == 2 and "output: " in result.stderr, result.output
    assert "cannot be written" in result.stderr or where == "file"


def test_flags_override_the_file(dso, chats, tiny_model, tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(
        f"model: nowhere\noutput: {tmp_path / 'out'}\ndata: {{train: nothing, max_length: 32}}\ncache: {tmp_path / 'cache'}\n"
        "arguments: {max_steps: 5, learning_rate: 1e-4}\nlora: {r: 2, targets: [q_proj]}\n"
    )
    flags = ("--model", tiny_model, "--data", chats, "--lora", "3", "--steps", "7", "--set", "weight_decay=0.1")
    result = dso("train", file, *flags, "--dry-run", "--json")
    assert result.exit_code == 0, result.output
    plan = json.loads(result.stdout)
    assert plan["steps"] == 7 and plan["row"] == 32 and plan["adapter"] == "LoRA of rank 3 on q_proj"


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        (("--lr", "1e-3"), "data is missing"),
        (("--data", "none.jsonl"), "none.jsonl: does not exist"),
        (("--data", "CHATS", "--precision", "int4"), "precision='int4' freezes the weights, so it needs lora"),
        (("--data", "CHATS", "--merge"), "merge=True merges an adapter"),
        (("--data", "CHATS", "--patience", "2"), "it needs data.eval"),
        (("--data", "CHATS", "--max-length", "9999"), "max_length=9,999 is more than the 256"),
        (("--data", "CHATS", "--set", "lerning_rate=1"), "did you mean 'learning_rate'?"),
        (("--data", "CHATS", "--set", "x"), "must be NAME=VALUE"),
        (("--data", "CHATS", "--set", "optimizer_state=int4"), "arguments.optimizer_state: Input should be"),
        (("--data", "CHATS", "--set", "learning_rate=fast"), "arguments.learning_rate: Input should be"),
        (("--data", "CHATS", "--lr", "1e-3", "--set", "learning_rate=1"), "learning_rate is already set to 0.001; set it once"),
        (("--data", "CHATS", "--lr", "nan"), "learning_rate must be a finite number"),
        (("--data", "CHATS", "--epochs", "nan"), "num_train_epochs must be a finite number"),
        (("--data", "CHATS", "--epochs", "0"), "num_train_epochs=0 trains nothing"),
        (("--data", "CHATS", "--eval-fraction", "0.1", "--eval-data", "CHATS"), "set only one of them"),
        (("--data", "CHATS", "--set", "fp8_enabled=true", "--set", "fp8_backend=hardware"), "is not available"),
        (("--data", "CHATS", "--set", "fp16=true"), "fp16=True"),
        (("--data", "CHATS", "--optimizer-state", "int2"), "arguments.optimizer_state"),
        (("--data", "CHATS", "--max-length", "8"), "more than the maximum of 8"),
        (("--data", "BROKEN"), "line 2: is not valid JSON"),
        (("--data", "CUT"), "string starting at character 10. Fix the data, or set skip_bad_lines=True"),
        (("--data", "ODD"), "line 1, messages: must be a list of at least one message; "),
        (("--data", "EMPTY"), "is empty"),
        (("NOCONFIG.yaml",), "cannot be read: No such file"),
    ],
)
def test_errors_are_reported_before_the_model_loads(train, chats, tmp_path, monkeypatch, flags, error):
    monkeypatch.setattr(TrainingJob, "_load_model", None)
    (tmp_path / "broken.jsonl").write_text('{"text": "x"}\n{"text"\n')
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "cut.jsonl").write_text('{"text": "x')
    (tmp_path / "odd.jsonl").write_text('{"messages": []}\n' * 2)
    names = {name.upper(): tmp_path / f"{name}.jsonl" for name in ("chats", "broken", "empty", "cut", "odd")}
    result = train(*(names.get(flag, flag) for flag in flags))
    lines = [line for line in result.stderr.splitlines() if not line.startswith("Tokenizing: ")]  # shown on a slow machine
    assert result.exit_code == 2 and error in result.stderr and len(lines) == 1, result.output
    assert not (tmp_path / "out").exists()


def test_foreign_directories_are_not_touched(train, chats, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.safetensors").write_bytes(b"theirs")
    for flags in ((), ("--resume",)):
        result = train("--data", chats, *flags)
        assert result.exit_code == 2 and "out exists and is not empty; choose another directory\n" in result.stderr
    assert "is a file; choose another" in train("--data", chats, out=chats).stderr


def test_a_second_run_is_rejected_before_the_model_loads(train, chats, tmp_path, monkeypatch):
    monkeypatch.setattr(TrainingJob, "_load_model", None)
    monkeypatch.setattr(directory, "LOCK_WAIT", 0.1)
    with directory.locked(tmp_path / "out"):
        result = train("--data", chats)
        assert result.exit_code == 2 and "another run is training into this directory" in result.stderr, result.output
        assert [path.name for path in (tmp_path / "out").iterdir()] == [directory.LOCK]


def test_packed_weights_cannot_be_trained_or_merged_into(train, dso, chats, tiny_model, tmp_path):
    packed = tmp_path / "packed"
    assert dso("convert", tiny_model, packed, "-p", "int8").exit_code == 0
    quantized, _ = quantized_copy(tiny_model, tmp_path / "gptq", gptq, SECTIONS["gptq"])
    for model in (packed, quantized):
        for flags, error in (((), "set lora to train an adapter"), (("--lora", "2", "--merge"), "name the original model")):
            result = train("--data", chats, *flags, model=model)
            assert result.exit_code == 2 and error in result.stderr, result.output
        assert train("--data", chats, "--lora", "2", "--dry-run", model=model).exit_code == 0


def test_an_interrupted_run_resumes_to_the_same_model(train, chats, tmp_path, monkeypatch):
    assert train("--data", chats, *FAST, out=tmp_path / "whole").exit_code == 0
    real, steps = TrainingJob.run, []

    def interrupted(self, callbacks):
        from transformers import TrainerCallback

        class Stop(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                steps.append(state.global_step)
                if state.global_step == 15:
                    raise KeyboardInterrupt

        return real(self, [*callbacks, Stop()])

    with monkeypatch.context() as patch:
        patch.setattr(TrainingJob, "run", interrupted)
        result = train("--data", chats, *FAST)
    assert result.exit_code == 130 and "--resume to continue from" in result.stderr and "checkpoint-10" in result.stderr
    again = train("--data", chats, *FAST)
    assert again.exit_code == 2 and "continue the run with --resume" in again.stderr
    other = train("--data", chats, *FAST, "--resume", "--lora", "2")
    assert other.exit_code == 2 and "lora: differs from the run in" in other.stderr
    result = train("--data", chats, *FAST, "--resume", "--json")
    assert result.exit_code == 0, result.output
    same = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "out")]
    assert same[0] == same[1]
    points = json.loads((tmp_path / "out" / "loss.json").read_text())["points"]
    assert [point["step"] for point in points] == list(range(31)) and json.loads(result.stdout)["eval_before"] is not None


def test_patience_ends_a_run_and_keeps_the_best_model(train, chats, tmp_path, caplog):
    """The learning rate grows from zero to far too large, so that the loss first falls and then rises."""
    rising = ("--lr", "1.0", "--set", "lr_scheduler_type=constant_with_warmup", "--set", "warmup_steps=45")
    flags = ("--steps", "45", "--set", "eval_steps=5", *rising, "--set", "max_grad_norm=0", "--max-length", "64")
    result = train("--data", chats, *flags, "--eval-fraction", "0.1", "--patience", "2", "--json")
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    points = json.loads((tmp_path / "out" / "loss.json").read_text())["points"]
    evals = [point["eval_loss"] for point in points[1:] if "eval_loss" in point]
    assert "missing keys" not in result.stderr + caplog.text  # since the head is tied
    assert facts["stopped_early"] and facts["steps"] < 45 and facts["eval_after"] == min(evals)


def test_invalid_lines_may_be_skipped_with_a_report(train, chats):
    chats.write_text(chats.read_text() + '{"messages": []}\n')
    result = train("--data", chats, "--skip-bad-lines", "--dry-run")
    assert result.exit_code == 0 and "1 invalid record(s) skipped" in result.stdout
    assert "line 41, messages: must be a list of at least one message" in result.stdout


def test_layers_missing_from_the_result_are_reported(train, chats):
    model, message = tiny_v3(), "the result has no MTP layers"
    assert message in train("--data", chats, "--all-tokens", "--dry-run", model=model).stdout
    for flags in (("--set", "mtp_loss_weight=0.3"), ("--lora", "2")):
        result = train("--data", chats, "--all-tokens", "--dry-run", *flags, model=model)
        assert result.exit_code == 0 and message not in result.stdout, result.output


def test_a_model_is_trained_for_its_packed_format(train, dso, chats, tmp_path, tiny_model):
    flags = ("--data", chats, *FAST[2:], "--steps", "12", "--quantize", "int4", "--teacher", "self")
    plan = json.loads(train(*flags, "--dry-run", "--json").stdout)
    assert plan["memory"]["teacher"] == plan["memory"]["weights"] >= plan["memory"]["rounded"] > 0
    assert any("rounded to int4" in remark for remark in plan["remarks"])
    result = train(*flags)
    assert result.exit_code == 0, result.output
    assert "KL divergence from the teacher: " in result.stdout and f"packed model: {tmp_path / 'out'}" in result.stdout
    model = deepseek_optimizer.load_model(tmp_path / "out")
    assert set(model.dso.manifest.formats().values()) == {"int4"} and model.config.use_cache
    assert dso("chat", tmp_path / "out", "-t", "0", "-n", "4", input="count 3\n").exit_code == 0
    other = train(*flags[:-2], "--resume")
    assert other.exit_code != 0 and "arguments.teacher: differs from the run in" in other.output


def test_quantize_trains_no_adapter(train, chats):
    result = train("--data", chats, "--lora", "4", "--quantize", "int4")
    assert result.exit_code != 0 and "arguments.quantize trains all weights" in result.output
