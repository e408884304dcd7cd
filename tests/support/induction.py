"""A Llama of two layers that copies what followed an earlier occurrence of the last token; its weights are set, not trained.

An induction head (Elhage et al. 2021; Olsson et al. 2022) answers "... K V ... K" with V. Every token has its own element of
the residual stream. Layer 1 attends to the previous position, by RoPE alone, and writes its token into other elements. Layer 2
queries with the current token for a position that follows this token, and copies that position's token; if there is none, its
heads attend to the text's first token (BOS), as heads of trained models do, and the model answers BOS.

RoPE: theta is so large that the first pairs of a head rotate fast enough to distinguish the previous position from all others,
and the rest does not rotate noticeably within the context; tokens are compared in those. Only one element of a key identifies
the token, so the element-wise maximum of a block's keys shows whether the block contains it.

If a token occurred several times, all of its occurrences count equally.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

BOS = 0
THETA = 1e24
STILL = 0.1  # radians over the whole context: a pair that rotates less counts as fixed
MARGIN = 50.0  # between scores, in nats; bf16 rounding takes some of it, and 131,072 keys take ln(131072) = 11.8


def induction_model(
    vocab: int = 45, max_positions: int = 131_072, *, heads: int = 2, kv_heads: int = 1, head_dim: int = 64
) -> Any:
    """The model in bf16, which can be saved and loaded like any other.

    Args:
        vocab: number of tokens, including BOS; a key head distinguishes about `0.7 * head_dim` of them, and the tokens are
            divided among the heads.

    Raises: ValueError, more tokens than the key heads can distinguish.
    """
    turning, still = _pairs(head_dim, max_positions)
    numbers = [*still, *(pair + head_dim // 2 for pair in still)]
    sink = numbers.pop()
    if vocab > kv_heads * len(numbers):
        raise ValueError(f"{kv_heads} key heads of {head_dim} tell {kv_heads * len(numbers)} tokens apart, not {vocab}")
    places = [(token // len(numbers), numbers[token % len(numbers)]) for token in range(vocab)]  # token -> key head, element
    config = LlamaConfig(
        hidden_size=-(-(2 * vocab + head_dim + 1) // 32) * 32, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim, vocab_size=vocab,
        max_position_embeddings=max_positions, rms_norm_eps=1e-9, tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": THETA}, bos_token_id=BOS, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    made = _Weights(model, vocab, places, sink)
    made.embedding_and_head()
    made.look_back(turning, max_positions)
    made.look_up()
    return model.to(torch.bfloat16)


@dataclass(frozen=True)
class Haystack:
    """ids: BOS and fillers, with each of `keys` once, at `places`, followed by its value; then all keys again as questions, so
    that after the last `len(keys)` tokens the model answers `values`."""

    ids: list[int]
    keys: list[int]
    values: list[int]
    places: list[int]

    @property
    def length(self) -> int:
        """Tokens before the questions."""
        return len(self.ids) - len(self.keys)


def haystack(vocab: int, length: int, depths: Sequence[float], seed: int = 0) -> Haystack:
    """`length` tokens in total, with a needle at each of `depths`, from 0 (directly after BOS) to 1 (directly before the
    questions). Needles that would overlap are placed one after the other.

    Raises: ValueError, too many needles for the length or the number of tokens.
    """
    count = len(depths)
    generator = torch.Generator().manual_seed(seed)
    order = (torch.randperm(vocab - 1, generator=generator) + 1).tolist()
    keys, fillers = order[:count], torch.tensor(order[count:])
    last = length - count - 2
    if count >= vocab - 1 or last < 2 * count:
        raise ValueError(f"{count} needles do not go into {length} tokens of {vocab} kinds")
    ids = fillers[torch.randint(len(fillers), (length,), generator=generator)]
    places: list[int] = []
    for number, depth in enumerate(sorted(depths)):
        wanted = min(1 + round(depth * (last - 1)), last - 2 * (count - 1 - number))
        places.append(max(wanted, places[-1] + 2 if places else 1))
    where = torch.tensor(places)
    ids[0], ids[where], ids[length - count :] = BOS, torch.tensor(keys), torch.tensor(keys)
    return Haystack(ids.tolist(), keys, ids[where + 1].tolist(), places)


def _pairs(head_dim: int, max_positions: int) -> tuple[list[int], list[int]]:
    """The pairs of elements that rotate within the context, and those that do not."""
    pairs = range(head_dim // 2)
    turning = [pair for pair in pairs if _frequency(pair, head_dim) * max_positions >= STILL]
    return turning, list(pairs[len(turning) :])


def _frequency(pair: int, head_dim: int) -> float:
    return float(THETA ** (-2 * pair / head_dim))


@dataclass
class _Weights:
    """Sets a model's weights. The residual stream: [vocab] the token, [vocab] the token before it, [head_dim] the copied
    value, a constant 1."""

    model: Any
    vocab: int
    places: list[tuple[int, int]]
    sink: int

    def __post_init__(self) -> None:
        config = self.model.config
        self.size, self.width = config.head_dim, config.hidden_size
        self.heads, self.group = config.num_attention_heads, config.num_attention_heads // config.num_key_value_heads
        self.before, self.copied, self.one = self.vocab, 2 * self.vocab, 2 * self.vocab + self.size
        self.scale = self.size**0.5  # scores are divided by it
        for parameter in self.model.parameters():
            parameter.data.zero_()
        generator = torch.Generator().manual_seed(0)
        self.codes = torch.randint(0, 2, (self.vocab, self.size), generator=generator) * 2.0 - 1  # codes of values
        self.codes[BOS] = 0

    def embedding_and_head(self) -> None:
        self.model.model.embed_tokens.weight.data[:, : self.vocab] = torch.eye(self.vocab)
        self.model.model.embed_tokens.weight.data[:, self.one] = 1
        self.model.model.norm.weight.data.fill_(1)
        self.model.lm_head.weight.data[:, self.copied : self.one] = self.codes
        self.model.lm_head.weight.data[BOS, self.one] = 1  # the answer only if no value was copied

    def look_back(self, turning: list[int], max_positions: int) -> None:
        """Layer 1: the score of the previous position exceeds all others by at least MARGIN; copies its token to `before`."""
        attention = self._layer(0, ones=2)
        frequencies = torch.tensor([_frequency(pair, self.size) for pair in turning], dtype=torch.float64)
        away = torch.cat([torch.tensor([-1.0]), torch.arange(1.0, max_positions)]).double()  # from the previous position
        least = (1 - torch.cos(away[:, None] * frequencies)).sum(1).min()
        sharpness = self.scale * MARGIN / float(least)
        for head in range(self.heads):
            for pair, frequency in zip(turning, frequencies, strict=True):  # the query is rotated to the previous position
                self._row(attention.q_proj, head, pair)[self.one] = sharpness * torch.cos(frequency)
                self._row(attention.q_proj, head, pair + self.size // 2)[self.one] = -sharpness * torch.sin(frequency)
                self._row(attention.k_proj, head // self.group, pair)[self.one] = 1
        for token, (kv_head, number) in enumerate(self.places):
            self._row(attention.v_proj, kv_head, number)[token] = 1
            for head in range(kv_head * self.group, (kv_head + 1) * self.group):
                attention.o_proj.weight.data[self.before + token, head * self.size + number] = 1 / self.group

    def look_up(self) -> None:
        """Layer 2: score 2 * MARGIN where the token before is the current one, MARGIN at BOS, 0 elsewhere. The heads of a group
        divide its tokens among them."""
        attention = self._layer(1, ones=3)
        for token, (kv_head, number) in enumerate(self.places):
            head = kv_head * self.group + token % self.group
            self._row(attention.q_proj, head, number)[token] = 2 * MARGIN * self.scale
            self._row(attention.k_proj, kv_head, number)[self.before + token] = 1
        for head in range(self.heads):
            kv_head, numbers = head // self.group, slice(head * self.size, (head + 1) * self.size)
            self._row(attention.q_proj, head, self.sink)[self.one] = MARGIN * self.scale
            self._row(attention.k_proj, kv_head, self.sink)[BOS] = 1
            values = slice(kv_head * self.size, (kv_head + 1) * self.size)
            attention.v_proj.weight.data[values, : self.vocab] = self.codes.T
            attention.o_proj.weight.data[self.copied : self.one, numbers] = torch.eye(self.size)

    def _layer(self, number: int, ones: int) -> Any:
        """A layer's attention. The norm before it does not change a residual of `ones` ones and otherwise zeros."""
        layer = self.model.model.layers[number]
        layer.input_layernorm.weight.data.fill_((ones / self.width) ** 0.5)
        layer.post_attention_layernorm.weight.data.fill_(1)
        return layer.self_attn

    def _row(self, projection: Any, head: int, number: int) -> Any:
        return projection.weight.data[head * self.size + number]
