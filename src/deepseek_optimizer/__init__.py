"""deepseek-optimizer: makes Hugging Face Transformers models faster and smaller; they remain Transformers models.

Importing this package only registers its names with Transformers. This makes
`AutoModelForCausalLM.from_pretrained(path, quantization_config=DeepSeekConfig(...))` work, packed checkpoints loadable,
`pipeline("conversational", ...)` a task, and `attn_implementation="dso_sliding"` available to plain Transformers models.
"""

from __future__ import annotations

# ruff: noqa: E402
from typing import TYPE_CHECKING, Any

from .address_space import check_address_space as _check_address_space

_check_address_space()  # before torch is imported

from .config import DeepSeekConfig
from .dialogue.task import register_task as _register_task
from .errors import (
    AdapterError,
    BackendError,
    CacheFullError,
    CheckpointChangedError,
    CheckpointError,
    ConfigError,
    DeepSeekOptimizerError,
    DocumentError,
    EngineBusyError,
    EngineDeadError,
    KlBudgetError,
    MissingPackageError,
    NotEnoughMemoryError,
    RankLostError,
    RequestError,
    UnsupportedModelError,
    UnsupportedRequestError,
    WorkerLostError,
)
from .integration.attention.registration import register_attention as _register_attention
from .integration.load.quantizer import register as _register

if TYPE_CHECKING:
    from .bench.benchmark_model import benchmark_model
    from .engine.request import Request, SamplingParams
    from .integration.attention.window_mask import sliding_window_mask
    from .integration.generation.cache import PagedCache
    from .longdoc.document import Document
    from .longdoc.long_document import LongDocument
    from .longdoc.read import read_documents
    from .optimized_model import DynamicGraphOptimizer, load_model, load_tokenizer, report
    from .serving import make_async_engine, make_engine
    from .train.arguments import DeepSeekTrainingArguments
    from .train.arguments import DeepSeekTrainingArguments as TrainingArguments
    from .train.trainer import DeepSeekTrainer

# public name -> module, or module:name if the names differ
_LAZY = {
    "DynamicGraphOptimizer": "optimized_model",
    "load_model": "optimized_model",
    "load_tokenizer": "optimized_model",
    "report": "optimized_model",
    "PagedCache": "integration.generation.cache",
    "sliding_window_mask": "integration.attention.window_mask",
    "benchmark_model": "bench.benchmark_model",
    "Document": "longdoc.document",
    "read_documents": "longdoc.read",
    "LongDocument": "longdoc.long_document",
    "make_engine": "serving",
    "make_async_engine": "serving",
    "Request": "engine.request",
    "SamplingParams": "engine.request",
    "DeepSeekTrainer": "train.trainer",
    "DeepSeekTrainingArguments": "train.arguments",
    "TrainingArguments": "train.arguments:DeepSeekTrainingArguments",  # the name that the article uses
}

__all__ = [
    "AdapterError",
    "BackendError",
    "CacheFullError",
    "CheckpointChangedError",
    "CheckpointError",
    "ConfigError",
    "DeepSeekConfig",
    "DeepSeekOptimizerError",
    "DeepSeekTrainer",
    "DeepSeekTrainingArguments",
    "Document",
    "DocumentError",
    "DynamicGraphOptimizer",
    "EngineBusyError",
    "EngineDeadError",
    "KlBudgetError",
    "LongDocument",
    "MissingPackageError",
    "NotEnoughMemoryError",
    "RankLostError",
    "PagedCache",
    "Request",
    "RequestError",
    "SamplingParams",
    "TrainingArguments",
    "UnsupportedModelError",
    "UnsupportedRequestError",
    "WorkerLostError",
    "benchmark_model",
    "load_model",
    "load_tokenizer",
    "make_async_engine",
    "make_engine",
    "read_documents",
    "report",
    "sliding_window_mask",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    module, _, other = _LAZY[name].partition(":")
    value = getattr(import_module(f".{module}", __name__), other or name)
    globals()[name] = value
    return value


_register()
_register_task()
_register_attention()
