"""Training killed at 20 random moments: every named checkpoint is complete, and the result equals that of an uninterrupted run.
`make soak` does 200."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
if not (ROOT / "benchmarks" / "train_soak.py").exists():
    pytest.skip("the benchmarks are not part of the package", allow_module_level=True)
sys.path.insert(0, str(ROOT))

from benchmarks import train_soak  # noqa: E402


def test_killed_at_random_moments(tmp_path: Path) -> None:
    counts, failures = train_soak.soak(tmp_path, rounds=20, seed=1)
    assert failures == []
    assert counts["killed"] == 20 and counts["killed while saving"] > 3


def test_an_incomplete_checkpoint_is_detected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check can fail: if checkpoints are written under their final names, a kill soon leaves an incomplete one."""
    from deepseek_optimizer.train.checkpoints import saving

    def in_place(self, model, trial) -> None:
        super(saving.AtomicCheckpoints, self).write_checkpoint(model, trial)
        self._finish(Path(self.args.output_dir, f"checkpoint-{self.state.global_step}"))

    monkeypatch.setattr(saving.AtomicCheckpoints, "write_checkpoint", in_place)
    _, failures = train_soak.soak(tmp_path, rounds=20, seed=1)
    assert failures
