"""examples/tiny_v3, tiny_v4 and tiny_ocr: the scripts themselves, and the models that they train."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer
from typer.testing import CliRunner

import deepseek_optimizer
from deepseek_optimizer_cli.app import app

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SOURCE = Path(deepseek_optimizer.__file__).resolve().parents[1]


def run(folder: Path, *options: str, example: str = "tiny_v3") -> dict[str, Any]:
    """Runs an example's script in a separate process; returns its results."""
    path = os.pathsep.join([str(SOURCE), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / example / "train.py"), "--output", "tiny", *options],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr
    command = "run tiny/int4 Read --image" if example == "tiny_ocr" else "chat tiny/int4"
    assert f"done: dso {command}" in done.stdout, done.stdout
    result: dict[str, Any] = json.loads((folder / "tiny" / "results.json").read_text())
    return result


def load(example: str, name: str) -> Any:
    """A module of an example."""
    spec = importlib.util.spec_from_file_location(f"{example}_{name}", EXAMPLES / example / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def talk(folder: Path) -> None:
    options = ["chat", str(folder / "tiny" / "int4"), "-n", "12", "-t", "0"]
    result = CliRunner().invoke(app, options, input="What does open do?\n")
    assert result.exit_code == 0, result.output
    assert result.stdout.strip()


def test_the_script_runs_end_to_end(tmp_path):
    """With 0.3 M weights and 512 tokens in 60 steps; the loss starts at ln 512 = 6.2 nats per token."""
    figures = run(tmp_path, "--size", "smallest", "--steps", "60", "--characters", "150000")
    assert figures["eval_loss"] < 5.2
    assert figures["expert_load"] >= 1.0 and 0.0 < figures["mtp_acceptance"] <= 1.0
    talk(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tiny" / "model")
    text = "def f(x):\n        return {'ä': x ** 2}  # 1234\n"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False).endswith(f"<｜Assistant｜>b{tokenizer.eos_token}")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "tiny" / "model", dtype=torch.float32)
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    assert plain(ids, labels=ids).loss.isfinite() and len(plain.model.layers) == 2


def test_the_script_trains_a_deepseek_v4(tmp_path):
    options = ("--size", "smallest", "--steps", "60", "--characters", "150000")
    figures = run(tmp_path, *options, example="tiny_v4")
    assert figures["eval_loss"] < 5.8 and figures["expert_load"] >= 1.0 and 0.0 < figures["mtp_acceptance"] <= 1.0
    talk(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "tiny" / "model", dtype=torch.float32)
    assert (
        type(plain).__name__ == "DeepseekV4ForCausalLM"
        and len(plain.model.layers) == 2
        and plain(torch.arange(40)[None]).logits.isfinite().all()
    )


def test_the_script_trains_an_ocr_model(tmp_path):
    """With 30,000 weights and lines of up to 4 characters; the loss starts at ln 261 = 5.6 nats per character."""
    pictures = pytest.importorskip("PIL.Image", reason="needs Pillow")
    options = ("--size", "smallest", "--steps", "150", "--characters", "100000", "--font", "pillow", "--test", "8")
    figures = run(tmp_path, *options, example="tiny_ocr")
    assert figures["loss"] < 4.6 and figures["lines"] == 150 * 16
    assert set(figures["error_rate"]) == {"Transformers, fp32", "OcrModel, bf16", "OcrModel, int4"}
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path / "tiny" / "model", dtype=torch.float32)
    assert type(plain).__name__ == "Qwen2_5_VLForConditionalGeneration"
    line = tmp_path / "line.png"
    pictures.new("RGB", (80, 32), "white").save(line)
    result = CliRunner().invoke(app, ["run", str(tmp_path / "tiny" / "int4"), "Read", "--image", str(line), "-n", "4"])
    assert result.exit_code == 0, result.output


def test_errors_are_edits_between_two_texts():
    lines = load("tiny_ocr", "lines")
    for read, written, edits in (
        ("", "", 0),
        ("abc", "abc", 0),
        ("abd", "abc", 1),
        ("", "ab", 2),
        ("xaby", "ab", 2),
        ("ba", "ab", 2),
    ):
        assert lines.errors(read, written) == edits == lines.errors(written, read)


def test_lines_are_drawn_as_they_are_read():
    """Held-out lines repeat none that were trained on, and a line fits its picture."""
    pytest.importorskip("PIL", reason="needs Pillow")
    lines = load("tiny_ocr", "lines")
    texts = lines.Texts(["Some words of a text that has\tspaces  and  ünicode."] * 40, 1)
    drawing = lines.Drawing([lines.BUILT_IN], 12, 17, 1)
    for _ in range(50):
        text = texts.line(2, 16)
        assert 2 <= len(text) <= 16 and text == " ".join(text.split()) and text.isascii()
        picture = drawing.picture(text)
        assert picture.size == (204, 24) and picture.mode == "RGB"
        low, high = picture.convert("L").getextrema()
        assert high - low > 60, "it is not empty"


@pytest.mark.slow
def test_ten_minutes_are_enough(tmp_path):
    """The goal of issue 7, on two otherwise idle cores."""
    figures = run(tmp_path, "--minutes", "10")
    assert figures["eval_loss"] < 4.3
    assert figures["expert_load"] <= 1.5
    assert figures["mtp_acceptance"] > 0.4
    assert figures["minutes"] < 11
    talk(tmp_path)
