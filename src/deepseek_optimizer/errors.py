"""Typed errors. Each message states what is wrong, where (file, tensor, field), and how to fix it."""

from __future__ import annotations

_EXCERPT = 100  # maximum number of characters of untrusted text that an error quotes


def excerpt(text: str) -> str:
    """Shortens untrusted text (of a client or a file) for an error message: the first characters, then the total length."""
    return text if len(text) <= _EXCERPT else f"{text[:_EXCERPT]}... ({len(text):,} characters)"


def shown(value: object) -> str:
    """Formats an untrusted value for an error message: its `repr`, shortened by `excerpt`."""
    try:
        return excerpt(repr(value))
    except (ValueError, RecursionError):  # an integer with too many digits; a value nested too deeply
        return f"a value of type {type(value).__name__}"


class DeepSeekOptimizerError(Exception):
    """Base class of all errors that this package raises deliberately."""

    def __reduce__(self) -> tuple[object, ...]:
        """Pickles the message and the attributes, for errors of other processes: the arguments of `__init__` may be others."""
        return _unpickled, (type(self), self.args, dict(self.__dict__))


def _unpickled(kind: type[DeepSeekOptimizerError], args: tuple[object, ...], attributes: dict[str, object]) -> object:
    # `kind.__new__` is not always allowed where a built-in error is the second base; calling a class always is.
    error: DeepSeekOptimizerError = type(kind.__name__, (kind,), {"__init__": lambda self: None})()
    error.__class__ = kind
    error.args = args
    error.__dict__.update(attributes)
    return error


class ConfigError(DeepSeekOptimizerError, ValueError):
    """A field of `DeepSeekConfig` or of a model's config is invalid; the message names the field."""


class UnsupportedModelError(ConfigError):
    """The model's family or one of its features is not supported; the message lists what is."""


class KlBudgetError(ConfigError):
    """No choice of formats keeps the KL divergence within `kl_budget`.

    Args:
        budget: the allowed KL divergence, in nats per token.
        reached: the smallest KL divergence measured, in nats per token.
    """

    def __init__(self, budget: float, reached: float) -> None:
        self.budget, self.reached = budget, reached
        super().__init__(
            f"kl_budget={budget:g}: the smallest KL divergence that can be reached is {reached:.3g}. Raise kl_budget to this "
            'value, or use more bits in kv_cache and formats ("auto" and None are lossless)'
        )


class CheckpointError(DeepSeekOptimizerError, ValueError):
    """A checkpoint file is damaged, incomplete or inconsistent.

    Args:
        message: what is wrong.
        file: path of the file at fault, if any.
        tensor: name of the tensor at fault, if any.
    """

    def __init__(self, message: str, *, file: object = None, tensor: str | None = None) -> None:
        self.file, self.tensor = None if file is None else str(file), tensor
        where = ", ".join(p for p in (self.file, f"tensor {tensor!r}" if tensor else None) if p)
        super().__init__(f"{where}: {message}" if where else message)


class AdapterError(DeepSeekOptimizerError, ValueError):
    """A LoRA adapter cannot be used: it has a feature that is not supported, or it belongs to another model.

    Args:
        message: what is wrong and how to fix it.
        path: directory of the adapter.
    """

    def __init__(self, message: str, *, path: object) -> None:
        self.path, self.message = str(path), message
        super().__init__(f"{path}: {message}")


class CheckpointChangedError(CheckpointError):
    """A checkpoint file was modified while its weights were in use; results computed from it are discarded.

    Args:
        message: what happened to the file; follows the file name in the error.
        file: path of the file.
    """

    def __init__(self, message: str, *, file: object = None) -> None:
        self.what = message
        super().__init__(f"{message}; restore the file and load the model again", file=file)


class SaveError(DeepSeekOptimizerError, OSError):
    """A training checkpoint or a model could not be written; files that existed before are unchanged.

    Args:
        target: path that was being written.
        cause: why it failed, as a sentence without a period.
        last: path of the latest complete checkpoint, if there is one.
    """

    def __init__(self, target: object, cause: str, last: object | None) -> None:
        self.target, self.last = str(target), None if last is None else str(last)
        resume = (
            f"the latest complete checkpoint is {last}; resume from it with train(resume_from_checkpoint=True)"
            if last
            else "there is no earlier checkpoint"
        )
        super().__init__(f"{target} was not saved: {cause}. The partial files were removed; {resume}")


class TrainingError(DeepSeekOptimizerError, ArithmeticError):
    """The loss or the gradients of a training step are not finite; the weights were not updated with them.

    Args:
        step: the optimizer step, counted from 1.
        cause: what is not finite, as a sentence without a period.
        last: path of the latest complete checkpoint, if there is one.
    """

    def __init__(self, step: int, cause: str, last: object | None) -> None:
        self.step, self.last = step, None if last is None else str(last)
        resume = (
            f"the latest complete checkpoint is {last}; resume from it with train(resume_from_checkpoint=True) or "
            "dso train --resume"
            if last
            else "there is no checkpoint yet"
        )
        super().__init__(
            f'step {step}: {cause}. Use a smaller learning_rate or check the data of this step; on_nan="skip" skips single '
            f"steps. The weights are those before the step; {resume}"
        )


class BackendError(DeepSeekOptimizerError, RuntimeError):
    """A backend cannot perform an operation: it is not built, the machine lacks the instruction set, or a plan was misused."""


class RankLostError(DeepSeekOptimizerError, RuntimeError):
    """One of the processes that run a model together has ended, so the model cannot be used any more, nor an engine of it.

    Args:
        what: which of them, and how it ended, as a sentence without a period.
    """

    def __init__(self, what: str) -> None:
        super().__init__(
            f"the model runs in several processes, and one of them has ended ({what}): requests in progress have ended too. "
            "Load the model again, or start the server again; if the system killed the process for memory, free some, or set a "
            "smaller kv_cache_memory"
        )


class GraphError(DeepSeekOptimizerError, ValueError):
    """A graph is not well formed, or a requested fusion rule does not exist."""


class CacheFullError(DeepSeekOptimizerError, RuntimeError):
    """The KV cache has fewer free blocks than requested; nothing was changed.

    Args:
        needed: number of blocks requested.
        free: number of free blocks.
        shortage: why the cache cannot grow to its configured size, if that is the reason.
        unit: what was requested: "block", or "state slot" (for the recurrent states of a sequence).
    """

    def __init__(self, needed: int, free: int, shortage: str | None = None, unit: str = "block") -> None:
        self.needed, self.free, self.shortage, self.unit = needed, free, shortage, unit
        why, more = ("", "raise kv_cache_memory") if shortage is None else (f", and {shortage}", "free memory")
        super().__init__(
            f"KV cache: {needed} more {unit}(s) needed, {free} free{why}. Shorten the request, send fewer at once, {more}, "
            "or load the model with sparse_attention=True (a cache of half the size) or "
            'attention_optimization="sliding" (a cache of limited size)'
        )


class NotEnoughMemoryError(DeepSeekOptimizerError, MemoryError):
    """Something does not fit in free memory; nothing was allocated.

    Args:
        what: what needs the memory; if the system refused an allocation of unknown size, the system's message.
        needed, free: bytes; None if unknown.
        remedy: what to do, as a sentence without a period.
        limit: the limit that leaves no more memory, as a sentence without a period.
    """

    def __init__(self, what: str, needed: int | None, free: int | None, remedy: str, limit: object = None) -> None:
        self.needed, self.free = needed, free
        which = "" if limit is None else f" ({limit})"
        if needed is not None and free is not None:
            what = f"{what}: {needed / 1e9:.2f} GB needed, but only {free / 1e9:.2f} GB free{which}"
        super().__init__(f"{what}; {remedy}")


class DroppedTokensError(DeepSeekOptimizerError, ValueError):
    """A cache with a sliding window cannot be cropped to a length at which dropped tokens would be visible again.

    Args:
        tokens: the requested length, in tokens.
        held: the current length, in tokens.
        window: the attention window, in tokens.
        nearest: the largest length up to there that it can be cropped to.
    """

    def __init__(self, tokens: int, held: int, window: int, nearest: int) -> None:
        self.tokens, self.nearest = tokens, nearest
        super().__init__(
            f"the cache cannot be cropped from {held} tokens to {tokens}: with an attention window of {window} tokens, tokens "
            f"that would be visible from there were dropped. Crop it to {nearest} tokens, or start without a cache, and "
            "process the rest again; if the window was set, a larger attention_window keeps more"
        )


class StateMissingError(DeepSeekOptimizerError, ValueError):
    """A sequence cannot return to an earlier token, since its recurrent states there were not stored.

    Args:
        tokens: the requested length, in tokens.
        latest: the largest length up to there whose states are stored.
    """

    def __init__(self, tokens: int, latest: int) -> None:
        self.tokens, self.latest = tokens, latest
        super().__init__(
            f"the cache cannot be cropped to {tokens} tokens: this model's layers have recurrent states, and those after "
            f"{tokens} tokens were not stored. Crop it to {latest} tokens, or start without a cache, and process the rest again"
        )


class UnsupportedRequestError(DeepSeekOptimizerError, ValueError):
    """Neither the plan nor Transformers' own forward supports this call; the message says what to change."""


class RequestError(DeepSeekOptimizerError, ValueError):
    """A field of a request to the engine is invalid, which is the client's mistake.

    Args:
        field: name of the field.
        message: what is wrong with it.
    """

    def __init__(self, field: str, message: str) -> None:
        self.field = excerpt(field)
        super().__init__(f"{self.field}: {message}")


class ContextLengthError(RequestError):
    """A prompt does not fit the model's context.

    Args:
        field, message: see `RequestError`.
        tokens: number of tokens of the prompt, or a lower bound of it.
        context: maximum number of tokens of prompt and answer.
    """

    def __init__(self, field: str, message: str, tokens: int, context: int) -> None:
        self.tokens, self.context = tokens, context
        super().__init__(field, message)


class EngineBusyError(DeepSeekOptimizerError, RuntimeError):
    """The engine's queue is full.

    Args:
        waiting: number of requests in flight.
        retry_after: seconds until a place may be free, estimated from recent requests.
    """

    def __init__(self, waiting: int, retry_after: float) -> None:
        self.waiting, self.retry_after = waiting, retry_after
        super().__init__(f"{waiting} requests are in flight, which is the maximum; try again in {retry_after:.0f} s")


class EngineDeadError(DeepSeekOptimizerError, RuntimeError):
    """The engine was stopped by `close` or by an error, the cause of this exception, and accepts no more requests."""


class WorkerLostError(DeepSeekOptimizerError, RuntimeError):
    """A worker process was killed from outside, got no CPU time, or could not be started; the request is not at fault."""


class DocumentError(DeepSeekOptimizerError, ValueError):
    """A file cannot be read as a document.

    Args:
        file: name or path of the file.
        message: what is wrong with it and how to fix it; follows the file name in the error.
    """

    def __init__(self, file: str, message: str) -> None:
        self.file, self.message = file, message
        super().__init__(f"{file}: {message}")


class DataError(DeepSeekOptimizerError, ValueError):
    """Training data is invalid.

    Args:
        message: what is wrong and how to fix it.
        file: path of the file at fault, if any.
        line: line in the file, or index of the record in a JSON array, counted from 1.
        field: field of that record, such as `messages[2].role`.
    """

    def __init__(self, message: str, *, file: object = None, line: int | None = None, field: str | None = None) -> None:
        self.message, self.file, self.line, self.field = message, None if file is None else str(file), line, field
        where = ", ".join(p for p in (self.file, f"line {line:,}" if line is not None else None, field) if p)
        super().__init__(f"{where}: {message}" if where else message)


class MissingPackageError(DeepSeekOptimizerError, ImportError):
    """A feature needs a package that is not installed.

    Args:
        purpose: the feature that needs it.
        package: name of the package on PyPI.
        extra: the extra of deepseek-optimizer that installs it.
    """

    def __init__(self, purpose: str, package: str, extra: str) -> None:
        self.package, self.extra = package, extra
        super().__init__(f'{purpose} needs {package}, which is not installed: pip install "deepseek-optimizer[{extra}]"')
