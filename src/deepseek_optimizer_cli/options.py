"""Options that several commands share, each described once."""

from __future__ import annotations

from typing import Annotated, Any

import typer

MODEL_HELP = "A model directory, a .gguf file, or a name on the hub."

Model = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)]
Precision = Annotated[
    str | None,
    typer.Option("--precision", "-p", help="Weights as int4, q4_1, int8, fp8, bf16 or fp32. Default: as they are stored."),
]
KlBudget = Annotated[
    float | None,
    typer.Option(
        "--kl-budget",
        metavar="NATS",
        help="Choose formats matrix by matrix: the smallest model whose KL divergence to the original stays within this.",
    ),
]
Calibration = Annotated[
    str | None,
    typer.Option(
        "--calibration",
        metavar="FILE",
        help="A text like those the model will see: 4-bit weights are rounded, and formats chosen, by it.",
    ),
]
KvCache = Annotated[str | None, typer.Option("--kv-cache", help="Keys and values as bf16 or int8, or fp32 with fp32 weights.")]
Attention = Annotated[
    str | None,
    typer.Option(
        "--attention",
        metavar="MODE",
        help="What a token sees: flash (all before it), sliding (a window and the first few; the cache forgets the rest) or "
        "sparse (a window, and what ranks highest). The last two cost as much a token however long a text is.",
    ),
]
AttentionWindow = Annotated[
    int | None,
    typer.Option(
        "--attention-window",
        min=1,
        metavar="TOKENS",
        help="Latest tokens that are always seen. Default: 4096 with sliding, 512 with sparse.",
    ),
]
AttentionBudget = Annotated[
    int | None,
    typer.Option(
        "--attention-budget", min=1, metavar="TOKENS", help="Tokens that sparse attention sees at most. Default: 2048."
    ),
]
ContextExtension = Annotated[
    str | None,
    typer.Option(
        "--context-extension",
        metavar="KIND",
        help="Make room for more tokens than the model was trained for, by its RoPE: yarn or dynamic (NTK).",
    ),
]
ContextLength = Annotated[
    int | None,
    typer.Option("--context-length", min=1, metavar="TOKENS", help="With --context-extension: the tokens to make room for."),
]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="Threads; default: what this process may use.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]

System = Annotated[str | None, typer.Option("--system", help="System prompt.")]
MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", "-n", min=1, help="Tokens to generate at most.")]
Temperature = Annotated[
    float | None, typer.Option("--temperature", "-t", help="0 answers greedily. Default: what the model's authors chose.")
]
TopK = Annotated[int | None, typer.Option("--top-k", help="Sample among the k likeliest tokens.")]
TopP = Annotated[float | None, typer.Option("--top-p", help="Sample among the likeliest tokens that make up this probability.")]
MinP = Annotated[float | None, typer.Option("--min-p", help="Leave out tokens less likely than this share of the likeliest.")]
RepetitionPenalty = Annotated[float | None, typer.Option("--repetition-penalty", help="Above 1 discourages repeating.")]
Seed = Annotated[int | None, typer.Option("--seed", help="Makes sampling repeatable.")]


def model_fields(**fields: Any) -> dict[str, Any]:
    """Fields of DeepSeekConfig that were given on the command line."""
    return {name: value for name, value in fields.items() if value is not None}


def sampling_options(**options: Any) -> dict[str, Any]:
    """Those of the sampling options that were given, for `chat.sampling.sampling_params`.

    Raises:
        RequestError: a value outside its range, before any model is loaded.
    """
    from deepseek_optimizer.chat.sampling import sampling_params

    given = {name: value for name, value in options.items() if value is not None}
    sampling_params(**given)
    return given
