"""The layers of the package and what each may import: the single definition.

`tests/test_layers.py` checks the sources against it, and CONTRIBUTING.md's table of folders is generated from it:

    PYTHONPATH=tests python -m support.layers        # writes the table into CONTRIBUTING.md
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "src"
PACKAGE = "deepseek_optimizer"
CLI = f"{PACKAGE}_cli"
REST = "*"  # the files of a folder that are not in any of its levels


@dataclass(frozen=True)
class Layer:
    """A folder of the package, or a file directly in it.

    Attributes:
        name: of the folder, or of the file without ".py"; `CLI` for the second package.
        holds: its contents, in the words of CONTRIBUTING.md.
        may: what it may import besides `errors`: names of layers below; "..name" means that layer and all below it.
        levels: inside the folder, from the bottom up: its subfolders, and files directly in it. A level may import the levels
            before it; subfolders of the same level do not import each other.
    """

    name: str
    holds: str
    may: tuple[str, ...] = ()
    levels: tuple[tuple[str, ...], ...] = ((REST,),)

    @property
    def is_folder(self) -> bool:
        return self.name == CLI or (SOURCES / PACKAGE / self.name).is_dir()


# From the bottom up.
LAYERS = (
    Layer("errors", "typed errors: fact, place, remedy"),
    Layer("address_space", "a check of the address space limit, before torch is loaded"),
    Layer("versions", "versions of installed packages"),
    Layer(
        "system",
        "limits of the machine (memory, control groups, threads), memory in huge pages, progress output and the names of "
        "installed backends; "
        "`sandbox/`: worker processes with limits, for untrusted input",
        levels=((REST,), ("sandbox",)),
    ),
    Layer(
        "cache",
        "block manager of the paged KV cache (which sequence owns which block, and which blocks may be dropped), prefix "
        "cache, sliding window; no torch",
    ),
    Layer("quant", "weight formats: packing, unpacking, error bounds", may=("system",)),
    Layer(
        "graph",
        "analysis and planning of graphs, attention modes; `ops/`: one table of all ops; `rules/`: fusion rules; `parallel/`: "
        "graphs divided among processes",
        levels=(("ir",), ("ops",), (REST,), ("rules", "parallel")),
    ),
    Layer("config", "`DeepSeekConfig`", may=("graph", "quant", "system")),
    Layer("models", "build a graph from a config, one file per family, without importing Transformers", may=("graph",)),
    Layer(
        "checkpoint",
        "reads and writes checkpoints (safetensors, GGUF, packed), and checks them before memory is allocated; `quantized/`: "
        "safetensors that other quantizers wrote, one method per file",
        may=("quant",),
        levels=((REST,), ("quantized",)),
    ),
    Layer(
        "profiles",
        "settings that `dso tune` found for a model on a machine",
        may=("checkpoint", "system"),
    ),
    Layer(
        "backends",
        "run a graph: `reference` (torch) defines the results, `cpu` (native) is fast, `cuda` (Triton) has not run on a card "
        "yet; `parallel/`: a model in several processes; `registry.py` also finds backends of other packages",
        may=("cache", "graph", "quant", "system", "versions"),
        levels=(
            ("sampling",),
            ("decoding",),
            ("base",),
            ("registry", "decode_one", "drafted_round", "kv_b", "stage_batch"),
            ("reference", "cpu"),
            ("cuda",),
            (REST,),
            ("parallel",),
        ),
    ),
    Layer(
        "engine",
        "serves many requests at once. `scheduling/`, `sampling/`, `grammar/` (constrained output), `speculative/` "
        "(proposers, draft length, bandit). `core` runs one step; `engine` and `async_engine` are its interfaces. torch is "
        "imported only in `runner`, `picture_steps` and `sampling/torch_sampler`",
        may=("backends", "cache", "system"),
        levels=(
            ("adapters", "detokenizer", "draft", "options", "pictures", "pooling", "prompt_logprobs", "request", "sequence"),
            ("grammar", "sampling"),
            ("running",),
            ("scheduling",),
            ("picture_steps", "runner"),
            ("speculative",),
            (REST,),
        ),
    ),
    Layer(
        "calibration",
        "measures on a sample text which columns and matrices are sensitive to rounding, and chooses formats within a quality "
        "budget",
        may=("backends", "graph", "quant"),
    ),
    Layer(
        "integration",
        "everything that uses Transformers' internals. `attention/`: attention functions and masks registered with "
        "it; `memory/`: cache memory; `bind/`: a model bound to an execution plan (graph, packed modules, runtime); "
        "`generation/`: `generate` and its cache; `model/`: methods of an optimized model that replace those of its "
        "class; `general/`: models without a plan; `encoder/`: encoders; `multimodal/`: models with a vision "
        "tower; `load/`: loading, packing and saving checkpoints; "
        "`training/`: Trainer and modules, for `train/`",
        may=("..calibration",),
        levels=(
            ("compat", "configs"),
            ("attention", "memory"),
            ("bind",),
            ("generation",),
            ("model",),
            ("general",),
            ("encoder",),
            ("multimodal",),
            ("load", "training"),
        ),
    ),
    Layer("optimized_model", "`load_model`, `load_tokenizer`, `DynamicGraphOptimizer`, `report`", may=("..integration",)),
    Layer("serving", "`make_engine`, `make_async_engine`: an engine for a model", may=("..integration",)),
    Layer(
        "chat",
        "conversations, prompts, reasoning in outputs; `tools/`: formats of tool calls, one per file",
        may=("..serving",),
        levels=(("deltas", "scan"), ("tools",), (REST,)),
    ),
    Layer("dialogue", "conversations as a Transformers pipeline", may=("..chat",)),
    Layer(
        "longdoc",
        "documents longer than a prompt: `readers/` (file formats), chunks, retrieval, citations; `strategies/`: one "
        "way of answering per file, each a generator that is independent of the engine (`strategy_protocol.py`); "
        "`long_document.py` runs them",
        may=("..chat",),
        levels=(
            ("document", "headings", "borders", "words"),
            ("recognized",),
            ("readers",),
            (REST,),
            ("strategies",),
            ("driver", "long_document"),
        ),
    ),
    Layer(
        "train",
        "training: `data/` (files to rows of tokens), `ops/` (torch ops with gradients), `fp8/`, `checkpoints/`, "
        "`modules/` (forwards for Transformers' modules); `config.py` and `job.py`: a run of `dso train`",
        may=("..chat",),
        levels=(
            ("group", "saved_activations", "shards"),
            ("data", "ops", "repeated_rows"),
            ("attention_function", "fp8", "optimizer"),
            ("checkpoints",),
            ("modules",),
            (REST,),
        ),
    ),
    Layer(
        "bench",
        "benchmarks and their reports. `peers/`: other engines; `sides/`: the processes that are measured; `long/`: generated "
        "long texts with known answers",
        may=("..chat",),
        levels=((REST,), ("peers",), ("long",), ("sides",), ("demo", "run_benchmark")),
    ),
    Layer(
        "tune",
        "finds settings for a model on a machine, for `dso tune`: traces of requests, their replay, the search, its report",
        may=("..chat", "bench", "profiles"),
    ),
    Layer(
        "prune",
        "pruned models, for `dso prune`: one criterion per file, which tensors it cuts in each family, and a run with recovery",
        may=("..chat", "train", "bench"),
    ),
    Layer(
        "doctor",
        "finds out why a model fails or runs slowly: one check or symptom per file",
        may=("..chat", "bench"),
        levels=(("case", "finding", "machine", "memory_estimate", "remedies"), ("checks", "symptoms"), (REST,)),
    ),
    Layer(
        "catalog",
        "the supported families, and the memory that well-known models need, for `dso models` and the documentation",
        may=("..chat", "doctor"),
        levels=(("known",), (REST,)),
    ),
    Layer(
        "batch",
        "batch jobs: a file of requests, answered by the routes of the server; results that survive interruptions",
        may=("checkpoint",),
        levels=(("requests", "results"), (REST,)),
    ),
    Layer(
        "server",
        "the HTTP server. `http/`: connections, bodies, queues; `tokens/`: tokenization; `documents/`: uploaded files; "
        "`stored_responses/`: responses that later requests continue; `batches/`: uploaded files of requests; `protocol/`: "
        "requests and responses of OpenAI's and other protocols, one per file or folder; `chat/`: from requests to the engine "
        "and back; `document_chats/`: chats with documents; `search/`: embeddings and scores; `pool/`: several models in one "
        "server; `routes/`: one route per file; `page/`: the chat page",
        may=("..chat", "longdoc", "batch"),
        levels=(
            ("keys", "remote_pictures"),
            ("settings",),
            ("http",),
            ("adapters", "batches", "documents", "pictures", "stored_responses", "tokens"),
            ("protocol",),
            ("shared",),
            ("openapi", "state"),
            ("pool",),
            ("chat",),
            ("document_chats", "search"),
            ("routes",),
            (REST,),
        ),
    ),
    Layer(
        "ray",
        "replicas of the server on Ray Serve, and which of them a request goes to, by the beginning of its prompt; training on "
        "Ray",
        may=("..server",),
    ),
    Layer("__init__", "the public names", may=("..server",)),
    Layer(CLI, "the commands; a package of its own, so that `dso --help` starts fast", may=("..__init__",)),
)
NAMES = tuple(layer.name for layer in LAYERS)


def allowed(layer: Layer) -> set[str]:
    """The layers that a layer may import."""
    found = {"errors"} - {layer.name}
    for entry in layer.may:
        name = entry.removeprefix("..")
        found |= set(NAMES[: NAMES.index(name) + 1]) if entry.startswith("..") else {name}
    return found


def table() -> str:
    """CONTRIBUTING.md's table, the highest layer first."""
    rows = ["| folder or file | holds | may import |", "|---|---|---|"]
    for layer in reversed(LAYERS):
        name = f"`{layer.name}/`" if layer.is_folder else f"`{layer.name}.py`"
        rows.append(f"| {name} | {layer.holds} | {_may(layer)} |")
    return "\n".join(rows)


def _may(layer: Layer) -> str:
    if layer.may and layer.may[0] == ".." + NAMES[NAMES.index(layer.name) - 1]:
        return "all below"
    parts = [f"`{e[2:]}` and all below it" if e.startswith("..") else f"`{e}`" for e in layer.may]
    return ", ".join(parts) or ("nothing" if layer.name == "errors" else "`errors`")


BEGIN, END = "<!-- layers: made by tests/support/layers.py -->", "<!-- /layers -->"


def written(text: str) -> str:
    """CONTRIBUTING.md's text with the table inserted."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


if __name__ == "__main__":
    page = ROOT / "CONTRIBUTING.md"
    page.write_text(written(page.read_text(encoding="utf-8")), encoding="utf-8")
