"""Samples the tokens of one request: applies penalties, biases and grammar, then chooses a token. Does not import torch.

Drafts are verified by choosing a token without regard to them and comparing. A deterministic draft is thus accepted with the
probability that the model assigns to it, so the text has the distribution of plain sampling. Since each position in the text
has its own random numbers, it is even the same text. A chosen token is always kept; so state that depends on all earlier
tokens (penalties, DRY, Mirostat, grammar) is the same with and without drafts, too.
"""

from __future__ import annotations

import secrets

import numpy as np

from ...backends.decoding import RowChoice, TokenPenalties
from ...backends.sampling import (
    GREEDY,
    Change,
    ChangedChoice,
    Floats,
    TokenChoice,
    apply_changes,
    draw,
    largest_tokens,
    log_probability,
    uniform,
)
from ..request import Request, TokenLogprob
from .filters import draw_filtered, has_filters
from .mirostat import Mirostat
from .sampled import SampledLogprobs
from .token_rules import MIN_PENALTY, Frequency, Repetition, barred, rules_of


class NoTokenError(ValueError):
    """No token is allowed."""


class NotANumberError(ValueError):
    """The model's logits contain NaN or no finite value."""

    def __init__(self) -> None:
        super().__init__("the model's logits are not finite")


class RequestSampler:
    """Samples the tokens of a request. A preempted request continues with the same sampler.

    Args:
        request: the request.
        vocab_size: number of logits per row.
        eos: end-of-text token ids.
    """

    def __init__(self, request: Request, vocab_size: int, eos: frozenset[int]) -> None:
        sampling = request.sampling
        self.sampling = sampling
        self._seed = secrets.randbits(64) if sampling.seed is None else sampling.seed
        self.grammar = None if sampling.grammar is None else sampling.grammar.start()
        self._bits = np.zeros(-(-vocab_size // 32), np.int32) if self.grammar else None
        self._rules = rules_of(sampling, request.prompt, vocab_size)
        biases = sampling.logit_bias
        bias = np.array([-np.inf if b <= -100 else b for b in biases.values()], np.float32)
        self._biases = [Change(np.array(list(biases), np.int64), added=bias)] if biases else []
        self._ends = np.array(sorted({*eos, *sampling.stop_token_ids}), np.int64)
        # Whether logits are used unchanged after `min_tokens`: the most likely token is then that of the model.
        self._plain = not self._rules and not self._biases and self.grammar is None
        self._mirostat: Mirostat | None = None
        if sampling.mirostat:
            self._mirostat = Mirostat(sampling.mirostat, sampling.mirostat_tau, sampling.mirostat_eta, vocab_size)
        self._filtered = has_filters(sampling)
        self._sampled = SampledLogprobs(sampling, self._seed) if sampling.sampled_logprobs else None
        own_filters = not sampling.greedy and (self._filtered or self._mirostat is not None)
        self._by_backend = self._plain and not own_filters and sampling.logprobs is None
        self._by_device = self.grammar is None and not own_filters and self._sampled is None
        only_penalties = all(isinstance(rule, Repetition | Frequency) for rule in self._rules)
        unchanged = not self._biases and self.grammar is None and not own_filters
        self._in_calls = only_penalties and unchanged and self._sampled is None

    def choice(self, place: int) -> TokenChoice | None:
        """Returns how a backend can choose the token at a position of the text by itself, without changing the state here.

        Args:
            place: position in the generated text, from 0.

        Returns: None if the logits are needed here: for penalties, biases, constraints, `min_tokens`, log probabilities, or
            filters that backends do not have.
        """
        sampling = self.sampling
        if not self._by_backend or place < sampling.min_tokens:
            return None
        if sampling.greedy:
            return GREEDY
        return TokenChoice(sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p, uniform(self._seed, place))

    def device_choice(self, place: int) -> TokenChoice | ChangedChoice | None:
        """As `choice`, for logits on a device, with penalties, biases, barred tokens, `min_tokens` and log probabilities.

        Args:
            place: position in the generated text, from 0, of the next token.

        Returns: None if the logits are needed here: for grammars, the distribution that is sampled from, and filters that
            backends do not have.
        """
        own, sampling = self.choice(place), self.sampling
        if own is not None or not self._by_device:
            return own
        choice = GREEDY
        if not sampling.greedy:
            u = uniform(self._seed, place)
            choice = TokenChoice(sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p, u)
        return ChangedChoice(choice, tuple(self._changes(place)), sampling.logprobs)

    def row_choice(self, place: int, steps: int, tokens: list[int], prompt: int) -> RowChoice | None:
        """Returns how a backend can choose the tokens at `steps` positions of the text; `took` must be called for each of them.

        Args:
            place: the first position in the generated text, from 0.
            steps: number of positions.
            tokens: token ids of the prompt and the text so far.
            prompt: how many of them are the prompt.

        Returns: None if the logits are needed here, as in `choice`; penalties, `min_tokens` and log probabilities are no
            reasons, and the last need the logits of each step afterwards.
        """
        sampling = self.sampling
        if not self._in_calls:
            return None
        penalties = None
        if self._rules:
            window = sampling.repetition_window
            repetition = 1.0 if window == 0 else max(sampling.repetition_penalty, MIN_PENALTY)
            penalties = TokenPenalties(
                np.array(tokens, np.int32), prompt, repetition, min(window or 0, 2**31 - 1),
                sampling.frequency_penalty, sampling.presence_penalty,
            )  # fmt: skip
        row = RowChoice(penalties=penalties)
        if place < sampling.min_tokens and len(self._ends):
            row = row._replace(barred=self._ends.astype(np.int32), barred_steps=sampling.min_tokens - place)
        if sampling.greedy:
            return row
        filters = TokenChoice(sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p)
        numbers = np.array([uniform(self._seed, place + step) for step in range(steps)], np.float64)
        return row._replace(filters=filters, numbers=numbers)

    def choose(self, logits: Floats, place: int) -> int:
        """Chooses the token at a position of the text and updates penalties, constraints and grammar with it.

        Args:
            logits: the model's logits, float32 [V]; not modified.
            place: position in the generated text, from 0.

        Raises:
            NotANumberError: the largest logit is not finite.
            NoTokenError: no token is allowed.
        """
        token = int(logits.argmax())
        if not np.isfinite(logits[token]):
            raise NotANumberError
        if not (self._plain and place >= self.sampling.min_tokens):
            logits = self._processed(logits, place)
            token = int(logits.argmax())
            if not np.isfinite(logits[token]):
                raise NoTokenError("logit_bias, min_tokens, bad_words, allowed_token_ids and the grammar allow no token")
        if self._sampled is not None:
            self._sampled.chosen_from(logits, place)
        if not self.sampling.greedy:
            token = self._draw(logits, place)
        self.took(token)
        return token

    def _draw(self, logits: Floats, place: int) -> int:
        if self._mirostat is not None:
            return self._mirostat.draw(logits / np.float32(self.sampling.temperature), uniform(self._seed, place))
        if self._filtered:
            return draw_filtered(logits, self.sampling, self._seed, place)
        return draw(logits, self.sampling, uniform(self._seed, place))

    def _processed(self, raw: Floats, place: int) -> Floats:
        logits: Floats = raw.copy()
        apply_changes(logits, self._changes(place))
        if self.grammar is not None and self._bits is not None and self.grammar.mask(self._bits):
            allowed = np.unpackbits(self._bits.view(np.uint8), bitorder="little")[: len(logits)]
            logits[allowed == 0] = -np.inf
        return logits

    def _changes(self, place: int) -> list[Change]:
        """What is done to the logits of the next token, besides the grammar's mask."""
        changes = [change for rule in self._rules for change in rule.changes()] + self._biases
        return [*changes, barred(self._ends)] if place < self.sampling.min_tokens else changes

    def took(self, token: int) -> None:
        """Updates penalties, constraints and grammar with a token of the text."""
        for rule in self._rules:
            rule.add(token)
        if self.grammar is not None:
            self.grammar.accept(token)

    def logprob(self, logits: Floats, token: int) -> TokenLogprob:
        """Returns the log probability to report for the token chosen last, from the model's logits, float32 [V]."""
        if self._sampled is not None:
            return self._sampled.of(token)
        top = largest_tokens(logits, self.sampling.logprobs or 0) if self.sampling.logprobs else np.zeros(0, np.int64)
        logprobs = log_probability(logits, np.concatenate([np.array([token], np.int64), top]))
        return TokenLogprob(token, float(logprobs[0]), tuple(zip(top.tolist(), logprobs[1:].tolist(), strict=True)))
