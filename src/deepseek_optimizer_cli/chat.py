"""`dso chat MODEL`: a conversation in the terminal, with a model in this process or (`--url`) on a server. Ctrl-C stops the
answer, Ctrl-D ends the conversation."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options as o

if TYPE_CHECKING:
    from deepseek_optimizer.chat.conversation import Answer, Conversation, Speaker
    from deepseek_optimizer.chat.local import EngineSpeaker

_SERVER: dict[str, Any] = {"rich_help_panel": "Server"}

HELP = """\
/help            this list
/image FILE      add a picture to the next question, for models that see
/system [TEXT]   set the system prompt and start a new conversation; without TEXT: show it
/reset           start a new conversation with the same system prompt
/undo            remove the last question and its answer
/stats           show token counts and speed of the last answer
/save FILE       save the conversation as JSON
/exit            quit (also Ctrl-D)
Ctrl-C stops the answer. End a line with \\ to continue it on the next one."""


@o.loads_model
def chat(
    model: Annotated[str | None, typer.Argument(metavar="MODEL", help=o.MODEL_HELP)] = None,
    url: Annotated[
        str | None,
        typer.Option(
            "--url",
            metavar="URL",
            help="Chat with a model on a server with an OpenAI-compatible API instead, e.g. http://host:8000.",
            **_SERVER,
        ),
    ] = None,
    name: o.ServerModel = None,
    api_key: o.ApiKey = None,
    chat_template: o.ChatTemplate = None,
    system: o.System = None,
    max_new_tokens: o.MaxNewTokens = 1024,
    temperature: o.Temperature = None,
    top_k: o.TopK = None,
    top_p: o.TopP = None,
    min_p: o.MinP = None,
    repetition_penalty: o.RepetitionPenalty = None,
    seed: o.Seed = None,
    draft_model: o.DraftModel = None,
    draft_precision: o.DraftPrecision = None,
    prefix_cache_dir: o.PrefixCacheDir = None,
    prefix_cache_bytes: o.PrefixCacheBytes = 8 << 30,
    *,
    fields: dict[str, Any],
) -> None:
    """Chat with a model in the terminal. /help lists the commands."""
    if (model is None) == (url is None):
        raise ValueError("give either a MODEL to load or the --url of a server")
    if url is not None and fields:
        raise ValueError(f"{o.flag_of(next(iter(fields)))} applies only to a model loaded by this command; omit it with --url")
    if url is not None and prefix_cache_dir is not None:
        raise ValueError("--prefix-cache-dir applies only to a model loaded by this command; omit it with --url")
    if url is not None and (draft_model is not None or draft_precision is not None):
        flag = "--draft-model" if draft_model is not None else "--draft-precision"
        raise ValueError(f"{flag} applies only to a model loaded by this command; omit it with --url")
    if url is None and name is not None:
        raise ValueError(
            "--model is the name of a model on a server and needs --url; give a model to load as the argument MODEL"
        )
    if url is not None and chat_template is not None:
        raise ValueError("--chat-template applies only to a model loaded by this command; omit it with --url")
    sampling = o.sampling_options(
        max_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
    )
    from deepseek_optimizer.chat.conversation import Conversation

    interactive = sys.stdin.isatty()
    if url is not None:
        _Loop(Conversation(_remote(url, api_key, name, sampling), system), interactive).run()
        return
    cache = {"prefix_cache_dir": prefix_cache_dir, "prefix_cache_bytes": prefix_cache_bytes}
    speaker = _local(str(model), chat_template, fields, sampling, cache, (draft_model, draft_precision))
    with speaker.engine:
        _Loop(Conversation(speaker, system), interactive).run()


def _local(
    model: str,
    chat_template: str | None,
    fields: dict[str, Any],
    sampling: dict[str, Any],
    cache: dict[str, Any],
    drafting: tuple[str | None, str | None],
) -> EngineSpeaker:
    from deepseek_optimizer import make_engine
    from deepseek_optimizer.chat.local import EngineSpeaker, chat_sampling
    from deepseek_optimizer.chat.named_template import read_template

    from .model import load, load_draft_model, picture_encoder

    template = None if chat_template is None else read_template(chat_template)
    loaded, tokenizer = load(model, fields, template)
    draft_model = load_draft_model(model, *drafting, fields)
    engine = make_engine(loaded, tokenizer, draft_model=draft_model, **cache)
    settings = chat_sampling(loaded, model, **sampling)
    return EngineSpeaker(engine, settings, picture_encoder(loaded, model, needed=False))


def _remote(url: str, key: str | None, name: str | None, sampling: dict[str, Any]) -> Speaker:
    from deepseek_optimizer.chat.remote import RemoteSpeaker

    return RemoteSpeaker(url, key, name, **sampling)


class _Loop:
    """Reads lines, runs commands and asks the model. Notes go to stderr, so that piped output contains only the answers."""

    def __init__(self, conversation: Conversation, interactive: bool) -> None:
        self.conversation, self.interactive = conversation, interactive
        self.last: Answer | None = None
        self.pictures: list[str] = []  # of the next question
        if interactive:
            with suppress(ImportError):  # on Windows, the console edits lines itself
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
                self._note("\n(Ctrl-D or /exit quits)")
                continue
            if line == "/exit":
                return
            try:
                if line.startswith("/"):
                    self._command(line)
                elif line:
                    self._ask(line)
            except (DeepSeekOptimizerError, ValueError, OSError) as error:
                # The prompt is too long, the server busy, a file not writable: the conversation continues.
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
            pictures, self.pictures = self.pictures, []
            self.last = self.conversation.say(text, write_now, stop, pictures)
        write_now("\n")
        if self.last.dropped_messages:
            self._note(f"(context full: the {self.last.dropped_messages} oldest messages were dropped)")
        if self.last.finish_reason == "length":
            self._note("(answer truncated at --max-new-tokens or the end of the context)")
        elif self.last.finish_reason == "content_filter":
            self._note("(answer stopped by the server's content filter)")

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
        elif name == "/image" and argument:
            self._add_picture(Path(argument).expanduser())
        elif name == "/undo":
            self.conversation.undo()
        elif name == "/stats":
            typer.echo(_stats(self.last), err=True)
        elif name == "/save" and argument:
            self.conversation.save(Path(argument).expanduser())
        else:
            typer.echo(f"unknown or incomplete command: {line}; /help lists the commands", err=True)

    def _add_picture(self, path: Path) -> None:
        from deepseek_optimizer.chat.pictures import picture_of_file
        from deepseek_optimizer.errors import ConfigError

        if getattr(self.conversation.speaker, "encoder", None) is None:
            raise ConfigError("/image needs a model in this process that sees")
        picture_of_file(path)
        self.pictures.append(str(path))

    def _note(self, text: str) -> None:
        if self.interactive:
            typer.echo(text, err=True)


def _stats(last: Answer | None) -> str:
    if last is None:
        return "no answer yet"
    if last.new_tokens is None:
        return f"first text after {last.first_token_s:.2f} s; the server reported no token counts"
    cached = f" ({last.cached_tokens} cached)" if last.cached_tokens else ""
    return (
        f"prompt {last.prompt_tokens} tokens{cached}, first token after {last.first_token_s:.2f} s, "
        f"{last.new_tokens} tokens generated at {last.tokens_per_s:.1f} tokens/s"
    )
