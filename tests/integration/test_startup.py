"""The cost of starting: what an import loads, and the progress shown while weights load."""

from __future__ import annotations

import io
import subprocess
import sys

import pytest

from deepseek_optimizer import load_model
from support.models import CASES, random_model


def test_importing_loads_nothing_heavy():
    """Only this package and the standard library, besides the imports of any model and pipeline of Transformers."""
    code = (
        "import sys, torch, numpy.typing, transformers.masking_utils, transformers.modeling_utils, transformers.pipelines\n"
        "import transformers.generation.utils\n"
        "before = set(sys.modules)\n"
        "import deepseek_optimizer\n"
        "new = {m.partition('.')[0] for m in set(sys.modules) - before}\n"
        "print(*(new - set(sys.stdlib_module_names) - {'deepseek_optimizer'}))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == ""


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("stream, shown", [(Terminal(), True), (io.StringIO(), False)])
def test_a_progress_bar_on_a_terminal(tmp_path, monkeypatch, stream, shown):
    model = random_model(CASES["llama-gqa"]())
    model.save_pretrained(tmp_path)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr("deepseek_optimizer.system.progress.FIRST_LINE_S", 1000)  # independent of the machine's speed
    load_model(tmp_path, precision="int8")
    text = stream.getvalue()
    assert (f"Loading {tmp_path.name[:5]}" in text) is shown
    assert ("0:00:00" in text or "-:--:--" in text) is shown and bool(text) is shown
