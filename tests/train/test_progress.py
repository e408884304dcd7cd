"""Progress of training: a bar on a terminal, lines in a pipe if it takes long."""

from __future__ import annotations

import io
import threading
from types import SimpleNamespace

from deepseek_optimizer.train.progress import ProgressBar


class Stream(io.StringIO):
    def __init__(self, terminal):
        super().__init__()
        self.terminal = terminal

    def isatty(self):
        return self.terminal


def run(monkeypatch, terminal, before_the_end=lambda: None):
    stream = Stream(terminal)
    monkeypatch.setattr("sys.stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    bar, state = ProgressBar(), SimpleNamespace(is_world_process_zero=True, max_steps=2, global_step=0, num_input_tokens_seen=0)
    bar.on_train_begin(None, state, None)
    for step in (1, 2):
        state.global_step, state.num_input_tokens_seen = step, 1000 * step
        bar.on_log(None, state, None, logs={"loss": 2.5})
        bar.on_log(None, state, None, logs={"eval_loss": 1.25})
        bar.on_step_end(None, state, None)
    before_the_end()
    bar.on_train_end(None, state, None)
    bar.close()
    return stream.getvalue()


def test_progress_on_a_terminal(monkeypatch):
    shown = run(monkeypatch, True)
    for part in ("2/2", "loss 2.5000", "tokens/s", "GB", "step 1: evaluation loss 1.2500"):
        assert part in shown


def test_quick_training_prints_nothing_in_a_pipe(monkeypatch):
    monkeypatch.setattr("deepseek_optimizer.system.progress.FIRST_LINE_S", 60.0)  # however slow the machine is
    assert run(monkeypatch, False) == ""


def test_a_pipe_gets_lines_of_long_training(monkeypatch):
    monkeypatch.setattr("deepseek_optimizer.system.progress.FIRST_LINE_S", 0.0)
    written = threading.Event()
    monkeypatch.setattr(Stream, "write", lambda self, text: (written.set(), io.StringIO.write(self, text))[1])
    text = run(monkeypatch, False, lambda: written.wait(30))
    assert text.startswith("Training: ") and "Training: done in " in text.splitlines()[-1]
