"""Typed errors. Each says what was wrong, where (file, tensor, field), and what to do about it."""

from __future__ import annotations

_EXCERPT = 100  # characters of a text from outside that an error quotes


def excerpt(text: str) -> str:
    """A text from outside (a client, a file) as an error quotes it: its beginning, and how long it is where that is not all."""
    return text if len(text) <= _EXCERPT else f"{text[:_EXCERPT]}... ({len(text):,} characters)"


def shown(value: object) -> str:
    """A value from outside as an error shows it: as Python writes it, or the beginning of that."""
    try:
        return excerpt(repr(value))
    except (ValueError, RecursionError):  # an integer of very many digits; what is nested too deeply
        return f"a value of type {type(value).__name__}"


class DeepSeekOptimizerError(Exception):
    """Base class of every error this package raises on purpose."""


class ConfigError(DeepSeekOptimizerError, ValueError):
    """A field of `DeepSeekConfig` or of a model's config is wrong; the message names the field."""


class UnsupportedModelError(ConfigError):
    """The model's family or one of its features is not known; the message lists what is."""


class KlBudgetError(ConfigError):
    """No choice of formats keeps the KL divergence within `kl_budget`.

    Args:
        budget: what was allowed, in nats a token.
        reached: the smallest that was measured.
    """

    def __init__(self, budget: float, reached: float) -> None:
        self.budget, self.reached = budget, reached
        super().__init__(
            f"kl_budget={budget:g}: the smallest KL divergence that can be reached is {reached:.3g}. Allow that much, or give "
            'kv_cache and formats more bits ("auto" and None keep all of them)'
        )


class CheckpointError(DeepSeekOptimizerError, ValueError):
    """A checkpoint file is damaged, incomplete or lies about itself.

    Args:
        message: what is wrong.
        file: path of the file, if one is at fault.
        tensor: name of the tensor, if one is at fault.
    """

    def __init__(self, message: str, *, file: object = None, tensor: str | None = None) -> None:
        self.file, self.tensor = None if file is None else str(file), tensor
        where = ", ".join(p for p in (self.file, f"tensor {tensor!r}" if tensor else None) if p)
        super().__init__(f"{where}: {message}" if where else message)


class CheckpointChangedError(CheckpointError):
    """A checkpoint file was changed while its weights are in use; results that rest on it are not given out.

    Args:
        message: what happened to the file, to follow its name.
        file: path of the file.
    """

    def __init__(self, message: str, *, file: object = None) -> None:
        self.what = message
        super().__init__(f"{message}; restore the file and load the model again", file=file)


class SaveError(DeepSeekOptimizerError, OSError):
    """A checkpoint of training or a model could not be written; what was there before it is as it was.

    Args:
        target: what was to be written.
        cause: as a sentence without its stop.
        last: the newest checkpoint that stands, if there is one.
    """

    def __init__(self, target: object, cause: str, last: object | None) -> None:
        self.target, self.last = str(target), None if last is None else str(last)
        stands = (
            f"{last} stands; train(resume_from_checkpoint=True) goes on from it" if last else "no checkpoint stands before it"
        )
        super().__init__(f"{target} was not saved: {cause}. Nothing of it is left, and {stands}")


class TrainingError(DeepSeekOptimizerError, ArithmeticError):
    """Training came to a loss or to gradients that are not finite; no weight was changed by them.

    Args:
        step: the optimizer step, counted from 1.
        cause: what was found, as the beginning of a sentence.
        last: the newest checkpoint that stands, if there is one.
    """

    def __init__(self, step: int, cause: str, last: object | None) -> None:
        self.step, self.last = step, None if last is None else str(last)
        stands = (
            f"{last} stands; go on from it by train(resume_from_checkpoint=True), or dso train --resume"
            if last
            else "no checkpoint stands yet"
        )
        super().__init__(
            f'step {step}: {cause}. Take a smaller learning_rate or look at the data of this step; on_nan="skip" leaves single '
            f"steps out. The weights are those from before the step, and {stands}"
        )


class BackendError(DeepSeekOptimizerError, RuntimeError):
    """A backend cannot do what was asked: no native build, an ISA that cannot run here, a plan misused."""


class GraphError(DeepSeekOptimizerError, ValueError):
    """A graph is not well formed, or a rule was asked for that does not exist."""


class CacheFullError(DeepSeekOptimizerError, RuntimeError):
    """The KV cache has fewer free blocks than were asked for; nothing was changed.

    Args:
        needed: blocks that were asked for.
        free: blocks that are free.
        shortage: why the cache cannot grow, where it is smaller than it may be.
    """

    def __init__(self, needed: int, free: int, shortage: str | None = None) -> None:
        self.needed, self.free, self.shortage = needed, free, shortage
        why, more = ("", "raise kv_cache_memory") if shortage is None else (f", and {shortage}", "free memory")
        super().__init__(
            f"KV cache: {needed} more block(s) needed, {free} free{why}. Shorten the request, send fewer at once, {more}, "
            "or load the model with sparse_attention=True (half the cache) or "
            'attention_optimization="sliding" (a window).'
        )


class NotEnoughMemoryError(DeepSeekOptimizerError, MemoryError):
    """Something does not fit in the memory that is free; none was taken.

    Args:
        what: that was to be made; where the system refused memory and the bytes are not known, what it said.
        needed, free: bytes; None where they are not known.
        remedy: what to do, as a sentence without its stop.
        limit: which limit leaves no more, as a sentence without its stop.
    """

    def __init__(self, what: str, needed: int | None, free: int | None, remedy: str, limit: object = None) -> None:
        self.needed, self.free = needed, free
        which = "" if limit is None else f" ({limit})"
        if needed is not None and free is not None:
            what = f"{what} takes {needed / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free{which}"
        super().__init__(f"{what}: {remedy}")


class ForgottenError(DeepSeekOptimizerError, ValueError):
    """A cache that keeps a window of its tokens was to go back to where what it let go of would be seen.

    Args:
        tokens: to go back to.
        held: tokens that there are.
        window: tokens that a token sees.
    """

    def __init__(self, tokens: int, held: int, window: int) -> None:
        super().__init__(
            f"the cache cannot go back from {held} tokens to {tokens}: attention sees a window of {window} tokens, and those "
            "that would be seen from there are gone. Begin again without a cache, or take a larger attention_window"
        )


class UnsupportedRequestError(DeepSeekOptimizerError, ValueError):
    """Neither the plan nor Transformers' own forward can serve this call; the message names the remedy."""


class RequestError(DeepSeekOptimizerError, ValueError):
    """A field of a request to the engine is wrong: the client's fault.

    Args:
        field: its name.
        message: what is wrong with it.
    """

    def __init__(self, field: str, message: str) -> None:
        self.field = excerpt(field)
        super().__init__(f"{self.field}: {message}")


class EngineBusyError(DeepSeekOptimizerError, RuntimeError):
    """The engine has as many requests as it takes.

    Args:
        waiting: requests in it.
        retry_after: seconds until there may be room, by what requests took lately.
    """

    def __init__(self, waiting: int, retry_after: float) -> None:
        self.waiting, self.retry_after = waiting, retry_after
        super().__init__(f"{waiting} requests are in flight, and no more are taken; try again in {retry_after:.0f} s")


class EngineDeadError(DeepSeekOptimizerError, RuntimeError):
    """The engine has stopped, by `close` or by an error that is this one's cause; nothing more is answered."""


class WorkerLostError(DeepSeekOptimizerError, RuntimeError):
    """A worker process was ended from outside, or could not be started: the machine's fault, and not that of what was asked."""


class DocumentError(DeepSeekOptimizerError, ValueError):
    """A file that cannot be read as a document.

    Args:
        file: its name or path.
        message: what is wrong with it, and what to do, as a sentence to follow the name.
    """

    def __init__(self, file: str, message: str) -> None:
        self.file, self.message = file, message
        super().__init__(f"{file}: {message}")


class DataError(DeepSeekOptimizerError, ValueError):
    """Training data that cannot be used.

    Args:
        message: what is wrong, and what to do.
        file: the file at fault, if one is.
        line: its line, or of a JSON array the record, counted from 1.
        field: of that record, such as `messages[2].role`.
    """

    def __init__(self, message: str, *, file: object = None, line: int | None = None, field: str | None = None) -> None:
        self.message, self.file, self.line, self.field = message, None if file is None else str(file), line, field
        where = ", ".join(p for p in (self.file, f"line {line:,}" if line is not None else None, field) if p)
        super().__init__(f"{where}: {message}" if where else message)


class MissingPackageError(DeepSeekOptimizerError, ImportError):
    """Something needs a library that is not installed.

    Args:
        purpose: what needs it.
        package: its name on PyPI.
        extra: the extra of this package that brings it.
    """

    def __init__(self, purpose: str, package: str, extra: str) -> None:
        self.package, self.extra = package, extra
        super().__init__(f'{purpose} needs {package}, which is not installed: pip install "deepseek-optimizer[{extra}]"')
