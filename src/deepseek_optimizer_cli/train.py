"""`dso train`: fine-tunes a model on chats and texts, as a file or flags describe it."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from . import options as o

Lora = Annotated[int | None, typer.Option("--lora", min=1, metavar="RANK", help="Train an adapter of this rank (LoRA).")]
_FROZEN = "With --lora: the frozen weights as int4, q4_1, int8 or fp8. Default: bf16."


def train(
    file: Annotated[str | None, typer.Argument(metavar="CONFIG", help="A YAML or JSON file; flags go before it.")] = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help=o.MODEL_HELP)] = None,
    data: Annotated[
        list[str] | None, typer.Option("--data", "-d", metavar="PATH", help="Chats (.jsonl, .json), texts, directories.")
    ] = None,
    output: Annotated[str | None, typer.Option("--output", "-o", metavar="DIR", help="The directory to make.")] = None,
    eval_data: Annotated[list[str] | None, typer.Option("--eval-data", metavar="PATH", help="What to evaluate on.")] = None,
    eval_fraction: Annotated[
        float | None, typer.Option("--eval-fraction", metavar="PART", help="Hold this part of the data back to evaluate on.")
    ] = None,
    lora: Lora = None,
    precision: Annotated[str | None, typer.Option("--precision", "-p", help=_FROZEN)] = None,
    merge: Annotated[bool, typer.Option("--merge", help="With --lora: save a whole model, the adapter's in it.")] = False,
    max_length: Annotated[int | None, typer.Option("--max-length", metavar="TOKENS", help="Of a sequence, at most.")] = None,
    too_long: Annotated[
        str | None,
        typer.Option("--too-long", metavar="WAY", help="Longer sequences: error (default), truncate, split or skip."),
    ] = None,
    all_tokens: Annotated[bool, typer.Option("--all-tokens", help="Train on what users say, too.")] = False,
    per_answer: Annotated[
        bool, typer.Option("--per-answer", help="Each answer of a chat becomes a sequence of its own, with its thoughts.")
    ] = False,
    skip_bad_lines: Annotated[bool, typer.Option("--skip-bad-lines", help="Leave out records that cannot be used.")] = False,
    no_packing: Annotated[bool, typer.Option("--no-packing", help="One sequence a row.")] = False,
    epochs: Annotated[float | None, typer.Option("--epochs", help="Times through the data. Default: 3.")] = None,
    steps: Annotated[int | None, typer.Option("--steps", min=1, help="Steps, whatever the epochs.")] = None,
    learning_rate: Annotated[
        float | None, typer.Option("--learning-rate", "--lr", help="Default: 2e-5, with --lora 2e-4.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option("--batch-size", min=1, help="Rows at once. Default: 2.")] = None,
    accumulate: Annotated[int | None, typer.Option("--accumulate", min=1, help="Batches in a step. Default: 1.")] = None,
    patience: Annotated[
        int | None, typer.Option("--patience", min=1, metavar="N", help="End after N evaluations without a better loss.")
    ] = None,
    activation_memory: Annotated[
        str | None,
        typer.Option("--activation-memory", metavar="WAY", help="full, selective (default) or recompute (least memory)."),
    ] = None,
    optimizer_state: Annotated[
        str | None, typer.Option("--optimizer-state", metavar="FORMAT", help="Adam's moments: bf16 (default), int8 or fp32.")
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Of everything drawn at random. Default: 42.")] = None,
    more: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="Any argument of DeepSeekTrainingArguments.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last whole checkpoint in the output.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, show tokens, steps and memory, and stop.")
    ] = False,
    as_json: o.AsJson = False,
) -> None:
    """Train a model on chats and texts.

    A chat is trained on what its assistant says. The output gets checkpoints, loss.json and loss.png while it runs, and then
    the model; after an interruption, the same command with --resume goes on to the bit.
    """
    flags = {
        "model": model, "output": output, "lora": lora, "precision": precision, "merge": merge or None, "patience": patience,
        "data": {
            "train": data or None, "eval": eval_data or None, "eval_fraction": eval_fraction, "max_length": max_length,
            "too_long": too_long, "assistant_only": False if all_tokens else None, "per_answer": per_answer or None,
            "skip_bad_lines": skip_bad_lines or None, "packing": False if no_packing else None,
        },
        "arguments": _with_named(more or [], {
            "num_train_epochs": epochs, "max_steps": steps, "learning_rate": learning_rate,
            "per_device_train_batch_size": batch_size, "gradient_accumulation_steps": accumulate, "seed": seed,
            "activation_memory": activation_memory, "optimizer_state": optimizer_state,
        }),
    }  # fmt: skip
    from deepseek_optimizer.system.progress import show_progress
    from deepseek_optimizer.train.config import make_config, read_config

    from .model import no_bars_in_pipes, print_json

    config = make_config(_over({} if file is None else read_config(file), flags), file or "")
    no_bars_in_pipes()
    from deepseek_optimizer.train.job import TrainingJob

    with show_progress("Tokenizing") as progress:
        job = TrainingJob(config, resume=resume, progress=progress)
    if dry_run:
        print_json(job.plan.to_dict()) if as_json else typer.echo(str(job.plan))
        return
    typer.echo(str(job.plan), err=True)
    summary = _run(job)
    print_json(summary.to_dict()) if as_json else typer.echo(_told(summary, config.model))


def _run(job: Any) -> Any:
    from deepseek_optimizer.train.checkpoints.directory import checkpoints
    from deepseek_optimizer.train.progress import ProgressBar

    bar = ProgressBar()
    try:
        return job.run([bar])
    except KeyboardInterrupt:
        if checkpoints(job.output):
            typer.echo(f"dso: the same command with --resume goes on from {checkpoints(job.output)[-1]}", err=True)
        raise
    finally:
        bar.close()


def _with_named(pairs: list[str], flags: dict[str, Any]) -> dict[str, Any]:
    """Arguments by flags of their own, and by --set NAME=VALUE, each."""
    found = {name: value for name, value in flags.items() if value is not None}
    for pair in pairs:
        name, given, value = pair.partition("=")
        if not given or not name.strip():
            raise ValueError(f"--set {pair}: must be NAME=VALUE, such as weight_decay=0.1")
        if name.strip() in found:
            raise ValueError(f"--set {pair}: {name.strip()} is {found[name.strip()]} already; give it once")
        found[name.strip()] = value.strip()
    return found


def _over(fields: dict[str, Any], flags: dict[str, Any]) -> dict[str, Any]:
    """Fields of a file, and over them what flags say (what is None they do not)."""
    out = dict(fields)
    for name, value in flags.items():
        if isinstance(value, dict):
            below = out.get(name, {})
            if isinstance(below, (str, list)):  # `data: chats.jsonl`
                below = {"train": below}
            if isinstance(below, dict) and (below or any(v is not None for v in value.values())):
                out[name] = _over(below, value)
        elif value is not None and name == "lora" and isinstance(out.get(name), dict):
            out[name] = {**out[name], "r": value}
        elif value is not None:
            out[name] = value
    for name, other in (("eval_fraction", "eval"), ("eval", "eval_fraction")):
        if flags.get(name) is not None and flags.get(other) is None:
            out.pop(other, None)
    return out


def _told(summary: Any, model: str) -> str:
    lines = []
    if summary.eval_after is not None:
        before = "" if summary.eval_before is None else f"{summary.eval_before:.4f} before, "
        lines.append(f"evaluation loss: {before}{summary.eval_after:.4f} after")
    early = "; ended early, for it got no better" if summary.stopped_early else ""
    lines.append(f"training loss: {summary.loss:.4f} in {summary.steps:,} steps and {summary.seconds:,.0f} s{early}")
    lines.append(f"loss curve: {summary.curve}")
    lines.append(f"{summary.kind}: {summary.output}")
    if summary.loads:
        lines.append(f"talk with it: dso chat {summary.output}")
    else:
        lines.append(f"an adapter of {model}; with --merge the result is a model that `dso chat` takes")
    return "\n".join(lines)
