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


_RANGES = {
    "temperature": (0, 100),
    "top_k": (1, 1_000_000),
    "top_p": (0, 1),
    "min_p": (0, 1),
    "repetition_penalty": (0.01, 100),
}


def model_fields(**fields: Any) -> dict[str, Any]:
    """Fields of DeepSeekConfig that were given on the command line."""
    return {name: value for name, value in fields.items() if value is not None}


def generation_arguments(*, temperature: float | None, seed: int | None, **others: Any) -> dict[str, Any]:
    """Arguments of `generate`. Naming any sampling option turns sampling on; temperature 0 turns it off.

    Raises:
        ValueError: a value outside its range, before any model is loaded. NaN is outside every range.
    """
    for name, value in {"temperature": temperature, **others}.items():
        low, high = _RANGES[name]
        if value is not None and not low <= value <= high:
            raise ValueError(f"{name} must be from {low:g} to {high:g}, got {value}")
    arguments = {name: value for name, value in others.items() if value is not None}
    sampled = arguments.keys() & {"top_k", "top_p", "min_p"} or temperature is not None or seed is not None
    if temperature == 0:
        arguments["do_sample"] = False
    elif sampled:
        arguments["do_sample"] = True
        if temperature is not None:
            arguments["temperature"] = temperature
    if seed is not None:
        from transformers import set_seed

        set_seed(seed)
    return arguments
