"""`dso run MODEL "prompt"`: streams one answer."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from . import options as o


@o.loads_model
def run(
    model: o.Model,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="Prompt; - reads it from standard input.")],
    system: o.System = None,
    image: Annotated[
        list[Path] | None,
        typer.Option("--image", metavar="FILE", help="A picture that the prompt refers to, for models that see. Repeatable."),
    ] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue PROMPT as plain text, without the chat template.")] = False,
    max_new_tokens: o.MaxNewTokens = 512,
    temperature: o.Temperature = None,
    top_k: o.TopK = None,
    top_p: o.TopP = None,
    min_p: o.MinP = None,
    repetition_penalty: o.RepetitionPenalty = None,
    seed: o.Seed = None,
    draft_model: o.DraftModel = None,
    draft_precision: o.DraftPrecision = None,
    *,
    fields: dict[str, Any],
    as_json: o.AsJson = False,
) -> None:
    """Answer one prompt and exit."""
    text = sys.stdin.read() if prompt == "-" else prompt
    if not text.strip():
        raise ValueError("the prompt is empty; enter some text")
    if image and raw:
        raise ValueError("--image needs the chat template; leave out --raw")

    from deepseek_optimizer import make_engine
    from deepseek_optimizer.chat.conversation import prompt_tokens
    from deepseek_optimizer.chat.local import answer, default_sampling, picture_prompt
    from deepseek_optimizer.chat.stream import write_now

    from .interrupt import stop_on_interrupt
    from .model import load, load_draft_model, picture_encoder, print_json

    options = o.sampling_options(
        max_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
    )
    started = time.perf_counter()
    loaded, tokenizer = load(model, fields)
    drafting = load_draft_model(model, draft_model, draft_precision, fields)
    engine, sampling = make_engine(loaded, tokenizer, draft_model=drafting), default_sampling(loaded, **options)
    load_s = time.perf_counter() - started
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": text})
    pictures = None
    if image:
        messages[-1]["pictures"] = list(map(str, image))
        tokens, pictures = picture_prompt(picture_encoder(loaded, model, needed=True), messages)
    else:
        tokens = prompt_tokens(tokenizer, messages, raw=raw)
    with stop_on_interrupt() as stop:
        reply = answer(engine, tokens, (lambda _piece: None) if as_json else write_now, sampling, stop, pictures)
    if as_json:
        print_json({"model": model, "load_s": load_s, **reply.summary()})
    else:
        write_now("\n")
    if reply.finish_reason == "interrupted":
        raise typer.Exit(130)
