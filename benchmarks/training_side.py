"""One side of a comparison of training, in a process of its own: some steps of a Trainer on real text, then a line of JSON.

    python -m benchmarks.training_side fp32|autocast|ours --model DIR [--rows 2] [--tokens 1024] [--steps 5] [--fields JSON]

Both sides read the same rows in the same order: Python's documentation and sources, which every machine has, cut into rows of
equal length. {"seconds": of each step, "losses": of each step, "peak_bytes": of the whole process, "eval_before", "eval_after":
nats a token, where --evaluate asks for them, "report": what runs natively (ours)}.
"""

from __future__ import annotations

import argparse
import json
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

SIDES = ("fp32", "autocast", "bf16", "ours")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("side", choices=SIDES)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=2, help="a step")
    parser.add_argument("--tokens", type=int, default=1024, help="a row")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--evaluate", type=int, default=0, help="rows that the loss is taken over before and after")
    parser.add_argument("--rate", type=float, default=5e-5)
    parser.add_argument("--lora", type=int, default=0, help="rank; 0: all weights are trained")
    parser.add_argument("--precision", help="of a packed base under LoRA: int4, ...")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--fields", type=json.loads, default={}, help="of DeepSeekTrainingArguments")
    print(json.dumps(run(parser.parse_args())))


def run(a: argparse.Namespace) -> dict[str, Any]:
    import torch
    from transformers import Trainer, TrainerCallback

    from deepseek_optimizer.bench.hardware import usable_cpus
    from deepseek_optimizer.bench.peak_memory import peak_resident_bytes

    torch.set_num_threads(a.threads or usable_cpus())
    rows = texts(a.model, a.rows * a.steps + a.evaluate, a.tokens)
    evaluated, trained = rows[: a.evaluate], rows[a.evaluate :]
    seconds: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds.append(time.perf_counter() - self.began)

    with tempfile.TemporaryDirectory() as folder:
        common = {
            "output_dir": folder, "per_device_train_batch_size": a.rows, "per_device_eval_batch_size": a.rows,
            "max_steps": a.steps, "learning_rate": a.rate, "warmup_steps": a.steps // 10, "logging_steps": 1, "seed": 1,
            "report_to": [], "save_strategy": "no", "use_cpu": True, "disable_tqdm": True, "weight_decay": 0.01,
        }  # fmt: skip
        model = _model(a)
        kind: Any
        arguments: Any
        if a.side == "ours":
            from deepseek_optimizer import DeepSeekTrainer, DeepSeekTrainingArguments

            kind, arguments = DeepSeekTrainer, DeepSeekTrainingArguments(**common, **a.fields)
        else:
            from transformers import TrainingArguments

            kind, arguments = Trainer, TrainingArguments(**common, bf16=a.side == "autocast")
        trainer = kind(model, arguments, train_dataset=trained, eval_dataset=evaluated or None, callbacks=[Clock()])
        found: dict[str, Any] = {}
        if evaluated:
            found["eval_before"] = trainer.evaluate()["eval_loss"]
        trainer.train()
        found["peak_bytes"] = peak_resident_bytes()
        if evaluated:
            found["eval_after"] = trainer.evaluate()["eval_loss"]
        if a.side == "ours":
            found["report"] = str(trainer.report())
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"seconds": seconds, "losses": losses, **found}


def _model(a: argparse.Namespace) -> Any:
    """The model of a side, with adapters where --lora asks for them."""
    import torch

    if a.precision:
        from deepseek_optimizer import load_model

        model: Any = load_model(a.model, precision=a.precision)
    else:
        from transformers import AutoModelForCausalLM

        dtype = torch.bfloat16 if a.side in ("ours", "bf16") else torch.float32
        model = AutoModelForCausalLM.from_pretrained(a.model, dtype=dtype)
    if a.lora:
        from peft import LoraConfig, get_peft_model

        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        model = get_peft_model(model, LoraConfig(r=a.lora, lora_alpha=2 * a.lora, target_modules=targets))
    return model


def texts(model: Path, count: int, tokens: int) -> list[dict[str, list[int]]]:
    """Rows of real text; the first ones are of a file of their own, so that what is evaluated is not what is trained."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    ids: list[int] = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        ids += tokenizer(path.read_text(encoding="utf-8", errors="replace"), verbose=False)["input_ids"]
        if len(ids) >= count * tokens:
            break
    else:
        raise SystemExit(f"this machine's Python has {len(ids):,} tokens of text, and {count * tokens:,} are asked for")
    rows = [ids[at : at + tokens] for at in range(0, count * tokens, tokens)]
    return [{"input_ids": row, "labels": list(row)} for row in rows]


if __name__ == "__main__":
    main()
