"""A model of Qwen2.5-VL's shape that reads a line of text in a picture, its tokenizer and its image processor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

START, PICTURE, END, VIDEO, STOP = "<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|video_pad|>", "<|end|>"
CHAT_TEMPLATE = (  # of a message, only the pictures: whatever is asked, the answer is the text in them
    "{% for message in messages %}{% if message['role'] == 'assistant' %}{{ message['content'] }}" + STOP + "{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}" + START + PICTURE + END + "{% endif %}{% endfor %}"
    "{% endif %}{% endfor %}"
)


@dataclass(frozen=True)
class Size:
    """Widths of a model, and how it is trained.

    Attributes:
        patch: width and height of a patch in pixels, each of which is a token: the upper or the lower half of a character.
        hidden: width of the tower and of the language model.
        layers: of each of the two.
        longest: characters of a line.
        batch: lines of a step.
        rate: the largest learning rate.
    """

    patch: int
    hidden: int
    layers: int
    longest: int
    batch: int
    rate: float

    @property
    def cells(self) -> int:
        """Width of a picture in patches; lines begin anywhere in the first one."""
        return self.longest + 1

    @property
    def pixels(self) -> int:
        """Of a picture, which is two patches high."""
        return 2 * self.cells * self.patch**2


SIZES = {
    "small": Size(12, 128, 2, longest=16, batch=32, rate=2e-3),
    "smallest": Size(8, 32, 1, longest=4, batch=16, rate=3e-3),
}


def make_tokenizer() -> Any:
    """A token for each byte, and for each mark."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=STOP, pad_token=STOP, chat_template=CHAT_TEMPLATE)
    tokenizer.add_special_tokens({"additional_special_tokens": [START, PICTURE, END, VIDEO]})
    return tokenizer


def make_image_processor(size: Size) -> Any:
    from transformers import Qwen2VLImageProcessorPil

    pixels = {"shortest_edge": size.pixels, "longest_edge": size.pixels}  # other pictures are scaled to that many
    return Qwen2VLImageProcessorPil(
        patch_size=size.patch, temporal_patch_size=1, merge_size=1, size=pixels, image_mean=[0.87] * 3, image_std=[0.25] * 3
    )


def make_model(size: Size, tokenizer: Any) -> Any:
    """A random `Qwen2_5_VLForConditionalGeneration`. Nearly all of RoPE counts columns, so that the language model can find the
    next one: the distance to it is the same for every character, as all pictures are of one width."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    heads, inner = size.hidden // 32, 2 * size.hidden
    start, picture, end, video = tokenizer.convert_tokens_to_ids([START, PICTURE, END, VIDEO])
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer), "hidden_size": size.hidden, "intermediate_size": inner,
            "num_hidden_layers": size.layers, "num_attention_heads": heads, "num_key_value_heads": heads,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10.0, "mrope_section": [1, 1, 14]},
            "max_position_embeddings": 512, "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={
            "depth": size.layers, "hidden_size": size.hidden, "intermediate_size": inner, "num_heads": heads,
            "patch_size": size.patch, "temporal_patch_size": 1, "spatial_merge_size": 1, "out_hidden_size": size.hidden,
            "window_size": 8 * size.patch, "fullatt_block_indexes": list(range(size.layers)),
        },
        image_token_id=picture, vision_start_token_id=start, vision_end_token_id=end,
        video_token_id=video, tie_word_embeddings=False,
    )  # fmt: skip
    return Qwen2_5_VLForConditionalGeneration(config)


class Batches:
    """What the model takes, of pictures and texts."""

    def __init__(self, tokenizer: Any, image_processor: Any) -> None:
        self._tokenizer, self._pictures = tokenizer, image_processor
        self._start, self._picture, self._end = tokenizer.convert_tokens_to_ids([START, PICTURE, END])

    def prompts(self, pictures: Sequence[Any]) -> tuple[list[list[int]], dict[str, Any]]:
        """Token ids of each prompt, and the model's arguments for all pictures."""
        arguments = dict(self._pictures(images=list(pictures), return_tensors="pt"))
        counts = (arguments["image_grid_thw"].prod(1) // self._pictures.merge_size**2).tolist()
        return [[self._start, *[self._picture] * count, self._end] for count in counts], arguments

    def training(self, pictures: Sequence[Any], texts: Sequence[str]) -> dict[str, Any]:
        """Arguments with labels: what is learned is the text after each picture."""
        prompts, arguments = self.prompts(pictures)
        answers = [[*ids, self._tokenizer.eos_token_id] for ids in self._tokenizer(list(texts))["input_ids"]]
        rows = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
        labels = [[-100] * len(prompt) + answer for prompt, answer in zip(prompts, answers, strict=True)]
        return arguments | self._padded(rows, left=False) | {"labels": _tensor(labels, -100, left=False)}

    def reading(self, pictures: Sequence[Any]) -> dict[str, Any]:
        """Arguments for `generate`."""
        prompts, arguments = self.prompts(pictures)
        return arguments | self._padded(prompts, left=True)

    def _padded(self, rows: list[list[int]], left: bool) -> dict[str, Any]:
        ids = _tensor(rows, self._tokenizer.pad_token_id, left)
        mask = _tensor([[1] * len(row) for row in rows], 0, left)
        return {"input_ids": ids, "attention_mask": mask, "mm_token_type_ids": (ids == self._picture).int()}


def _tensor(rows: list[list[int]], padding: int, left: bool) -> Any:
    import torch

    longest = max(map(len, rows))
    more = [[padding] * (longest - len(row)) for row in rows]
    return torch.tensor([m + row if left else row + m for row, m in zip(rows, more, strict=True)])
