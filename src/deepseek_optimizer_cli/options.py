"""Options that several commands share."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer

MODEL_HELP = "Model directory, .gguf file, or model name on the Hugging Face Hub."
_SAMPLING: dict[str, Any] = {"rich_help_panel": "Sampling"}
_MODEL: dict[str, Any] = {"rich_help_panel": "Model"}

Model = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)]
Precision = Annotated[
    str | None,
    typer.Option(
        "--precision",
        "-p",
        metavar="FORMAT",
        help="Weight format: int4, q4_1, int8, int8_nested, fp8, bf16 or fp32. Default: the format of the checkpoint.",
        **_MODEL,
    ),
]
KlBudget = Annotated[
    float | None,
    typer.Option(
        "--kl-budget",
        metavar="NATS",
        help="Choose a format for each weight matrix such that the model is as small as possible while its KL divergence from "
        "the original stays within this many nats per token.",
        **_MODEL,
    ),
]
Calibration = Annotated[
    str | None,
    typer.Option(
        "--calibration",
        metavar="FILE",
        help="Sample text, similar to what the model will process; used to round 3- and 4-bit weights and to choose formats, "
        "at every start. auto: a built-in text. Default: no calibration; dso convert calibrates once.",
        **_MODEL,
    ),
]
KvCache = Annotated[
    str | None,
    typer.Option(
        "--kv-cache",
        metavar="FORMAT",
        help="Format of cached keys and values: bf16, int8, int4, fp32 (with fp32 weights) or fp8 (on a GPU). Default: bf16; "
        "fp32 with fp32 weights.",
        **_MODEL,
    ),
]
Attention = Annotated[
    str | None,
    typer.Option(
        "--attention",
        metavar="MODE",
        help="Which earlier tokens each token attends to. flash: all. sliding: the first few, and a window of the latest; the "
        "cache drops the others. sparse: a window of the latest, and the earlier tokens that rank highest. With sliding and "
        "sparse, the cost per token does not grow with the length of the text. Default: flash.",
        **_MODEL,
    ),
]
AttentionWindow = Annotated[
    int | None,
    typer.Option(
        "--attention-window",
        min=1,
        metavar="TOKENS",
        help="Number of latest tokens that are always visible. Default: 4096 with sliding, 512 with sparse.",
        **_MODEL,
    ),
]
AttentionBudget = Annotated[
    int | None,
    typer.Option(
        "--attention-budget",
        min=1,
        metavar="TOKENS",
        help="Maximum number of tokens visible with sparse attention. Default: 2048.",
        **_MODEL,
    ),
]
ContextExtension = Annotated[
    str | None,
    typer.Option(
        "--context-extension",
        metavar="METHOD",
        help="Extend the context beyond the trained length by scaling RoPE: yarn or dynamic (dynamic NTK).",
        **_MODEL,
    ),
]
ContextLength = Annotated[
    int | None,
    typer.Option(
        "--context-length",
        min=1,
        metavar="TOKENS",
        help="With --context-extension: the new context length.",
        **_MODEL,
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(
        "--threads", min=1, metavar="N", help="Number of CPU threads. Default: all cores available to the process.", **_MODEL
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        "--device",
        metavar="DEVICE",
        help="cpu, or a CUDA device (cuda, cuda:1, ...), where backend cuda runs the model; not tested on a card yet.",
        **_MODEL,
    ),
]
CpuExpertLayers = Annotated[
    int | None,
    typer.Option(
        "--cpu-expert-layers",
        "--n-cpu-moe",
        min=0,
        metavar="N",
        help="On a CUDA device: run the routed experts of the first N layers on the CPU, from the host's memory. Default: "
        "those that do not fit on the device.",
        **_MODEL,
    ),
]
Profile = Annotated[
    str | None,
    typer.Option(
        "--profile",
        metavar="FILE|auto",
        help="Settings that dso tune found: auto: those for this model on this machine, if there are any. Other options come "
        "first. Default: none.",
        **_MODEL,
    ),
]
TensorParallel = Annotated[
    int | None,
    typer.Option(
        "--tensor-parallel",
        metavar="N",
        help="Divide each layer of the model among N processes of this machine. Default: 1.",
        **_MODEL,
    ),
]
ExpertParallel = Annotated[
    int | None,
    typer.Option(
        "--expert-parallel",
        metavar="N",
        help="As --tensor-parallel, for models with experts: each process has whole experts. Default: 1.",
        **_MODEL,
    ),
]
PipelineParallel = Annotated[
    int | None,
    typer.Option(
        "--pipeline-parallel",
        metavar="N",
        help="Divide the layers of the model among N processes, of this machine or of several. Default: 1.",
        **_MODEL,
    ),
]
Strict = Annotated[
    bool | None,
    typer.Option("--strict", help="Refuse models that have no execution plan and would take the general path.", **_MODEL),
]
DraftModel = Annotated[
    str | None,
    typer.Option(
        "--draft-model",
        metavar="MODEL",
        help="A smaller model with the same tokenizer. It drafts tokens, of which the model checks several at a time: the same "
        "text in less time. Default: none; with --draft-precision the model itself.",
        **_MODEL,
    ),
]
DraftPrecision = Annotated[
    str | None,
    typer.Option(
        "--draft-precision",
        metavar="FORMAT",
        help="Weight format of the draft model. Without --draft-model, the model itself drafts in this format, such as int4 "
        "for a model in bf16; it is then in memory in both.",
        **_MODEL,
    ),
]
PrefixCacheDir = Annotated[
    str | None,
    typer.Option(
        "--prefix-cache-dir",
        metavar="DIRECTORY",
        help="Write the KV cache of prompts to files in this directory, and reuse them after a restart. Several processes may "
        "share it. Default: the cache ends with the process.",
        rich_help_panel="Requests and memory",
    ),
]
PrefixCacheBytes = Annotated[
    int,
    typer.Option(
        "--prefix-cache-bytes",
        min=1,
        metavar="BYTES",
        help="Maximum size of --prefix-cache-dir; the least recently used files are deleted.",
        rich_help_panel="Requests and memory",
    ),
]
ServerModel = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="NAME",
        help="With --url: name of the model on the server. Default: its only model.",
        rich_help_panel="Server",
    ),
]
ApiKey = Annotated[
    str | None,
    typer.Option(
        "--api-key",
        metavar="KEY",
        envvar="OPENAI_API_KEY",
        help="With --url: API key of the server.",
        show_envvar=True,
        rich_help_panel="Server",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]

ChatTemplate = Annotated[
    str | None,
    typer.Option(
        "--chat-template",
        metavar="FILE|NAME",
        help="Jinja chat template to use instead of the checkpoint's: a file, or chatml, deepseek-v2, deepseek-v3, "
        "deepseek-v3.2, deepseek-v4, gemma, "
        "llama2, llama3, mistral, phi3, vicuna or zephyr.",
        rich_help_panel="Chat",
    ),
]
System = Annotated[str | None, typer.Option("--system", metavar="TEXT", help="System prompt.")]
MaxNewTokens = Annotated[
    int, typer.Option("--max-new-tokens", "-n", min=1, metavar="TOKENS", help="Maximum number of tokens to generate.")
]
Temperature = Annotated[
    float | None,
    typer.Option(
        "--temperature",
        "-t",
        metavar="T",
        help="Sampling temperature; 0 is greedy. Default: the model's recommended setting.",
        **_SAMPLING,
    ),
]
TopK = Annotated[
    int | None, typer.Option("--top-k", metavar="K", help="Sample from the K most likely tokens only.", **_SAMPLING)
]
TopP = Annotated[
    float | None,
    typer.Option(
        "--top-p",
        metavar="P",
        help="Sample from the smallest set of most likely tokens whose probabilities sum to P.",
        **_SAMPLING,
    ),
]
MinP = Annotated[
    float | None,
    typer.Option(
        "--min-p", metavar="P", help="Drop tokens less likely than P times the most likely token's probability.", **_SAMPLING
    ),
]
RepetitionPenalty = Annotated[
    float | None,
    typer.Option(
        "--repetition-penalty",
        metavar="FACTOR",
        help="Penalty for tokens that have already occurred; above 1 discourages repetition.",
        **_SAMPLING,
    ),
]
Seed = Annotated[int | None, typer.Option("--seed", metavar="N", help="Random seed, for repeatable sampling.", **_SAMPLING)]


# Fields of DeepSeekConfig that the user of a command may set.
_MODEL_FIELDS: dict[str, Any] = {
    "precision": Precision, "kv_cache": KvCache, "attention_optimization": Attention, "attention_window": AttentionWindow,
    "attention_budget": AttentionBudget, "context_extension": ContextExtension, "context_length": ContextLength,
    "threads": Threads, "strict": Strict,
}  # fmt: skip


# What the user of a command that loads a model may set besides.
_PARALLEL: dict[str, Any] = {
    "tensor_parallel": TensorParallel, "expert_parallel": ExpertParallel, "pipeline_parallel": PipelineParallel,
}  # fmt: skip
_LOAD_OPTIONS: dict[str, Any] = {
    "device": Device, "cpu_expert_layers": CpuExpertLayers, "profile": Profile, **_PARALLEL,
}  # fmt: skip


def takes_model_fields(command: Callable[..., None]) -> Callable[..., None]:
    """Replaces the parameter `fields` of a command by one option per entry of `_MODEL_FIELDS`.

    The command receives `fields` as a dict of those options that were given, by field name.
    """
    return _with_options(command, _MODEL_FIELDS)


def loads_model(command: Callable[..., None]) -> Callable[..., None]:
    """As `takes_model_fields`, for a command that passes `fields` to `load_model`: with the options of `_LOAD_OPTIONS` too."""
    return _with_options(command, _MODEL_FIELDS | _LOAD_OPTIONS)


def _with_options(command: Callable[..., None], added: dict[str, Any]) -> Callable[..., None]:
    signature, options = inspect.signature(command, eval_str=True), []
    for parameter in signature.parameters.values():
        if parameter.name == "fields":
            options += [parameter.replace(name=n, annotation=a, default=None) for n, a in added.items()]
        else:
            options.append(parameter)

    @functools.wraps(command)
    def wrapper(**values: Any) -> None:
        fields = not_none(**{name: values.pop(name) for name in added})
        if parallel := {name.removesuffix("_parallel"): fields.pop(name) for name in _PARALLEL if name in fields}:
            fields["parallel"] = parallel
        command(**values, fields=fields)

    wrapper.__signature__ = signature.replace(parameters=options)  # type: ignore[attr-defined]
    wrapper.__annotations__ = {option.name: option.annotation for option in options}
    return wrapper


def flag_of(field: str) -> str:
    """The command-line flag of an entry of `fields`."""
    option = (_MODEL_FIELDS | _LOAD_OPTIONS)["tensor_parallel" if field == "parallel" else field].__metadata__[0]
    flag: str = option.default  # the first argument of an Annotated Option is its flag
    return flag


def not_none(**options: Any) -> dict[str, Any]:
    """The options that were given on the command line: those that are not None."""
    return {name: value for name, value in options.items() if value is not None}


def sampling_options(**options: Any) -> dict[str, Any]:
    """The sampling options that were given, validated, for `chat.sampling.sampling_params`.

    Raises:
        RequestError: a value is outside its range. Raised before any model is loaded.
    """
    from deepseek_optimizer.chat.sampling import sampling_params

    sampling = not_none(**options)
    sampling_params(**sampling)
    return sampling
