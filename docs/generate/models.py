"""Tables of supported models with the memory that they need, from the same data as `dso models`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from .markdown import table

if TYPE_CHECKING:
    from deepseek_optimizer.catalog.known import KnownModel

README_CONTEXT = 4096


def short_table(names: tuple[str, ...] = ("model", "parameters", "int4", "int8", "bf16")) -> str:
    """For the READMEs: weights and the cache of one sequence together, in GB."""
    from deepseek_optimizer.catalog.known import MODELS
    from deepseek_optimizer.catalog.memory import FORMATS, need

    rows = []
    for model in MODELS:
        if model.in_readme:
            needs = need(model)
            cache = (needs.cache_per_token or 0) * README_CONTEXT
            sizes = (_gb(needs.weights[name] + cache) for name in FORMATS)
            rows.append((_title(model), _count(needs.parameters), *sizes))
    return table(names, rows)


def long_table() -> str:
    """For the page on models: weights and cache apart, and together with the plan's buffers."""
    from deepseek_optimizer.catalog.memory import CONTEXT, FORMATS

    weights = (f"weights, {name}" for name in FORMATS)
    header = ("model", "family", "path", "parameters", *weights, "cache of 1,000 tokens", f"int4, {CONTEXT:,} tokens, all")
    return table(header, _long_rows())


def _long_rows() -> Iterator[tuple[str, ...]]:
    from deepseek_optimizer.catalog.known import MODELS
    from deepseek_optimizer.catalog.memory import FORMATS, need

    for model in MODELS:
        needs = need(model)
        weights = (_gb(needs.weights[name]) for name in FORMATS)
        cache = "Transformers'" if needs.cache_per_token is None else f"{needs.cache_per_token * 1000 / 1e6:,.0f} MB"
        total = _gb(needs.total("int4"))
        yield f"`{model.name}`", f"`{model.family}`", needs.path, _count(needs.parameters), *weights, cache, total


def families_table() -> str:
    """The families, and what is supported for each."""
    from deepseek_optimizer.catalog.families import EVERY_OTHER, families

    rows = []
    for row in families():
        name = row.family if row.family == EVERY_OTHER else f"`{row.family}`"
        lists = (row.attention, row.drafts, row.training)
        rows.append((name, row.path, ", ".join(row.examples), *(", ".join(part) for part in lists)))
    return table(("`model_type`", "path", "examples", "attention modes", "drafts", "training"), rows)


def gguf_table() -> str:
    """The architectures of GGUF files, and the families that they are loaded as."""
    from deepseek_optimizer.checkpoint.gguf_architectures import ARCHITECTURES

    rows = []
    for name, entries in ARCHITECTURES.items():
        families = [family for entry in entries for family in (entry.model[0], *entry.others)]
        rows.append((f"`{name}`", ", ".join(f"`{family}`" for family in families)))
    return table(("`general.architecture`", "families"), rows)


def _title(model: KnownModel) -> str:
    return model.name.rpartition("/")[2] if "," not in model.name else model.name.replace("deepseek-ai/", "")


def _gb(size: int) -> str:
    return f"{size / 1e9:,.2f} GB" if size < 1e9 else f"{size / 1e9:,.1f} GB"


def _count(parameters: int) -> str:
    return f"{parameters / 1e6:,.0f} M" if parameters < 1e9 else f"{parameters / 1e9:,.1f} B"
