"""Answers from documents: from one prompt, with citations added, or from several prompts."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from ...chat.deltas import OutputParser, collect
from ...engine.async_engine import Answers
from ...engine.request import Output, Request, SamplingParams
from ...errors import RequestError
from ...longdoc.citations import Citation, cite
from ...longdoc.material import Material
from ...longdoc.prompts import Prompts
from ...longdoc.repetition import Watch
from ...longdoc.strategies import answer_by
from ...longdoc.strategy_protocol import Ask, Batch, Reply, Result, Work, advance
from ...longdoc.tasks import Question
from ..chat.chat_answers import ChatAnswer
from ..http.problems import INTERNAL, ApiError, problem
from ..state import ServerState
from .attachments import Attached

logger = logging.getLogger("deepseek_optimizer.server")
_MAX_CONCURRENT = 4  # prompts of a document in the engine, so that other requests are answered too


def file_citations(citations: Sequence[Citation], material: Material, ids: Sequence[str | None]) -> list[dict[str, Any]]:
    """Citations in the format of OpenAI's `file_citation`, extended by the passage: character range, page, line and text.

    Args:
        citations: passages of the documents.
        material: the documents.
        ids: of the files; None: the file came with the request.
    """
    annotations = []
    for one in citations:
        index = material.chunks[one.chunk].file
        annotations.append(
            {"type": "file_citation", "file_id": ids[index], "filename": one.file, "index": index, "start": one.start,
             "end": one.end, "page": one.page, "line": one.line, "text": one.text}
        )  # fmt: skip
    return annotations


def document_facts(strategy: str, reason: str, notes: list[str], context: int) -> dict[str, Any]:
    """The `document` field of an answer.

    Args:
        strategy: the strategy that was used.
        reason: why it was chosen.
        notes: remarks for the user.
        context: tokens of the last prompt and its reply.
    """
    return {"strategy": strategy, "reason": reason, "notes": notes, "context_tokens": context}


class CitedAnswers:
    """Answers of the engine to a prompt that contains the whole documents. Citations are searched before the last output.

    Args:
        state: the server's.
        answers: of the engine.
        answer: receives the citations.
        parser: parses the text as the answer's parser does; None: the text is only content.
        attached: the chat's files.
        material: the prepared documents.
    """

    def __init__(
        self,
        state: ServerState,
        answers: Answers,
        answer: ChatAnswer,
        parser: OutputParser | None,
        attached: Attached,
        material: Material,
    ) -> None:
        self._state, self._answers, self._answer, self._parser = state, answers, answer, parser
        self._attached, self._material = attached, material
        self._texts: list[str] = []
        self.cancel, self.when_ended = answers.cancel, answers.when_ended

    def __aiter__(self) -> CitedAnswers:
        return self

    async def __anext__(self) -> Output:
        output = await self._answers.__anext__()
        self._texts.append(output.text)
        if output.finish in ("stop", "length"):
            context = output.prompt_tokens + output.completion_tokens - output.dropped_tokens
            request = self._answers.request
            assert request.deadline is not None
            self._answer.cited = await self._state.documents.citing(
                request.client, lambda: self._cited(context), request.deadline
            )
        return output

    def _cited(self, context: int) -> dict[str, Any]:
        text, material = "".join(self._texts), self._material
        if self._parser is not None:
            text = collect([*self._parser.feed(text), *self._parser.finish()]).content
        citations = cite(text, material.chunks, material.document, question=self._attached.question)
        reason = "the documents fit the model's context"
        return {
            "annotations": file_citations(citations, material, self._attached.ids),
            "document": document_facts("whole", reason, [], context),
        }


class _Ended(Exception):
    """A prompt about the document ended without a reply: cancelled, timed out or failed."""

    def __init__(self, output: Output) -> None:
        self.output = output
        super().__init__(output.finish)


class DocumentAnswers(Answers):
    """An answer that takes several prompts, with the interface of one from the engine. Outputs count the tokens of all prompts
    so far.

    Args:
        state: the server's.
        attached: the chat's files.
        material: the prepared documents.
        request: applies to every prompt, except for its own prompt, which is not used, and its sampling, which applies to the
            final answer only; other prompts are decoded greedily.
        answer: receives the progress and the citations.
    """

    def __init__(
        self, state: ServerState, attached: Attached, material: Material, request: Request, answer: ChatAnswer
    ) -> None:
        super().__init__(state.engine, request)
        self._state, self._attached, self._material = state, attached, material
        self._answer = answer
        assert request.deadline is not None
        self._deadline = request.deadline
        self._read = self._cached = self._generated = self._context = 0
        self._error: ApiError | None = None
        self._streamed = False
        self._stop_reason: str | int | None = None
        self._task = asyncio.ensure_future(self._run())

    def cancel(self) -> None:
        self._task.cancel()

    async def __anext__(self) -> Output:
        output = await super().__anext__()
        if self._error is not None and output.finish == "error":
            raise self._error
        return output

    async def _run(self) -> None:
        name = self.request.id
        try:
            finish = await self._work()
            self.put(self._output(finish=finish, stop_reason=self._stop_reason))
        except asyncio.CancelledError:
            self.put(Output(name, finish="cancelled"))
        except _Ended as ended:
            self.put(replace(ended.output, request_id=name))
        except Exception as error:
            if isinstance(error, RequestError) and error.field == "max_length":  # of a chunk: the question is too long
                error = RequestError(
                    "messages", "the question and the earlier messages leave no room for the documents; shorten them"
                )
            api_error = problem(error)
            if api_error is None:
                logger.exception("request %s: answering from documents failed", name)
            self._error = api_error or INTERNAL
            self.put(Output(name, finish="error", error=str(error)))

    async def _work(self) -> Any:
        """Runs the strategy to its end; returns why the answer ended."""
        attached, material, deadline, client = self._attached, self._material, self._deadline, self.request.client
        finish = "stop"

        def begin() -> tuple[Work, Batch | Result]:
            work = answer_by(Question(attached.question, attached.before), material)
            return work, advance(work)

        work, step = await self._state.documents.step(client, begin, deadline)
        while isinstance(step, Batch):
            if step.last:
                reply, finish = await self._last(step.asks[0])
                replies = [reply]
            else:
                replies = await self._parts(step)
            step = await self._state.documents.step(client, partial(advance, work, replies), deadline)
        if not self._streamed:  # the reply about one part is the answer
            reply_text, params, prompts = str(step.answer), self.request.sampling, material.prompts
            text, finish = await self._state.documents.step(client, lambda: _limited(reply_text, params, prompts), deadline)
            self.put(self._output(text=text))
        notes = step.notes + (["earlier messages were truncated to make room for the documents"] if attached.cut else [])
        self._answer.cited = {
            "annotations": file_citations(step.citations, material, attached.ids),
            "document": document_facts(step.strategy, step.reason, notes, self._context),
        }
        return finish

    async def _last(self, ask: Ask) -> tuple[Reply, str]:
        """Streams the reply that is the answer; returns it, and why it ended."""
        params, room = self.request.sampling, self._state.engine.room - len(ask.prompt)
        max_tokens = min(params.max_tokens or ask.max_tokens, max(1, room))
        answers = self._submit(ask.prompt, replace(params, max_tokens=max_tokens))
        if self._on_end is not None:
            answers.when_ended(self._on_end)  # the engine is done then, whether or not the client has read everything
        texts: list[str] = []
        self._streamed = True
        try:
            async for output in answers:
                texts.append(output.text)
                finish = self._checked(output)
                text, ids = output.text, output.token_ids
                so_far = (output.prompt_tokens, output.cached_tokens, output.completion_tokens)
                self.put(self._output(text=text, token_ids=ids, so_far=so_far))
        finally:
            answers.cancel()
        self._count(output)
        self._stop_reason = output.stop_reason
        return Reply("".join(texts), finish == "stop"), str(finish)

    async def _parts(self, batch: Batch) -> list[Reply]:
        """Replies to prompts about parts of the document, of which some run concurrently."""
        gate = asyncio.Semaphore(_MAX_CONCURRENT)
        left = batch.left + sum(len(ask.prompt) for ask in batch.asks)

        async def reply(ask: Ask) -> Reply:
            nonlocal left
            async with gate:
                answer = await self._part(ask)
            left -= len(ask.prompt)
            self._answer.progress = (self._read, max(0, left))
            self.put(self._output())
            return answer

        tasks = [asyncio.ensure_future(reply(ask)) for ask in batch.asks]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _part(self, ask: Ask) -> Reply:
        answers = self._submit(ask.prompt, SamplingParams(temperature=0.0, max_tokens=ask.max_tokens))
        text, watch, once = "", Watch(), None
        try:
            async for output in answers:
                text += output.text
                if once is None and output.finish is None:
                    if (once := watch.first_time(text, output.completion_tokens)) is not None:
                        answers.cancel()  # it repeats itself
                if once is None or output.finish != "cancelled":
                    self._checked(output)
        finally:
            answers.cancel()
        self._count(output)
        return Reply(text if once is None else once, output.finish == "stop", repeated=once is not None)

    def _submit(self, prompt: list[int], params: SamplingParams) -> Answers:
        answers: Answers = self._state.engine.submit(replace(self.request, prompt=prompt, sampling=params))
        return answers

    def _checked(self, output: Output) -> str | None:
        if output.finish in ("cancelled", "deadline", "error"):
            raise _Ended(output)
        return output.finish

    def _count(self, output: Output) -> None:
        self._read += output.prompt_tokens
        self._cached += output.cached_tokens
        self._generated += output.completion_tokens
        self._context = output.prompt_tokens + output.completion_tokens

    def _output(self, *, so_far: tuple[int, int, int] = (0, 0, 0), **fields: Any) -> Output:
        """An output that counts the tokens of all finished prompts, plus (prompt, cached, generated) of the current one."""
        read, cached, generated = so_far
        return Output(
            self.request.id, prompt_tokens=self._read + read, cached_tokens=self._cached + cached,
            completion_tokens=self._generated + generated, **fields,
        )  # fmt: skip


def _limited(text: str, params: SamplingParams, prompts: Prompts) -> tuple[str, str]:
    """Applies a request's stop strings and token limit to a text generated without them; returns it and why it ends."""
    ends = [at + len(stop) * params.include_stop for stop in params.stop if (at := text.find(stop)) >= 0]
    text = text[: min(ends)] if ends else text
    ids = prompts.encode(text)
    if params.max_tokens is None or len(ids) <= params.max_tokens:
        return text, "stop"
    return prompts.tokenizer.decode(ids[: params.max_tokens]), "length"
