"""Samples the tokens of one request: applies penalties, biases and grammar, then chooses a token. Does not import torch.

Drafts are verified by choosing a token without regard to them and comparing. A deterministic draft is thus accepted with the
probability that the model assigns to it, so the text has the distribution of plain sampling. Since each position in the text
has its own random number, it is even the same text.
"""

from __future__ import annotations

import secrets

import numpy as np
import numpy.typing as npt

from ...backends.sampling import GREEDY, Floats, TokenChoice, draw, largest_tokens, log_probability, uniform
from ..request import Request, TokenLogprob

Bools = npt.NDArray[np.bool_]


# Logits divided by it and by any temperature are finite. Smaller penalties have the same effect: a token seen is certain.
_MIN_PENALTY = 1e-25


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
        self._seen: Bools | None = None  # tokens of prompt and text
        if sampling.repetition_penalty != 1:
            self._seen = np.zeros(vocab_size, np.bool_)
            self._seen[request.prompt] = True
        self._counts: dict[int, int] | None = None  # of the text's tokens
        if sampling.presence_penalty or sampling.frequency_penalty:
            self._counts = {}
        biases = sampling.logit_bias
        self._biased = np.array(list(biases), np.int64)
        self._bias = np.array([-np.inf if b <= -100 else b for b in biases.values()], np.float32)
        self._ends = np.array(sorted({*eos, *sampling.stop_token_ids}), np.int64)
        # Whether logits are used unchanged after `min_tokens`: the most likely token is then that of the model.
        self._plain = self._seen is None and self._counts is None and not len(self._biased) and self.grammar is None
        self._by_backend = self._plain and sampling.logprobs is None

    def choice(self, place: int) -> TokenChoice | None:
        """Returns how a backend can choose the token at a position of the text by itself, without changing the state here.

        Args:
            place: position in the generated text, from 0.

        Returns: None if the logits are needed here: for penalties, biases, a grammar, `min_tokens` or log probabilities.
        """
        sampling = self.sampling
        if not self._by_backend or place < sampling.min_tokens:
            return None
        if sampling.greedy:
            return GREEDY
        return TokenChoice(sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p, uniform(self._seed, place))

    def choose(self, logits: Floats, place: int) -> int:
        """Chooses the token at a position of the text and updates penalties and grammar with it.

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
                raise NoTokenError("logit_bias, min_tokens and the grammar allow no token")
        if not self.sampling.greedy:
            token = draw(logits, self.sampling, uniform(self._seed, place))
        self._took(token)
        return token

    def _processed(self, raw: Floats, place: int) -> Floats:
        sampling = self.sampling
        logits: Floats = raw.copy()
        if self._seen is not None:
            seen = logits[self._seen]
            penalty = np.float32(max(sampling.repetition_penalty, _MIN_PENALTY))
            logits[self._seen] = np.where(seen < 0, seen * penalty, seen / penalty)
        if self._counts:
            tokens = np.fromiter(self._counts, np.int64)
            counts = np.fromiter(self._counts.values(), np.float32)
            logits[tokens] -= np.float32(sampling.frequency_penalty) * counts + np.float32(sampling.presence_penalty)
        if len(self._biased):
            logits[self._biased] += self._bias
        if place < sampling.min_tokens:
            logits[self._ends] = -np.inf
        if self.grammar is not None and self._bits is not None and self.grammar.mask(self._bits):
            allowed = np.unpackbits(self._bits.view(np.uint8), bitorder="little")[: len(logits)]
            logits[allowed == 0] = -np.inf
        return logits

    def _took(self, token: int) -> None:
        if self._seen is not None:
            self._seen[token] = True
        if self._counts is not None:
            self._counts[token] = self._counts.get(token, 0) + 1
        if self.grammar is not None:
            self.grammar.accept(token)

    def logprob(self, logits: Floats, token: int) -> TokenLogprob:
        """Returns the log probability to report for a chosen token, from the model's logits, float32 [V]."""
        top = largest_tokens(logits, self.sampling.logprobs or 0) if self.sampling.logprobs else np.zeros(0, np.int64)
        logprobs = log_probability(logits, np.concatenate([np.array([token], np.int64), top]))
        return TokenLogprob(token, float(logprobs[0]), tuple(zip(top.tolist(), logprobs[1:].tolist(), strict=True)))
