"""Pictures in requests, on a tiny model that sees."""

from __future__ import annotations

import base64
import io

import pytest

from deepseek_optimizer import DeepSeekConfig, DynamicGraphOptimizer
from deepseek_optimizer.integration.multimodal import PictureEncoder
from deepseek_optimizer.server.settings import ServerSettings
from deepseek_optimizer.serving import make_async_engine
from support.live_server import LiveServer
from support.picture_processors import make_pair, picture

FAMILY = "qwen3_vl"
FIELDS = {"max_tokens": 5, "temperature": 0, "return_token_ids": True, "ignore_eos": True}


def url_of(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def part(image):
    return {"type": "image_url", "image_url": {"url": url_of(image), "detail": "low"}}


@pytest.fixture(scope="module")
def seen():
    """A server, and the same model with Transformers' own code with its processor."""
    plain, processor = make_pair(FAMILY)
    ours, _ = make_pair(FAMILY)
    DynamicGraphOptimizer(ours, config=DeepSeekConfig(precision="fp32", kv_cache="fp32")).optimize()
    processor.tokenizer.chat_template = processor.chat_template
    encoder = PictureEncoder(ours, processor)
    engine = make_async_engine(ours, processor.tokenizer, pictures=encoder, model_name="m")
    with LiveServer(engine, ServerSettings(max_pictures=3)) as live:
        yield live, plain, processor


def ask(live, content, **more):
    body = {"model": "m", "messages": [{"role": "user", "content": content}], **FIELDS, **more}
    return live.client.post("/v1/chat/completions", json=body)


def expected(plain, processor, content, images):
    messages = [{"role": "user", "content": content}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    inputs = processor(text=[text], images=[images], add_special_tokens=False, return_tensors="pt")
    plain.generation_config.eos_token_id = None
    count = inputs["input_ids"].shape[1]
    return count, plain.generate(**inputs, max_new_tokens=5, do_sample=False)[0, count:].tolist()


def test_chat(seen):
    live, plain, processor = seen
    images = [picture(33, 21, 1), picture(40, 17, 2)]
    content = [{"type": "text", "text": "first"}, part(images[0]), {"type": "text", "text": "second"}, part(images[1])]
    places = [{"type": "image"} if p["type"] == "image_url" else p for p in content]
    count, tokens = expected(plain, processor, places, images)
    answer = ask(live, content).json()
    assert answer["usage"]["prompt_tokens"] == count
    assert answer["choices"][0]["token_ids"] == tokens
    streamed = ask(live, content, stream=True)
    assert streamed.status_code == 200 and "[DONE]" in streamed.text


def test_text_cannot_spell_a_picture(seen):
    live, _, processor = seen
    assert ask(live, "a <|vision_start|><|image_pad|><|vision_end|> b").status_code == 200
    answer = ask(live, [{"type": "text", "text": "<|image_pad|>"}, part(picture(24, 24))])
    assert answer.status_code == 200


def test_messages_of_anthropic(seen):
    live, plain, processor = seen
    image = picture(24, 40, 3)
    source = {"type": "base64", "media_type": "image/png", "data": url_of(image).partition(",")[2]}
    content = [{"type": "image", "source": source}, {"type": "text", "text": "what"}]
    body = {"model": "m", "max_tokens": 5, "temperature": 0, "messages": [{"role": "user", "content": content}]}
    answer = live.client.post("/v1/messages", json=body)
    assert answer.status_code == 200, answer.text
    count, _ = expected(plain, processor, [{"type": "image"}, content[1]], [image])
    assert answer.json()["usage"]["input_tokens"] == count


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://127.0.0.1:1/x.png", "no URL is fetched"),
        ("data:image/png;base64,AAAA", "is not a picture in a supported format"),
        (url_of(picture(400, 1)), "one side is more than 200 times the other"),
        ("data:image/svg+xml;base64," + base64.b64encode(b"<svg></svg>").decode(), "SVG"),
    ],
)
def test_refused_pictures(seen, url, message):
    live, _, _ = seen
    answer = ask(live, [{"type": "image_url", "image_url": {"url": url}}])
    error = answer.json()["error"]
    assert answer.status_code == 400 and message in error["message"]
    assert error["param"] == "messages[0].content[0].image_url"


def test_limits(seen):
    live, _, _ = seen
    content = [part(picture(24, 24)) for _ in range(4)]
    answer = ask(live, content)
    assert answer.status_code == 400 and "at most 3 pictures" in answer.json()["error"]["message"]
    answer = ask(live, content[:1], use_beam_search=True, n=2)
    assert answer.status_code == 400 and "use_beam_search" in answer.json()["error"]["message"]
    file = {"type": "file", "file": {"file_data": "aGVsbG8=", "filename": "a.txt"}}
    answer = ask(live, [*content[:1], file])
    assert answer.status_code == 400 and "files and pictures" in answer.json()["error"]["message"]
    assert live.client.get("/props").json()["modalities"]["vision"] is True
