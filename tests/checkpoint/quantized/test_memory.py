"""Peak memory of packing a quantized matrix: besides the result, its stored codes and a panel, never all of it in float."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from support.quantized_files import SECTIONS, words_tensor, write_checkpoint

CHILD = """
import json, sys
import torch
from deepseek_optimizer.checkpoint import open_checkpoint
torch.set_num_threads(1)
def status(key):
    return int(next(l for l in open("/proc/self/status") if l.startswith(key)).split()[1]) * 1024
with open_checkpoint(sys.argv[1]) as checkpoint:
    checkpoint.read_rows("m.q.weight", 0, 1)  # whatever is made at first use
    open("/proc/self/clear_refs", "w").write("5")  # the high-water mark starts here
    before = status("VmRSS")
    packed = checkpoint.packed("m.q.weight", sys.argv[2])
    print(json.dumps({"peak": status("VmHWM") - before, "packed": packed.nbytes}))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("method", "format"), [("gptq", "int4"), ("gptq", "int8"), ("awq", "q4_1")])
def test_peak_is_the_packed_and_the_stored_size_and_panels(tmp_path, method, format):
    """The matrix is 470 MB in float32."""
    rows, cols, groups = 28672, 4096, 32
    generator = torch.Generator().manual_seed(0)

    def words(*shape: int) -> torch.Tensor:
        return words_tensor(torch.randint(0, 1 << 32, shape, generator=generator).numpy().astype("uint32"))

    weight = words(cols // 8, rows) if method == "gptq" else words(cols, rows // 8)
    tensors = {".qweight": weight, ".qzeros": words(groups, rows // 8), ".scales": torch.rand(groups, rows).half()}
    section = SECTIONS[method] | {"group_size": 128}
    path = write_checkpoint(tmp_path / "m", {f"m.q{suffix}": part for suffix, part in tensors.items()}, section)
    run = subprocess.run([sys.executable, "-c", CHILD, str(path), format], capture_output=True, text=True, check=True)
    used = json.loads(run.stdout)
    assert used["packed"] > 60e6
    assert used["peak"] < used["packed"] + weight.numel() * 4 + 128e6, used
