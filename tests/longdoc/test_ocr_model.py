"""The answers of models that read pages, and such a model itself."""

from __future__ import annotations

from typing import Any

import pytest

from deepseek_optimizer.chat.local import picture_prompt
from deepseek_optimizer.errors import ConfigError
from deepseek_optimizer.longdoc.ocr_model import OcrModel, lines_of
from deepseek_optimizer.longdoc.recognized import RecognizedLine

Image = pytest.importorskip("PIL.Image", reason="needs Pillow")


def mark(label: str, *boxes: list[int]) -> str:
    return f"<|ref|>{label}<|/ref|><|det|>{list(boxes)}<|/det|>"


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("", []),
        (" \n", []),
        ("# Title\n\nText.\n", [("# Title\n\nText.", None)]),
        (
            f"{mark('title', [0, 0, 999, 99])}\n# Title\n\n{mark('text', [0, 111, 333, 222])}\nText.\nMore.\n<|end|>",
            [("# Title\n", (0.0, 0.0, 1.0, 99 / 999)), ("Text.\nMore.", (0.0, 111 / 999, 333 / 999, 222 / 999))],
        ),
        (
            f"{mark('Some words', [1, 2, 3, 4])}\n{mark('image', [5, 6, 7, 8])}\n",
            [("Some words", (1 / 999, 2 / 999, 3 / 999, 4 / 999))],
        ),
        (f"{mark('text', [0, 0, 111, 111], [0, 222, 222, 333])}Two", [("Two", (0.0, 0.0, 222 / 999, 333 / 999))]),
        (f"{mark('text', [5, 5, 5, 9])}Flat", [("Flat", None)]),
        (f"{mark('text', [1, 2, 3])}Three", [("Three", None)]),
        (f"{mark('text')}None", [("None", None)]),
        (f"{mark('text', [0, 0, 99999, 999999])}Large", [("Large", (0.0, 0.0, 1.0, 1.0))]),
        ("<|ref|>text<|/ref|><|det|>[[1, 2", [("text[[1, 2", None)]),
        ("before <|ref|>x<|/ref|> after", [("before x after", None)]),
    ],
)  # fmt: skip
def test_lines_and_boxes(text: str, lines: list[tuple[str, Any]]) -> None:
    assert [(line.text.strip(), line.box) for line in lines_of(text)] == [(text.strip(), box) for text, box in lines]


def test_many_unfinished_marks_take_linear_time() -> None:
    """An answer is at most some thousand tokens, but those may be anything."""
    assert lines_of("<|ref|>" * 20_000) == []
    assert isinstance(lines_of("<|ref|>a<|/ref|><|det|>" + "[" * 20_000)[0], RecognizedLine)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from support.picture_processors import save_pair

    folder = tmp_path_factory.mktemp("seeing")
    save_pair(folder)
    return folder


def test_a_model_reads_a_picture(folder: Any, tmp_path: Any) -> None:
    """Its text is what `generate` of the engine gives for the prompt with the picture."""
    from deepseek_optimizer import load_model, load_tokenizer, make_engine
    from deepseek_optimizer.chat.local import answer
    from deepseek_optimizer.chat.pictures import load_processor
    from deepseek_optimizer.engine.request import SamplingParams
    from deepseek_optimizer.integration.multimodal import PictureEncoder
    from support.picture_processors import picture

    image = picture(60, 80, 1)
    image.save(tmp_path / "a.png")
    with OcrModel(str(folder), prompt="Read", max_tokens=12) as reader:
        lines = reader.read(image)
        assert reader.truncated == 1
    model, tokenizer = load_model(str(folder)), load_tokenizer(str(folder))
    encoder = PictureEncoder(model, load_processor(str(folder)))
    messages = [{"role": "user", "content": "Read", "pictures": [str(tmp_path / "a.png")]}]
    tokens, rows = picture_prompt(encoder, messages)
    sampling = SamplingParams(temperature=0.0, max_tokens=12, skip_special_tokens=False)
    with make_engine(model, tokenizer) as engine:
        found = answer(engine, tokens, lambda _: None, sampling, pictures=rows)
    assert found.new_tokens == 12
    assert [line.text for line in lines] == [line.text for line in lines_of(found.text)]


def test_nothing_is_kept_of_a_page(folder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server reads the pages of all its clients with one model. A page that is read again takes as long as at first, so that
    nobody can find out by the time who else has sent it."""
    from deepseek_optimizer.longdoc import ocr_model
    from support.picture_processors import count_encoded, picture

    found, answer = [], ocr_model.answer

    def recorded(*args: Any, **more: Any) -> Any:
        found.append(answer(*args, **more))
        return found[-1]

    monkeypatch.setattr(ocr_model, "answer", recorded)
    with OcrModel(str(folder), prompt="Read all of this page " * 4, max_tokens=3) as reader:
        _, encoder = reader.load()
        encoded = count_encoded(monkeypatch, encoder.model)
        first, second = (reader.read(picture(60, 80, 1)) for _ in range(2))
    assert first == second
    assert len(encoded) == 2
    assert [one.cached_tokens for one in found] == [0, 0]
    assert found[0].prompt_tokens >= 64, "long enough for blocks in a prefix cache"


def test_errors(folder: Any, tiny_model: Any) -> None:
    from support.picture_processors import picture

    with pytest.raises(ConfigError, match="this model reads text only; --ocr needs one that sees"):
        OcrModel(str(tiny_model)).read(picture(30, 40))
    with pytest.raises(ConfigError, match="max_tokens"):
        OcrModel(str(folder), max_tokens=0)
