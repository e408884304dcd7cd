"""The `dso` command group. Errors that a user can cause end in one line on stderr and exit code 2, without a traceback."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from . import batch, bench, chat, convert, cost, demo, doctor, draft, info, longdoc, models, prune, run, serve, train, tune
from .help import MAX_WIDTH, Command
from .streams import tolerate_locale


class Commands(TyperGroup):
    """Prints errors that a user can cause as one line; any other exception is a bug and keeps its traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # the reader of the output has gone, so the error cannot be reported
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(141) from None
        except KeyboardInterrupt:
            raise typer.Exit(130) from None
        except Exception as error:
            if ctx.params["debug"] or not _is_user_error(error):
                raise
            typer.echo(f"dso: {_message(error)}", err=True)
            raise typer.Exit(2) from None


def _is_user_error(error: Exception) -> bool:
    """Our typed errors, and what Transformers raises for a bad argument, a missing file or an unknown name on the hub."""
    errors = sys.modules.get("deepseek_optimizer.errors")  # if it is not loaded, none of our errors can have been raised
    ours = (errors.DeepSeekOptimizerError,) if errors else ()
    return isinstance(error, (*ours, ValueError, OSError, MemoryError))


def _message(error: Exception) -> str:
    """The error as one line. Python raises MemoryError without a message when the system refuses an allocation."""
    if isinstance(error, MemoryError) and not str(error):
        return "out of memory: free some memory, or raise the limit of this process (ulimit -v, ulimit -d, or its cgroup)"
    return " ".join(str(error).split()) or type(error).__name__


app = typer.Typer(
    cls=Commands,
    name="dso",
    help="Run Hugging Face Transformers models faster and in less memory.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": MAX_WIDTH},
)


def _show_version(requested: bool) -> None:
    if requested:
        from importlib.metadata import PackageNotFoundError, version

        try:
            typer.echo(f"deepseek-optimizer {version('deepseek-optimizer')}")
        except PackageNotFoundError:  # a source tree on PYTHONPATH
            typer.echo("deepseek-optimizer, not installed")
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and every warning.")] = False,
    show_version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    from .model import quiet

    if not debug:
        quiet()


# Name -> function, and its line in `dso --help`.
_COMMANDS: dict[str, tuple[Callable[..., None], str]] = {
    "run": (run.run, "Answer one prompt and exit."),
    "chat": (chat.chat, "Chat with a model in the terminal."),
    "longdoc": (longdoc.longdoc, "Answer questions about long documents, summarize them, or extract data."),
    "serve": (serve.serve, "Serve a model through an OpenAI-compatible API."),
    "batch": (batch.batch, "Answer a file of requests; a stopped job can be continued."),
    "train": (train.train, "Train a model on chats and texts."),
    "draft": (draft.draft, "Train a layer that drafts tokens for a model, which then generates faster."),
    "prune": (prune.prune, "Write a smaller model without the parts that matter least."),
    "convert": (convert.convert, "Write a packed copy of a model."),
    "info": (info.info, "Show the CPU and the selected kernels."),
    "models": (models.models, "Show the supported models and the memory that they need."),
    "doctor": (doctor.doctor, "Find out why a model fails or runs badly."),
    "demo": (demo.demo, "Try a small model and compare it with Transformers."),
    "bench": (bench.bench, "Measure speed, memory and quality of a model."),
    "tune": (tune.tune, "Find settings for a model on this machine."),
    "cost": (cost.cost, "Show what a million tokens cost, here and on rented machines."),
}
for _name, (_function, _help) in _COMMANDS.items():
    app.command(_name, cls=Command, short_help=_help)(_function)


def main() -> None:
    """Entry point of both scripts."""
    tolerate_locale()
    app()
