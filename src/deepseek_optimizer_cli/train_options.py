"""Options that `dso train` and `dso draft` have in common."""

from __future__ import annotations

from typing import Annotated, Any

import typer

DATA: dict[str, Any] = {"rich_help_panel": "Data"}
LOOP: dict[str, Any] = {"rich_help_panel": "Training loop"}

Output = Annotated[str | None, typer.Option("--output", "-o", metavar="DIR", help="Directory to create.")]
Resume = Annotated[bool, typer.Option("--resume", help="Resume from the newest complete checkpoint in the output directory.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check settings and data, show tokens, steps and memory, and exit.")]
Data = Annotated[
    list[str] | None,
    typer.Option("--data", "-d", metavar="PATH", help="Training data: chats (.jsonl, .json), text files, directories.", **DATA),
]
EvalData = Annotated[
    list[str] | None, typer.Option("--eval-data", metavar="PATH", help="Evaluation data, in the same formats.", **DATA)
]
EvalFraction = Annotated[
    float | None,
    typer.Option(
        "--eval-fraction",
        metavar="FRACTION",
        help="Fraction of the training data to hold out for evaluation, from 0 to 1.",
        **DATA,
    ),
]
MaxLength = Annotated[
    int | None,
    typer.Option("--max-length", metavar="TOKENS", help="Maximum length of a sequence. Default: the model's context.", **DATA),
]
TooLong = Annotated[
    str | None,
    typer.Option(
        "--too-long",
        metavar="ACTION",
        help="What to do with longer sequences: error (default), truncate, split or skip.",
        **DATA,
    ),
]
AllTokens = Annotated[
    bool,
    typer.Option("--all-tokens", help="Compute the loss on all messages, not only on the assistant's.", **DATA),
]
SkipBadLines = Annotated[bool, typer.Option("--skip-bad-lines", help="Skip invalid records.", **DATA)]
Epochs = Annotated[
    float | None, typer.Option("--epochs", metavar="N", help="Passes over the training data. Default: 3.", **LOOP)
]
Steps = Annotated[
    int | None, typer.Option("--steps", min=1, metavar="N", help="Number of optimizer steps; overrides --epochs.", **LOOP)
]
BatchSize = Annotated[int | None, typer.Option("--batch-size", min=1, metavar="N", help="Rows per batch. Default: 2.", **LOOP)]
Accumulate = Annotated[
    int | None,
    typer.Option(
        "--accumulate", min=1, metavar="N", help="Batches per optimizer step (gradient accumulation). Default: 1.", **LOOP
    ),
]
Seed = Annotated[int | None, typer.Option("--seed", metavar="N", help="Random seed. Default: 42.", **LOOP)]
More = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="Set any field of DeepSeekTrainingArguments. Repeatable.", **LOOP),
]
