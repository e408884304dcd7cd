"""Checks an installed wheel on the machine that it was built for: cibuildwheel runs this after each build.

    python build_tools/check_installed.py

The native library must have been built and run here, and a small random model must answer as in the reference backend.
"""

from __future__ import annotations

import sys
import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from deepseek_optimizer import load_model
from deepseek_optimizer_cli.info import machine_facts

TOLERANCE = 0.005  # of the largest logit: the two backends round the activations of int8 products differently


def main() -> int:
    facts = machine_facts()
    print(facts)
    if facts["backend"] != "cpu":
        print(f"the native backend does not run here: {facts['reason']}", file=sys.stderr)
        return 1
    torch.manual_seed(0)
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    tokens = torch.randint(100, (1, 24), dtype=torch.int64, device="cpu")
    with tempfile.TemporaryDirectory() as folder:
        LlamaForCausalLM(LlamaConfig(vocab_size=100, **shape)).save_pretrained(folder)
        native, reference = (
            load_model(folder, precision="int8", backend=backend)(tokens).logits.float() for backend in ("cpu", "reference")
        )
    difference = ((native - reference).abs().max() / reference.abs().max()).item()
    print(f"largest difference from the reference: {difference:.2e} of the largest logit, at most {TOLERANCE}")
    return 0 if difference <= TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main())
