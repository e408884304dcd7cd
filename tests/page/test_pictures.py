"""Pictures on the chat page: chosen, pasted, dropped, photographed, removed, sent, and kept with the conversation."""

from __future__ import annotations

import base64
import io
import struct
import zlib
from collections.abc import Callable
from typing import Any

import pytest

from support.fake_chat_server import FakeChatServer, Reply

Image = pytest.importorskip("PIL.Image", reason="needs Pillow")

PHONE: dict[str, Any] = {"viewport": {"width": 360, "height": 640}, "has_touch": True, "is_mobile": True}
WIDE: dict[str, Any] = {"viewport": {"width": 1200, "height": 800}}
NOT_OK = ["Failed to load resource"]
# Puts files, [[name, type, base64]], on the page as a user does: "paste", or "drop" after "dragenter".
PUT = """([files, kind]) => {
  const data = new DataTransfer();
  for (const [name, type, text] of files) {
    data.items.add(new File([Uint8Array.from(atob(text), (one) => one.charCodeAt(0))], name, { type }));
  }
  const options = { bubbles: true, cancelable: true };
  const event = kind === 'paste'
    ? new ClipboardEvent(kind, { clipboardData: data, ...options })
    : new DragEvent(kind, { dataTransfer: data, ...options });
  document.getElementById('message').dispatchEvent(event);
}"""
STORED = """async () => {
  const open = indexedDB.open('deepseek-optimizer-chat');
  await new Promise((done) => (open.onsuccess = done));
  const all = open.result.transaction('conversations').objectStore('conversations').getAll();
  await new Promise((done) => (all.onsuccess = done));
  return all.result;
}"""


def encoded(image: Any, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def plain(width: int = 60, height: int = 40, color: Any = (200, 30, 30)) -> Any:
    return Image.new("RGB", (width, height), color)


def noise(width: int, height: int) -> Any:
    """A picture that does not compress."""
    return Image.effect_noise((width, height), 100).convert("RGB")


@pytest.fixture
def sees(server: FakeChatServer) -> FakeChatServer:
    server.models[0] |= {"max_pictures": 4, "max_body_bytes": 4 << 20}
    return server


def put(chat: Any, kind: str, *files: tuple[str, str, bytes]) -> None:
    chat.page.evaluate(PUT, [[[name, type, base64.b64encode(data).decode()] for name, type, data in files], kind])


def choose(chat: Any, *files: tuple[str, str, bytes], field: str = "#picture-input") -> None:
    chat.page.set_input_files(field, [{"name": name, "mimeType": type, "buffer": data} for name, type, data in files])


def wait_pictures(chat: Any, count: int, where: str = "#files") -> None:
    """Waits until there are this many thumbnails and nothing is being read."""
    chat.page.wait_for_function(
        "([where, n]) => document.querySelectorAll(`${where} .picture img`).length === n"
        " && ![...document.querySelectorAll('#files .chip-below')].some((one) => one.textContent === 'Reading…')",
        arg=[where, count],
    )


def sent(chat: Any, message: int = -1) -> list[Any]:
    """The pictures of a message of the last request, decoded."""
    content = chat.messages()[message]["content"]
    urls = [part["image_url"]["url"] for part in content if part["type"] == "image_url"]  # type: ignore[index]
    return [Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) for url in urls]


def errors(chat: Any) -> list[str]:
    chat.page.wait_for_selector(".chip.failed")
    found: list[str] = chat.page.locator(".chip.failed .chip-below").all_inner_texts()
    return found


def test_a_text_model_gets_documents_only(chat: Any) -> None:
    with chat.page.expect_file_chooser():
        chat.page.click("#attach")
    assert chat.page.get_attribute("#attach", "aria-label") == "Attach documents"
    assert not chat.page.locator("#attach-menu").is_visible()


@pytest.mark.every_run
def test_chosen_sent_shown_and_kept(sees: FakeChatServer, chat: Any) -> None:
    chat.page.click("#attach")
    assert chat.page.locator("#attach-menu button:visible").all_inner_texts() == ["Choose pictures", "Attach documents"]
    with chat.page.expect_file_chooser() as choosing:
        chat.page.click("#menu-picture")
    assert choosing.value.is_multiple()
    files = [("red.png", plain()), ("blue.png", plain(40, 60, (20, 30, 200)))]
    choosing.value.set_files([{"name": n, "mimeType": "image/png", "buffer": encoded(i)} for n, i in files])
    wait_pictures(chat, 2)
    chat.ask("What is this?")
    first, second = sent(chat)
    assert (first.size, first.getpixel((5, 5))[:3]) == ((60, 40), (200, 30, 30))
    assert (second.size, second.getpixel((5, 5))[:3]) == ((40, 60), (20, 30, 200))
    assert chat.messages()[-1]["content"][-1] == {"type": "text", "text": "What is this?"}  # type: ignore[comparison-overlap]
    wait_pictures(chat, 0)
    wait_pictures(chat, 2, ".user")

    chat.ask("And now?", answers=2)  # the pictures belong to the conversation
    assert len(sent(chat, 0)) == 2 and chat.messages()[-1]["content"] == "And now?"
    chat.reload()
    wait_pictures(chat, 2, ".user")
    chat.page.click(".picture-open >> nth=1")
    assert chat.page.locator("#picture-dialog img").get_attribute("alt") == "blue.png"
    assert chat.page.evaluate("document.querySelector('#picture-dialog img').naturalWidth") == 40
    chat.page.keyboard.press("Escape")
    chat.ask("And again?", answers=3)
    assert len(sent(chat, 0)) == 2


def test_pasted_dropped_and_removed(sees: FakeChatServer, chat: Any) -> None:
    picture = ("a.png", "image/png", encoded(plain()))
    put(chat, "dragenter", picture)
    assert chat.page.locator("#drop").inner_text() == "Drop pictures or documents to ask about them"
    put(chat, "drop", picture)
    wait_pictures(chat, 1)
    put(chat, "paste", ("b.png", "image/png", encoded(plain(10, 10, (0, 200, 0)))))
    wait_pictures(chat, 2)
    chat.page.click("button[aria-label='Remove a.png']")
    wait_pictures(chat, 1)
    chat.reload()  # the draft is kept
    wait_pictures(chat, 1)
    assert chat.page.locator("#send").is_enabled()
    chat.page.click("#send")  # without a text
    chat.wait_done()
    (only,) = sent(chat)
    assert only.getpixel((5, 5))[:3] == (0, 200, 0) and len(chat.messages()[-1]["content"]) == 1
    assert chat.page.locator(".user .bubble").count() == 0
    chat.reload()
    wait_pictures(chat, 0)
    wait_pictures(chat, 1, ".user")


def test_camera_of_a_phone(sees: FakeChatServer, open_chat: Callable[..., Any]) -> None:
    chat = open_chat(**PHONE)
    chat.page.click("#attach")
    items = chat.page.locator("#attach-menu button:visible").all_inner_texts()
    assert items == ["Take a photo", "Choose pictures", "Attach documents"]
    assert chat.page.evaluate("document.activeElement.id") == "menu-camera"
    with chat.page.expect_file_chooser() as choosing:
        chat.page.click("#menu-camera")
    assert not choosing.value.is_multiple()
    assert chat.page.get_attribute("#camera-input", "capture") == "environment"
    assert chat.page.get_attribute("#camera-input", "accept") == "image/*"
    exif = Image.Exif()
    exif[0x0112] = 6  # taken upright
    photo = encoded(noise(3000, 2000), "JPEG", exif=exif, quality=95)
    choosing.value.set_files([{"name": "photo.jpg", "mimeType": "image/jpeg", "buffer": photo}])
    wait_pictures(chat, 1)
    chat.page.fill("#message", "What is this?")
    chat.page.click("#send:enabled")
    chat.wait_done()
    (picture,) = sent(chat)
    width, height = picture.size
    assert picture.format == "JPEG" and abs(width / height - 2 / 3) < 0.01 and height <= 2048
    assert not picture.getexif()
    assert len(sees.bodies[-1]["messages"][-1]["content"][0]["image_url"]["url"]) <= 1e6
    assert chat.page.evaluate("document.documentElement.scrollWidth") == 360


def test_a_conversation_has_room_for_some(sees: FakeChatServer, chat: Any) -> None:
    files = [(f"{i}.png", "image/png", encoded(plain(20, 20, (i, 0, 0)))) for i in range(6)]
    choose(chat, *files[:3])
    wait_pictures(chat, 3)
    chat.ask("What are these?")
    choose(chat, *files[3:])
    wait_pictures(chat, 1)
    assert errors(chat) == ["This conversation has no room for another picture. Start a new chat for it."] * 2
    chat.ask("And this?", answers=2)  # those that failed are not sent
    assert [picture.getpixel((1, 1))[:3] for picture in sent(chat)] == [(3, 0, 0)]
    stored = chat.page.evaluate(STORED)
    assert sum(len(message.get("pictures", [])) for message in stored[0]["messages"]) == 4


def test_the_size_of_a_request_limits_pictures_too(sees: FakeChatServer, chat: Any) -> None:
    sees.models[0] |= {"max_body_bytes": 1 << 20}
    chat.reload()
    choose(chat, ("a.jpg", "image/jpeg", encoded(noise(700, 700), "JPEG", quality=95)))
    choose(chat, ("b.jpg", "image/jpeg", encoded(noise(700, 700), "JPEG", quality=95)))
    wait_pictures(chat, 1)
    assert "no room for another picture" in errors(chat)[0]


def bomb() -> bytes:
    data = bytearray(encoded(plain()))
    data[16:24] = struct.pack(">II", 60_000, 60_000)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


@pytest.mark.parametrize(
    ("name", "type", "data", "message"),
    [
        ("a.svg", "image/svg+xml", b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>", "cannot read it"),
        ("b.png", "image/png", encoded(plain())[:40], "cannot read it"),
        ("c.png", "image/png", b"hello", "cannot read it"),
        ("d.png", "image/png", bomb(), "cannot read it"),
        ("e.png", "image/png", encoded(Image.new("1", (4_000, 1))), "more than 200 times the other"),
        ("f.tif", "image/tiff", encoded(plain(), "TIFF"), "cannot read it"),
    ],
    ids=["SVG", "truncated", "text", "bomb", "narrow", "TIFF"],
)
def test_hostile_pictures(sees: FakeChatServer, chat: Any, name: str, type: str, data: bytes, message: str) -> None:
    choose(chat, (name, type, data))
    (error,) = errors(chat)
    assert message in error
    chat.page.fill("#message", "Hello")
    assert chat.page.locator("#send").is_enabled()
    chat.page.click(f"button[aria-label='Remove {name}']")
    assert chat.page.locator(".chip").count() == 0


@pytest.mark.parametrize(
    ("data", "pixel"),
    [
        (encoded(plain().convert("CMYK"), "JPEG"), (200, 30, 30)),
        (encoded(Image.new("RGBA", (8, 8), (255, 0, 0, 0))), (255, 255, 255)),
        (encoded(Image.frombytes("I;16", (8, 8), struct.pack("<64H", *[65535] * 64))), (255, 255, 255)),
        (encoded(plain(), "GIF", save_all=True, append_images=[plain(color=(0, 0, 0))]), (200, 30, 30)),
    ],
    ids=["CMYK", "transparent", "16 bits", "animated"],
)
def test_unusual_pictures(sees: FakeChatServer, chat: Any, data: bytes, pixel: tuple[int, int, int]) -> None:
    choose(chat, ("x", "image/png", data))
    wait_pictures(chat, 1)
    chat.ask("What?")
    (picture,) = sent(chat)
    found = picture.convert("RGB").getpixel((2, 2))
    assert max(abs(a - b) for a, b in zip(found, pixel, strict=True)) <= 12, found


def test_edited_and_regenerated(sees: FakeChatServer, chat: Any) -> None:
    choose(chat, ("a.png", "image/png", encoded(plain())))
    wait_pictures(chat, 1)
    chat.ask("What is this?")
    chat.page.hover(".user")
    chat.page.click("button[aria-label='Edit and resend']")
    chat.page.fill(".editor textarea", "Which color is it?")
    chat.page.keyboard.press("Enter")
    chat.wait_text("Which color is it?", ".user")
    chat.wait_done()
    assert len(sent(chat)) == 1
    chat.page.click("button[aria-label='Answer again']")
    chat.wait_done()
    assert len(sent(chat)) == 1 and len(sees.bodies) == 3


def test_errors_of_the_server_are_shown(sees: FakeChatServer, open_chat: Callable[..., Any]) -> None:
    chat = open_chat(NOT_OK)
    said = "messages[0].content[0].image_url: is damaged"
    sees.replies = [Reply(status=400, error={"error": {"message": said, "type": "invalid_request_error", "code": None}})]
    choose(chat, ("a.png", "image/png", encoded(plain())))
    wait_pictures(chat, 1)
    chat.ask("What is this?")
    assert said in chat.page.inner_text(".error")


def test_only_pictures_are_restored_from_a_file(sees: FakeChatServer, chat: Any) -> None:
    """An imported file may name any address; the page asks no other server, and shows no SVG."""
    import json

    good = "data:image/png;base64," + base64.b64encode(encoded(plain())).decode()
    urls = [
        good, "https://evil.example/x.png", "data:image/svg+xml;base64,PHN2Zy8+", "javascript:alert(1)",
        "data:image/png;base64," + "A" * 1_000_001, None,
    ]  # fmt: skip
    pictures = [{"name": "<img src=x>", "url": url} for url in urls]
    conversation = {"id": "x", "messages": [{"id": "m", "role": "user", "content": "Hi", "pictures": pictures}]}
    data = json.dumps({"format": "deepseek-optimizer-chat", "version": 2, "conversations": [conversation]}).encode()
    chat.page.set_input_files("#import-input", {"name": "a.json", "mimeType": "application/json", "buffer": data})
    chat.wait_text("Hi", ".user")
    assert chat.page.locator(".user .picture").count() == 1
    chat.ask("And?", answers=1)
    assert len(sent(chat, 0)) == 1


def test_with_the_keyboard_alone(sees: FakeChatServer, chat: Any) -> None:
    chat.page.focus("#attach")
    chat.page.keyboard.press("Enter")
    assert chat.page.evaluate("document.activeElement.id") == "menu-picture"
    with chat.page.expect_file_chooser() as choosing:
        chat.page.keyboard.press("Enter")
    choosing.value.set_files([{"name": "a.png", "mimeType": "image/png", "buffer": encoded(plain())}])
    wait_pictures(chat, 1)
    assert chat.page.evaluate("document.activeElement.id") == "message"
    chat.page.keyboard.press("Shift+Tab")  # the paper clip
    chat.page.keyboard.press("Shift+Tab")  # the cross
    assert chat.page.evaluate("document.activeElement.getAttribute('aria-label')") == "Remove a.png"
    chat.page.keyboard.press("Shift+Tab")
    chat.page.keyboard.press("Enter")
    assert chat.page.locator("#picture-dialog").is_visible()
    chat.page.keyboard.press("Escape")
    assert not chat.page.locator("#picture-dialog").is_visible()
    assert chat.page.evaluate("document.activeElement.getAttribute('aria-label')") == "Show a.png"


def test_a_model_that_is_loaded_later(server: FakeChatServer, open_chat: Callable[..., Any]) -> None:
    """Of several models, those that are not loaded have no limits yet."""
    server.models[0]["status"] = {"value": "unloaded"}
    chat = open_chat()
    assert chat.page.get_attribute("#attach", "title") == "Attach documents"
    server.models[0]["max_pictures"] = 4
    chat.ask("Hello")
    chat.page.wait_for_function("() => document.getElementById('attach').title === 'Attach pictures or documents'")


LOOKS = [(WIDE, "light"), (WIDE, "dark"), (PHONE, "light"), ({**PHONE, "locale": "zh-CN"}, "dark")]


@pytest.mark.parametrize("options,scheme", LOOKS)
def test_appearance(sees: FakeChatServer, open_chat: Callable[..., Any], options: dict[str, Any], scheme: str) -> None:
    from .test_appearance import FAINT, SMALL_TARGETS, UNNAMED

    chat = open_chat(color_scheme=scheme, **options)
    wide = ("wide.png", "image/png", encoded(plain(1600, 100)))
    choose(chat, wide, ("high.png", "image/png", encoded(plain(90, 1600, (20, 90, 160)))))
    wait_pictures(chat, 2)
    chat.page.fill("#message", "What are these?")
    chat.page.click("#send:enabled")
    chat.wait_done()
    choose(chat, wide, ("a-very-long-name-" * 8 + ".svg", "image/svg+xml", b"<svg/>"))
    wait_pictures(chat, 1)
    chat.page.wait_for_selector(".chip.failed")
    chat.page.click("#attach")
    assert chat.page.evaluate(FAINT) == []
    assert chat.page.evaluate(UNNAMED) == []
    if "is_mobile" in options:
        assert chat.page.evaluate(SMALL_TARGETS) == []
        assert chat.page.evaluate("document.documentElement.scrollWidth") == 360
