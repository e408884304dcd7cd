"""The loss curve: it shows the logged values, and a resumed run extends it."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest

from deepseek_optimizer.errors import CheckpointError, MissingPackageError
from deepseek_optimizer.train.curve import LossCurve, read_points


def state(step):
    return SimpleNamespace(global_step=step, is_world_process_zero=True)


def log(curve, step, **logs):
    curve.on_log(None, state(step), None, logs=logs)


def test_points_and_picture(tmp_path):
    curve = LossCurve(tmp_path)
    log(curve, 0, eval_loss=3.0)
    curve.on_train_begin(None, state(0), None)
    log(curve, 1, loss=2.5, learning_rate=1e-3, grad_norm=1.5, num_input_tokens_seen=64.0, epoch=0.5)
    log(curve, 2, loss=float("nan"), learning_rate=1e-3)
    log(curve, 2, eval_loss=2.0, eval_runtime=1.0)
    log(curve, 2, train_runtime=3.0)  # not part of a curve
    curve.on_evaluate(None, state(2), None)
    points = json.loads((tmp_path / "loss.json").read_text())["points"]
    seconds = [point.pop("seconds") for point in points]
    assert seconds == sorted(seconds) and points == [
        {"step": 0, "eval_loss": 3.0},
        {"step": 1, "loss": 2.5, "learning_rate": 1e-3, "grad_norm": 1.5, "tokens": 64, "epoch": 0.5},
        {"step": 2, "loss": None, "learning_rate": 1e-3, "eval_loss": 2.0},
    ]
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG") and len(list(tmp_path.iterdir())) == 2
    assert "matplotlib.pyplot" not in sys.modules  # it has global state


def test_a_resumed_run_drops_points_after_its_checkpoint(tmp_path):
    curve = LossCurve(tmp_path)
    for step in (1, 2, 3):
        log(curve, step, loss=1.0 / step)
    curve.points[0]["seconds"] = 100.0
    curve.on_train_end(None, state(3), None)
    again = LossCurve(tmp_path, resume=True)
    again.on_train_begin(None, state(1), None)
    log(again, 2, loss=0.75)
    assert [(point["step"], point["loss"]) for point in again.points] == [(1, 1.0), (2, 0.75)]
    assert again.points[-1]["seconds"] >= 100.0
    assert LossCurve(tmp_path).points == []


def test_a_damaged_curve_is_an_error(tmp_path):
    (tmp_path / "loss.json").write_text('{"points": [3]}')
    with pytest.raises(CheckpointError, match="loss.json: is not a valid loss curve"):
        read_points(tmp_path / "loss.json")


def test_missing_matplotlib_is_reported_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match=r"deepseek-optimizer\[train\]"):
        LossCurve(tmp_path)


def test_a_full_disk_keeps_the_old_curve(tmp_path, monkeypatch):
    curve = LossCurve(tmp_path)
    log(curve, 1, loss=1.0)
    curve.on_save(None, state(1), None)
    before = (tmp_path / "loss.json").read_bytes()
    log(curve, 2, loss=0.5)
    assert (tmp_path / "loss.png").is_file()

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        curve.on_save(None, state(2), None)
    assert (tmp_path / "loss.json").read_bytes() == before and len(list(tmp_path.iterdir())) == 2
