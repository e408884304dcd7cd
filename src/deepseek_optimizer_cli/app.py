"""The commands under one roof, and how each of them fails: one line on stderr and exit code 2, no traceback."""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from . import bench, chat, convert, demo, doctor, info, longdoc, run, serve, train
from .streams import tolerate_locale


class Commands(TyperGroup):
    """Turns errors that a user can cause into one line; anything else is a bug and keeps its traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # the reader of our output has gone: nothing to say, and nowhere to say it
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(141) from None
        except KeyboardInterrupt:
            raise typer.Exit(130) from None
        except Exception as error:
            if ctx.params["debug"] or not _expected(error):
                raise
            typer.echo(f"dso: {_said(error)}", err=True)
            raise typer.Exit(2) from None


def _expected(error: Exception) -> bool:
    """Our typed errors, and what Transformers raises for a bad argument, a missing file or a name that no hub knows."""
    errors = sys.modules.get("deepseek_optimizer.errors")  # not loaded: then none of ours can have been raised
    ours = (errors.DeepSeekOptimizerError,) if errors else ()
    return isinstance(error, (*ours, ValueError, OSError, MemoryError))


def _said(error: Exception) -> str:
    """An error in one line; also one without words, which is what Python raises where the system gives it no memory."""
    if isinstance(error, MemoryError) and not str(error):
        return "the system gives no more memory: free some, or raise the limit (ulimit -v, ulimit -d, the cgroup's)"
    return " ".join(str(error).split()) or type(error).__name__


app = typer.Typer(
    cls=Commands,
    name="dso",
    help="Makes Hugging Face Transformers models fast and small.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
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
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    from .model import quiet

    if not debug:
        quiet()


app.command("run")(run.run)
app.command("chat")(chat.chat)
app.command("longdoc")(longdoc.longdoc)
app.command("serve")(serve.serve)
app.command("train")(train.train)
app.command("convert")(convert.convert)
app.command("info")(info.info)
app.command("doctor")(doctor.doctor)
app.command("demo")(demo.demo)
app.command("bench")(bench.bench)


def main() -> None:
    """Entry point of both scripts."""
    tolerate_locale()
    app()
