"""Options that several commands share, each described once."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
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


# Fields of DeepSeekConfig that whoever loads a model may set.
_MODEL_FIELDS: dict[str, Any] = {
    "precision": Precision, "kv_cache": KvCache, "attention_optimization": Attention, "attention_window": AttentionWindow,
    "attention_budget": AttentionBudget, "context_extension": ContextExtension, "context_length": ContextLength,
    "threads": Threads,
}  # fmt: skip


def takes_model_fields(command: Callable[..., None]) -> Callable[..., None]:
    """A command with an option for each of those fields, in the place of its parameter `fields`, which gets those that were
    given, by name."""
    signature, options = inspect.signature(command, eval_str=True), []
    for parameter in signature.parameters.values():
        if parameter.name == "fields":
            options += [parameter.replace(name=n, annotation=a, default=None) for n, a in _MODEL_FIELDS.items()]
        else:
            options.append(parameter)

    @functools.wraps(command)
    def called(**values: Any) -> None:
        fields = given(**{name: values.pop(name) for name in _MODEL_FIELDS})
        command(**values, fields=fields)

    called.__signature__ = signature.replace(parameters=options)  # type: ignore[attr-defined]
    called.__annotations__ = {option.name: option.annotation for option in options}
    return called


def flag_of(field: str) -> str:
    """What a field is called on the command line."""
    flag: str = _MODEL_FIELDS[field].__metadata__[0].default  # of an Annotated Option the first argument, its flag
    return flag


def given(**options: Any) -> dict[str, Any]:
    """Those that were given on the command line."""
    return {name: value for name, value in options.items() if value is not None}


def sampling_options(**options: Any) -> dict[str, Any]:
    """Those of the sampling options that were given, for `chat.sampling.sampling_params`.

    Raises:
        RequestError: a value outside its range, before any model is loaded.
    """
    from deepseek_optimizer.chat.sampling import sampling_params

    found = given(**options)
    sampling_params(**found)
    return found
