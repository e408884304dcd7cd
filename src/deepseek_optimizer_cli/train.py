"""`dso train`: fine-tunes a model on chats and texts, configured by a file, by flags, or by both."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from . import options as o
from . import train_options as t

_LORA: dict[str, Any] = {"rich_help_panel": "LoRA"}
_QUANTIZATION: dict[str, Any] = {"rich_help_panel": "Quantization and distillation"}
_MEMORY: dict[str, Any] = {"rich_help_panel": "Memory"}


def train(
    file: Annotated[
        str | None, typer.Argument(metavar="CONFIG", help="YAML or JSON file with these settings; flags override it.")
    ] = None,
    model: Annotated[str | None, typer.Option("--model", "-m", metavar="MODEL", help=o.MODEL_HELP)] = None,
    output: t.Output = None,
    resume: t.Resume = False,
    dry_run: t.DryRun = False,
    data: t.Data = None,
    eval_data: t.EvalData = None,
    eval_fraction: t.EvalFraction = None,
    max_length: t.MaxLength = None,
    too_long: t.TooLong = None,
    all_tokens: t.AllTokens = False,
    per_answer: Annotated[
        bool,
        typer.Option(
            "--per-answer", help="Train on each answer of a chat as a separate sequence, including its reasoning.", **t.DATA
        ),
    ] = False,
    skip_bad_lines: t.SkipBadLines = False,
    no_packing: Annotated[
        bool, typer.Option("--no-packing", help="Put one sequence in each row instead of packing several.", **t.DATA)
    ] = False,
    lora: Annotated[
        int | None,
        typer.Option(
            "--lora", min=1, metavar="RANK", help="Train a LoRA adapter of this rank instead of all weights.", **_LORA
        ),
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(
            "--precision",
            "-p",
            metavar="FORMAT",
            help="With --lora: format of the frozen weights: int4, q4_1, int8 or fp8. Default: bf16.",
            **_LORA,
        ),
    ] = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="With --lora: save the whole model with the adapter merged into it.", **_LORA)
    ] = False,
    quantize: Annotated[
        str | None,
        typer.Option(
            "--quantize",
            metavar="FORMAT",
            help="Train the weights for this format, such as int4 or int8; the result is packed in it.",
            **_QUANTIZATION,
        ),
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(
            "--teacher",
            metavar="MODEL",
            help="Learn this model's next-token distributions; self: those of the model before training.",
            **_QUANTIZATION,
        ),
    ] = None,
    teacher_weight: Annotated[
        float | None,
        typer.Option(
            "--teacher-weight",
            metavar="WEIGHT",
            help="Weight of the divergence from the teacher, above 0; the rest is cross entropy. Default: 1.",
            **_QUANTIZATION,
        ),
    ] = None,
    epochs: t.Epochs = None,
    steps: t.Steps = None,
    learning_rate: Annotated[
        float | None,
        typer.Option(
            "--learning-rate", "--lr", metavar="RATE", help="Learning rate. Default: 2e-5; with --lora 2e-4.", **t.LOOP
        ),
    ] = None,
    batch_size: t.BatchSize = None,
    accumulate: t.Accumulate = None,
    patience: Annotated[
        int | None,
        typer.Option(
            "--patience", min=1, metavar="N", help="Stop after N evaluations without a lower evaluation loss.", **t.LOOP
        ),
    ] = None,
    seed: t.Seed = None,
    more: t.More = None,
    activation_memory: Annotated[
        str | None,
        typer.Option(
            "--activation-memory",
            metavar="MODE",
            help="Activations kept for the backward pass: full, selective (default) or recompute (least memory).",
            **_MEMORY,
        ),
    ] = None,
    optimizer_state: Annotated[
        str | None,
        typer.Option(
            "--optimizer-state", metavar="FORMAT", help="Format of Adam's moments: bf16 (default), int8 or fp32.", **_MEMORY
        ),
    ] = None,
    as_json: o.AsJson = False,
) -> None:
    """Train a model on chats and texts.

    In chats, the loss covers the assistant's messages only. Checkpoints, loss.json and loss.png are written to the output
    directory during training, and the model at the end. After an interruption, repeat the command with --resume: the result is
    the same, bit for bit. Started by torchrun, several processes train together; those that it restarts resume by themselves.
    """
    flags = {
        "model": model, "output": output, "lora": lora, "precision": precision, "merge": merge or None, "patience": patience,
        "data": {
            "train": data or None, "eval": eval_data or None, "eval_fraction": eval_fraction, "max_length": max_length,
            "too_long": too_long, "assistant_only": False if all_tokens else None, "per_answer": per_answer or None,
            "skip_bad_lines": skip_bad_lines or None, "packing": False if no_packing else None,
        },
        "arguments": with_settings(more or [], {
            "num_train_epochs": epochs, "max_steps": steps, "learning_rate": learning_rate,
            "per_device_train_batch_size": batch_size, "gradient_accumulation_steps": accumulate, "seed": seed,
            "activation_memory": activation_memory, "optimizer_state": optimizer_state,
            "quantize": quantize, "teacher": teacher, "teacher_weight": teacher_weight,
        }),
    }  # fmt: skip
    from deepseek_optimizer.train.config import make_config, read_config

    config = make_config(merged({} if file is None else read_config(file), flags), file or "")
    run_job(config, resume=resume, dry_run=dry_run, as_json=as_json)


def run_job(config: Any, *, resume: bool, dry_run: bool, as_json: bool) -> None:
    """Prints the plan of a training run; trains and prints the result unless `dry_run`."""
    from deepseek_optimizer.system.progress import show_progress

    from .model import no_bars_in_pipes, print_json

    no_bars_in_pipes()
    from deepseek_optimizer.train.job import TrainingJob

    with show_progress("Tokenizing") as progress:
        job = TrainingJob(config, resume=resume, progress=progress)
    if dry_run:
        if job.args.process_index == 0:
            print_json(job.plan.to_dict()) if as_json else typer.echo(str(job.plan))
        return
    summary = run_with_bar(job, "run the same command with --resume")
    if job.args.process_index:
        return
    print_json(summary.to_dict()) if as_json else typer.echo(_describe(summary, config.model))


def run_with_bar(job: Any, again: str) -> Any:
    """Prints the plan of a TrainingJob and runs it with a progress bar; `again`: how to continue it if it is interrupted."""
    from deepseek_optimizer.train.checkpoints.directory import checkpoints
    from deepseek_optimizer.train.progress import ProgressBar

    if job.args.process_index == 0:
        typer.echo(str(job.plan), err=True)
    bar = ProgressBar()
    try:
        return job.run([bar])
    except KeyboardInterrupt:
        if checkpoints(job.output):
            typer.echo(f"dso: {again} to continue from {checkpoints(job.output)[-1]}", err=True)
        raise
    finally:
        bar.close()


def with_settings(pairs: list[str], flags: dict[str, Any]) -> dict[str, Any]:
    """Training arguments from flags, and from --set NAME=VALUE."""
    arguments = {name: value for name, value in flags.items() if value is not None}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name.strip():
            raise ValueError(f"--set {pair}: must be NAME=VALUE, such as weight_decay=0.1")
        if name.strip() in arguments:
            raise ValueError(f"--set {pair}: {name.strip()} is already set to {arguments[name.strip()]}; set it once")
        arguments[name.strip()] = value.strip()
    return arguments


def merged(fields: dict[str, Any], flags: dict[str, Any]) -> dict[str, Any]:
    """The settings of a file, overridden by flags that are not None."""
    out = dict(fields)
    for name, value in flags.items():
        if isinstance(value, dict):
            below = out.get(name, {})
            if isinstance(below, (str, list)):  # `data: chats.jsonl`
                below = {"train": below}
            if isinstance(below, dict) and (below or any(v is not None for v in value.values())):
                out[name] = merged(below, value)
        elif value is not None and name == "lora" and isinstance(out.get(name), dict):
            out[name] = {**out[name], "r": value}
        elif value is not None:
            out[name] = value
    for name, other in (("eval_fraction", "eval"), ("eval", "eval_fraction")):
        if flags.get(name) is not None and flags.get(other) is None:
            out.pop(other, None)
    return out


def _describe(summary: Any, model: str) -> str:
    lines = []
    if summary.eval_after is not None:
        before = "" if summary.eval_before is None else f"{summary.eval_before:.4f} before, "
        lines.append(f"evaluation loss: {before}{summary.eval_after:.4f} after")
    if summary.accepted is not None:
        lines.append(f"drafts accepted in the evaluation data: {summary.accepted:.2f} a round")
    if summary.kl_after is not None:
        before = "" if summary.kl_before is None else f"{summary.kl_before:.4f} before, "
        lines.append(f"KL divergence from the teacher: {before}{summary.kl_after:.4f} after")
    early = "; stopped early because the evaluation loss no longer improved" if summary.stopped_early else ""
    lines.append(f"training loss: {summary.loss:.4f} in {summary.steps:,} steps and {summary.seconds:,.0f} s{early}")
    lines.append(f"loss curve: {summary.curve}")
    lines.append(f"{summary.kind}: {summary.output}")
    if summary.loads:
        lines.append(f"chat with it: dso chat {summary.output}")
    else:
        lines.append(f"this is an adapter for {model}; to get a model that `dso chat` can load, train with --merge")
    return "\n".join(lines)
