"""`dso draft`: trains a layer that drafts tokens for a model, which then generates the same text in fewer steps."""

from __future__ import annotations

from typing import Annotated

import typer

from . import options as o
from . import train_options as t
from .train import merged, run_job, with_settings


def draft(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=o.MODEL_HELP)],
    output: t.Output = None,
    resume: t.Resume = False,
    dry_run: t.DryRun = False,
    drafts: Annotated[
        int, typer.Option("--drafts", min=1, max=16, metavar="N", help="Number of tokens in a row to train for.", **t.LOOP)
    ] = 3,
    draft_vocabulary: Annotated[
        int | None,
        typer.Option(
            "--draft-vocabulary",
            min=0,
            metavar="N",
            help="Draft only the N most frequent tokens of the data; 0: all. Default: 8192 for a new layer of a model with "
            "four times as many.",
            **t.LOOP,
        ),
    ] = None,
    data: t.Data = None,
    eval_data: t.EvalData = None,
    eval_fraction: t.EvalFraction = None,
    max_length: t.MaxLength = None,
    too_long: t.TooLong = None,
    all_tokens: t.AllTokens = False,
    skip_bad_lines: t.SkipBadLines = False,
    epochs: t.Epochs = None,
    steps: t.Steps = None,
    learning_rate: Annotated[
        float | None, typer.Option("--learning-rate", "--lr", metavar="RATE", help="Learning rate. Default: 1e-3.", **t.LOOP)
    ] = None,
    batch_size: t.BatchSize = None,
    accumulate: t.Accumulate = None,
    seed: t.Seed = None,
    more: t.More = None,
    as_json: o.AsJson = False,
) -> None:
    """Train a layer that drafts tokens for a model.

    The model's weights stay as they are. The output is the model with the added layer, which generate(use_mtp=True), dso chat
    and dso serve use for speculative decoding: the same text in fewer steps. Chats with answers that the model wrote itself are
    the best data. Convert the output with dso convert for a smaller format.
    """
    from deepseek_optimizer.train.config import make_config

    arguments = with_settings(more or [], {
        "draft_steps": drafts, "draft_vocabulary": draft_vocabulary, "num_train_epochs": epochs, "max_steps": steps,
        "learning_rate": learning_rate, "per_device_train_batch_size": batch_size, "gradient_accumulation_steps": accumulate,
        "seed": seed,
    })  # fmt: skip
    flags = {
        "model": model, "output": output,
        "data": {
            "train": data or None, "eval": eval_data or None, "eval_fraction": eval_fraction, "max_length": max_length,
            "too_long": too_long, "assistant_only": False if all_tokens else None, "skip_bad_lines": skip_bad_lines or None,
        },
        "arguments": arguments,
    }  # fmt: skip
    run_job(make_config(merged({}, flags), ""), resume=resume, dry_run=dry_run, as_json=as_json)
