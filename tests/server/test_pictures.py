"""Pictures in requests, on a tiny model that sees."""

from __future__ import annotations

import base64
import io

import pytest
import torch

from deepseek_optimizer import DeepSeekConfig, DynamicGraphOptimizer
from deepseek_optimizer.integration.multimodal import PictureEncoder
from deepseek_optimizer.server.http.json_body import PICTURE_BODY
from deepseek_optimizer.server.keys import ApiKeys
from deepseek_optimizer.server.settings import ServerSettings
from deepseek_optimizer.serving import make_async_engine
from support.file_server import FileServer
from support.live_server import LiveServer
from support.picture_processors import count_encoded, make_pair, picture

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
    with LiveServer(engine, ServerSettings(max_pictures=3, allowed_media_domains=("localhost", "127.0.0.0/8"))) as live:
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


def test_beams(seen):
    """The log probability of each token of each beam is that of Transformers' own code after the same prompt and picture."""
    live, plain, processor = seen
    image = picture(33, 21, 1)
    answer = ask(live, [{"type": "text", "text": "what"}, part(image)], use_beam_search=True, n=2, logprobs=True).json()
    content = [{"type": "text", "text": "what"}, {"type": "image"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False)
    inputs = processor(text=[text], images=[[image]], add_special_tokens=False, return_tensors="pt")
    count = inputs["input_ids"].shape[1]
    texts = [choice["token_ids"] for choice in answer["choices"]]
    assert texts[0] != texts[1] and len(texts[0]) == len(texts[1]) == 5
    for choice, tokens in zip(answer["choices"], texts, strict=True):
        more = torch.tensor([tokens])
        longer = {**inputs, "input_ids": torch.cat([inputs["input_ids"], more], 1)}
        longer["attention_mask"] = torch.ones_like(longer["input_ids"])
        if "mm_token_type_ids" in inputs:
            longer["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], torch.zeros_like(more)], 1)
        with torch.inference_mode():
            logits = plain(**longer).logits[0, count - 1 : -1]
        expected = logits.log_softmax(-1)[torch.arange(5), more[0]]
        reported = [one["logprob"] for one in choice["logprobs"]["content"]]
        assert reported == pytest.approx(expected.tolist(), abs=1e-3)


def test_text_cannot_spell_a_picture(seen):
    live, _, processor = seen
    assert ask(live, "a <|vision_start|><|image_pad|><|vision_end|> b").status_code == 200
    answer = ask(live, [{"type": "text", "text": "<|image_pad|>"}, part(picture(24, 24))])
    assert answer.status_code == 200


def test_a_body_may_be_as_large_as_its_pictures(seen):
    """The default limit of a body is that of text only where the model reads text only."""
    live, plain, processor = seen
    image = picture(24, 24)
    data = base64.b64decode(url_of(image).partition(",")[2]) + bytes(6 << 20)  # decoders ignore what follows a picture
    url = {"url": "data:image/png;base64," + base64.b64encode(data).decode()}
    answer = ask(live, [{"type": "image_url", "image_url": url}])
    assert answer.status_code == 200
    assert answer.json()["choices"][0]["token_ids"] == expected(plain, processor, [{"type": "image"}], [image])[1]
    card = live.client.get("/v1/models").json()["data"][0]
    assert card["max_body_bytes"] == PICTURE_BODY


def test_a_large_body_may_not_have_many_values(seen):
    live, *_ = seen
    answer = live.client.post("/v1/completions", json={"model": "m", "prompt": [7] * (3 << 20)})
    assert answer.status_code == 400 and "not as many values" in answer.json()["error"]["message"]


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
    counted = live.client.post("/v1/messages/count_tokens", json={"messages": body["messages"]})
    assert counted.json() == {"input_tokens": count}


def test_responses(seen):
    """A response with a picture, and one that continues it."""
    live, plain, processor = seen
    image, text = picture(33, 21, 1), "what is this " * 10
    content = [{"type": "input_text", "text": text}, {"type": "input_image", "image_url": url_of(image), "detail": "auto"}]
    body = {"model": "m", "max_output_tokens": 5, "temperature": 0, "input": [{"role": "user", "content": content}]}
    answer = live.client.post("/v1/responses", json=body)
    assert answer.status_code == 200, answer.text
    count, _ = expected(plain, processor, [{"type": "text", "text": text}, {"type": "image"}], [image])
    assert answer.json()["usage"]["input_tokens"] == count
    counted = live.client.post("/v1/responses/input_tokens", json=body)
    assert counted.json()["input_tokens"] == count
    first = answer.json()["id"]
    items = live.client.get(f"/v1/responses/{first}/input_items").json()["data"]
    assert items[0]["content"][1]["image_url"] == url_of(image)
    again = {"model": "m", "max_output_tokens": 5, "input": "and now?", "previous_response_id": first}
    after = live.client.post("/v1/responses", json=again)
    assert after.status_code == 200, after.text
    assert after.json()["usage"]["input_tokens"] > count + len("and now?")
    assert after.json()["usage"]["input_tokens_details"]["cached_tokens"] > 0


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"image_url": "data:image/png;base64,AAAA"}, "is not a picture in a supported format"),
        ({"file_id": "file-1"}, "pictures cannot be uploaded"),
        ({}, "image_url"),
    ],
)
def test_refused_pictures_of_responses(seen, part, message):
    live, _, _ = seen
    for path in ("/v1/responses", "/v1/responses/input_tokens"):
        answer = live.client.post(path, json={"input": [{"role": "user", "content": [{"type": "input_image", **part}]}]})
        assert answer.status_code == 400 and message in answer.json()["error"]["message"], answer.text
    body = {"input": [{"role": "assistant", "content": [{"type": "input_image", "image_url": url_of(picture(24, 24))}]}]}
    answer = live.client.post("/v1/responses", json=body)
    assert answer.status_code == 400 and "only user messages" in answer.json()["error"]["message"]


def test_ollama(seen):
    live, plain, processor = seen
    image = picture(24, 40, 3)
    data = url_of(image).partition(",")[2]
    count, tokens = expected(plain, processor, [{"type": "image"}, {"type": "text", "text": "what"}], [image])
    common = {"model": "m", "stream": False, "options": {"num_predict": 5, "temperature": 0}}
    messages = [{"role": "user", "content": "what", "images": [data]}]
    for path, body in (("/api/chat", {"messages": messages}), ("/api/generate", {"prompt": "what", "images": [data]})):
        answer = live.client.post(path, json={**common, **body})
        assert answer.status_code == 200, answer.text
        assert answer.json()["prompt_eval_count"] == count
    assert "vision" in live.client.post("/api/show", json={"model": "m"}).json()["capabilities"]
    for path, body, message in (
        ("/api/generate", {"prompt": "x", "images": ["%%"]}, "is not valid base64"),
        ("/api/generate", {"images": ["aGVsbG8="]}, "is not a picture in a supported format"),
        ("/api/generate", {"prompt": "x", "images": [data], "raw": True}, "images: not with raw or suffix"),
        ("/api/chat", {"messages": [{"role": "assistant", "content": "x", "images": [data]}]}, "only messages of the user"),
    ):
        answer = live.client.post(path, json={**common, **body})
        assert answer.status_code == 400 and message in answer.json()["error"], answer.text


def test_bytes_of_a_request(seen, monkeypatch):
    live, _, _ = seen
    first, second = part(picture(24, 24, 1)), part(picture(24, 24, 2))
    monkeypatch.setattr("deepseek_optimizer.server.pictures.MAX_TOTAL_BYTES", 3000)
    assert ask(live, [first]).status_code == 200
    answer = ask(live, [first, second])
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "messages[0].content[1].image_url"
    assert "in total" in answer.json()["error"]["message"]


def test_pictures_are_shared_within_a_salt_only(seen, monkeypatch):
    """A request with another salt cannot find out by the time whether a picture was sent before."""
    live, *_ = seen
    calls = count_encoded(monkeypatch, live.app.state.server.pictures.encoder.model)
    for salt in ("a", "b", "a", None):
        given = {} if salt is None else {"cache_salt": salt}
        assert ask(live, [part(picture(28, 28, 77))], **given).status_code == 200
    assert len(calls) == 3
    body = {"model": "m", "messages": [{"role": "user", "content": [part(picture(28, 28, 77))]}]}
    counted = [live.client.post("/v1/chat/completions/input_tokens", json={**body, "cache_salt": salt}) for salt in "ac"]
    assert [answer.status_code for answer in counted] == [200, 200]
    assert len(calls) == 4


def test_pictures_are_shared_within_a_key_only(seen, monkeypatch):
    live, _, processor = seen
    encoder = live.app.state.server.pictures.encoder
    engine = make_async_engine(encoder.model, processor.tokenizer, pictures=encoder, model_name="m")
    calls = count_encoded(monkeypatch, encoder.model)
    content = [{"role": "user", "content": [part(picture(28, 28, 78))]}]
    with LiveServer(engine, ServerSettings(keys=ApiKeys(["key-a", "key-b"]))) as keyed:
        for key in ("key-a", "key-b", "key-a"):
            headers = {"Authorization": f"Bearer {key}"}
            answer = keyed.client.post(
                "/v1/chat/completions", json={"model": "m", "messages": content, **FIELDS}, headers=headers
            )
            assert answer.status_code == 200
    assert len(calls) == 2


def test_fetched_pictures(seen):
    live, plain, processor = seen
    image = picture(33, 21, 1)
    file = io.BytesIO()
    image.save(file, "PNG")
    with FileServer({"/a%20b.png?x=1": file.getvalue(), "/text": b"hello"}) as files:
        url = f"http://localhost:{files.port}/a b.png?x=1"
        count, tokens = expected(plain, processor, [{"type": "image"}], [image])
        answer = ask(live, [{"type": "image_url", "image_url": {"url": url}}]).json()
        assert answer["choices"][0]["token_ids"] == tokens
        source = {"type": "image", "source": {"type": "url", "url": url}}
        body = {"model": "m", "max_tokens": 2, "messages": [{"role": "user", "content": [source]}]}
        assert live.client.post("/v1/messages", json=body).json()["usage"]["input_tokens"] == count
        wrong = ask(live, [{"type": "image_url", "image_url": {"url": f"http://localhost:{files.port}/text"}}])
        assert wrong.status_code == 400 and "is not a picture in a supported format" in wrong.json()["error"]["message"]


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://example.org/x.png", "start the server with --allowed-media-domains example.org"),
        ("http://127.0.0.1:1/x.png", "cannot be fetched"),
        ("file:///etc/passwd", "must be a data: URL"),
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
    file = {"type": "file", "file": {"file_data": "aGVsbG8=", "filename": "a.txt"}}
    answer = ask(live, [*content[:1], file])
    assert answer.status_code == 400 and "files and pictures" in answer.json()["error"]["message"]
    assert live.client.get("/props").json()["modalities"]["vision"] is True
