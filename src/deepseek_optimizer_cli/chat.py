"""`dso chat MODEL`: a conversation in the terminal, with a model in this process or (`--url`) on a server. Ctrl-C ends the
answer, Ctrl-D the conversation."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options as o

if TYPE_CHECKING:
    from deepseek_optimizer.chat.conversation import Answer, Conversation, Speaker

HELP = """\
/help            this list
/system [TEXT]   set the system prompt and start afresh; without TEXT: show it
/reset           forget the conversation; the system prompt stays
/undo            take back the last question and its answer
/stats           tokens and speed of the last answer
/save FILE       write the conversation as JSON
/exit            leave (so does Ctrl-D)
Ctrl-C ends the answer. A line that ends in \\ goes on in the next one."""


@o.takes_model_fields
def chat(
    model: Annotated[str | None, typer.Argument(metavar="[MODEL]", help=o.MODEL_HELP)] = None,
    url: Annotated[
        str | None,
        typer.Option("--url", help="Talk to this server, ours or any that has OpenAI's API, such as http://host:8000."),
    ] = None,
    name: Annotated[str | None, typer.Option("--model", help="With --url: what the server calls the model.")] = None,
    api_key: Annotated[
        str | None, typer.Option("--api-key", envvar="OPENAI_API_KEY", help="With --url: the server's key.", show_envvar=True)
    ] = None,
    system: o.System = None,
    max_new_tokens: o.MaxNewTokens = 1024,
    temperature: o.Temperature = None,
    top_k: o.TopK = None,
    top_p: o.TopP = None,
    min_p: o.MinP = None,
    repetition_penalty: o.RepetitionPenalty = None,
    seed: o.Seed = None,
    *,
    fields: dict[str, Any],
) -> None:
    """Talk with a model. /help lists the commands."""
    if (model is None) == (url is None):
        raise ValueError("name a MODEL to load, or a server with --url; one of the two")
    if url is not None and fields:
        raise ValueError(f"{o.flag_of(next(iter(fields)))} is the server's own choice; leave it out with --url")
    if url is None and name is not None:
        raise ValueError("--model names a server's model: it goes with --url; a model to load is the argument MODEL")
    given = o.sampling_options(
        max_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
    )
    from deepseek_optimizer.chat.conversation import Conversation

    speaker = _remote(url, api_key, name, given) if url is not None else _local(str(model), fields, given)
    _Loop(Conversation(speaker, system), interactive=sys.stdin.isatty()).run()


def _local(model: str, fields: dict[str, Any], given: dict[str, Any]) -> Speaker:
    from deepseek_optimizer import make_engine
    from deepseek_optimizer.chat.local import EngineSpeaker, default_sampling

    from .model import load

    loaded, tokenizer = load(model, fields)
    return EngineSpeaker(make_engine(loaded, tokenizer), default_sampling(loaded, **given))


def _remote(url: str, key: str | None, name: str | None, given: dict[str, Any]) -> Speaker:
    from deepseek_optimizer.chat.remote import RemoteSpeaker

    return RemoteSpeaker(url, key, name, **given)


class _Loop:
    """Reads lines, runs commands, asks the model. Notes go to stderr, so that piped output holds the answers alone."""

    def __init__(self, conversation: Conversation, interactive: bool) -> None:
        self.conversation, self.interactive = conversation, interactive
        self.last: Answer | None = None
        if interactive:
            import readline  # noqa: F401  line editing and history for input()
        self._note("/help lists the commands.")

    def run(self) -> None:
        from deepseek_optimizer.errors import DeepSeekOptimizerError

        while True:
            try:
                line = self._read().strip()
            except EOFError:
                return
            except KeyboardInterrupt:
                self._note("\n(Ctrl-D or /exit leaves)")
                continue
            if line == "/exit":
                return
            try:
                if line.startswith("/"):
                    self._command(line)
                elif line:
                    self._ask(line)
            except (DeepSeekOptimizerError, ValueError, OSError) as error:
                # A prompt too long, a server that is busy, a file that can't be written: the conversation goes on.
                typer.echo(f"dso: {error}", err=True)

    def _read(self) -> str:
        line = input("> " if self.interactive else "")
        while line.endswith("\\"):
            line = line[:-1] + "\n" + input(". " if self.interactive else "")
        return line

    def _ask(self, text: str) -> None:
        from deepseek_optimizer.chat.stream import write_now

        from .interrupt import stop_on_interrupt

        with stop_on_interrupt() as stop:
            self.last = self.conversation.say(text, write_now, stop)
        write_now("\n")
        if self.last.dropped_messages:
            self._note(f"(too long for the context: the {self.last.dropped_messages} oldest messages were left out)")
        if self.last.finish_reason == "length":
            self._note("(cut off by --max-new-tokens or the model's context)")
        elif self.last.finish_reason == "content_filter":
            self._note("(cut off by the server's filter)")

    def _command(self, line: str) -> None:
        name, _, argument = line.partition(" ")
        argument = argument.strip()
        if name == "/help":
            typer.echo(HELP, err=True)
        elif name == "/system" and argument:
            self.conversation.system = argument
            self.conversation.reset()
        elif name == "/system":
            typer.echo(self.conversation.system or "(no system prompt)", err=True)
        elif name == "/reset":
            self.conversation.reset()
        elif name == "/undo":
            self.conversation.undo()
        elif name == "/stats":
            typer.echo(_stats(self.last), err=True)
        elif name == "/save" and argument:
            self.conversation.save(Path(argument).expanduser())
        else:
            typer.echo(f"unknown or incomplete command: {line}; /help lists them", err=True)

    def _note(self, text: str) -> None:
        if self.interactive:
            typer.echo(text, err=True)


def _stats(last: Answer | None) -> str:
    if last is None:
        return "no answer yet"
    if last.new_tokens is None:
        return f"first word after {last.first_token_s:.2f} s; the server has not counted the tokens"
    kept = f" ({last.cached_tokens} of them known from before)" if last.cached_tokens else ""
    return (
        f"prompt {last.prompt_tokens} tokens{kept}, first token after {last.first_token_s:.2f} s, "
        f"then {last.new_tokens} tokens at {last.tokens_per_s:.1f} a second"
    )
