"""`dso chat MODEL`: a conversation in the terminal. Ctrl-C ends the answer, Ctrl-D the conversation."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from . import options as o

if TYPE_CHECKING:
    from deepseek_optimizer.chat.conversation import Conversation

HELP = """\
/help            this list
/system [TEXT]   set the system prompt and start afresh; without TEXT: show it
/reset           forget the conversation; the system prompt stays
/undo            take back the last question and its answer
/stats           tokens and speed of the last answer
/save FILE       write the conversation as JSON
/exit            leave (so does Ctrl-D)
Ctrl-C ends the answer. A line that ends in \\ goes on in the next one."""


def chat(
    model: o.Model,
    system: o.System = None,
    max_new_tokens: o.MaxNewTokens = 1024,
    temperature: o.Temperature = None,
    top_k: o.TopK = None,
    top_p: o.TopP = None,
    min_p: o.MinP = None,
    repetition_penalty: o.RepetitionPenalty = None,
    seed: o.Seed = None,
    precision: o.Precision = None,
    kv_cache: o.KvCache = None,
    threads: o.Threads = None,
) -> None:
    """Talk with a model. /help lists the commands."""
    from deepseek_optimizer.chat.conversation import Conversation

    from .model import load

    generation = o.generation_arguments(
        temperature=temperature, seed=seed, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty
    )
    loaded, tokenizer = load(model, o.model_fields(precision=precision, kv_cache=kv_cache, threads=threads))
    conversation = Conversation(loaded, tokenizer, system, {"max_new_tokens": max_new_tokens, **generation})
    _Loop(conversation, interactive=sys.stdin.isatty()).run()


class _Loop:
    """Reads lines, runs commands, asks the model. Notes go to stderr, so that piped output holds the answers alone."""

    def __init__(self, conversation: Conversation, interactive: bool) -> None:
        self.conversation, self.interactive = conversation, interactive
        self.last: Any = None
        if interactive:
            import readline  # noqa: F401  line editing and history for input()
        self._note("/help lists the commands.")

    def run(self) -> None:
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
            except (ValueError, OSError) as error:  # a prompt too long, a file that can't be written: the conversation goes on
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
        if self.last.finish_reason == "length":
            self._note("(cut off by --max-new-tokens or the model's context)")

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


def _stats(last: Any) -> str:
    if last is None:
        return "no answer yet"
    return (
        f"prompt {last.prompt_tokens} tokens, first token after {last.first_token_s:.2f} s, "
        f"then {last.new_tokens} tokens at {last.tokens_per_s:.1f} a second"
    )
