"""Prompts for filling in the middle of a text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..http.caller import Caller
from ..http.problems import ApiError
from ..state import ServerState
from ..tokens.fill_in import FillIn
from ..tokens.tokenizing import Lane


@dataclass(frozen=True)
class FillInPrompt:
    """Token ids of a prompt, and the tokens that end the text besides the end of text."""

    ids: list[int]
    stops: tuple[int, ...]


async def fill_in_prompt(
    state: ServerState,
    before: str,
    after: str,
    caller: Caller,
    *,
    start: str = "",
    files: Sequence[tuple[str, str]] = (),
    field: str = "suffix",
) -> FillInPrompt:
    """The prompt for a gap, in the format of llama-server's /infill. Texts never become control tokens.

    Args:
        state: the server's.
        before, after: texts before and after the gap.
        caller: who sent the request.
        start: beginning of the text that fills the gap.
        files: (name, text) of other files, for context.
        field: of the request, for errors.

    Raises:
        ApiError: 400, the model has no tokens for filling in; others see `FairQueue.run`.
        RequestError: the texts cannot fit the model's context.
    """
    tokens = state.fill_in
    if tokens is None:
        raise ApiError(
            400, f"{field}: this model cannot fill in text: its tokenizer has no tokens for the text before and after a gap",
            param=field,
        )  # fmt: skip
    state.prompt_size.check([before, after, start, *(text for file in files for text in file)], field)
    return await state.tokenizing(lambda lane: _prompt(lane, tokens, before, after, start, files), caller)


def _prompt(lane: Lane, tokens: FillIn, before: str, after: str, start: str, files: Sequence[tuple[str, str]]) -> FillInPrompt:
    plain = lane.plain
    context: list[int] = [] if tokens.begin is None else [tokens.begin]
    if files and tokens.file is not None:
        if tokens.repository is not None:
            context += [tokens.repository, *plain("myproject\n")]
        for name, text in files:
            context += [tokens.file, *plain(f"{name}\n{text}\n")]
        context += [tokens.file, *plain("filename\n")]
    else:
        context += plain("".join(f"{text}\n" for _, text in files))
    return FillInPrompt(context + tokens.ids(plain(before), plain(after), plain(start)), tokens.stops)
