"""Uploaded files with scanned pages, on a server with an OCR model."""

from __future__ import annotations

import io
import threading
import time
from typing import Any

import pytest

from deepseek_optimizer.errors import BackendError, RequestError
from deepseek_optimizer.longdoc.recognized import RecognizedLine
from deepseek_optimizer.server.app import create_app
from deepseek_optimizer.server.settings import ServerSettings
from deepseek_optimizer.system.sandbox.worker import WorkerError
from support.documents import pdf, pdf_of_pictures, scanned_pdf
from support.fake_engine import FakeEngine
from support.live_server import LiveServer, assert_error

Image = pytest.importorskip("PIL.Image", reason="needs Pillow")
RED, BLUE, GREEN, BLACK = (200, 30, 30), (30, 30, 200), (30, 200, 30), (0, 0, 0)


class Colors:
    """Says which color a page has; refuses green ones, breaks at black ones, and cuts off large ones."""

    def __init__(self) -> None:
        self.truncated, self.sizes, self.threads = 0, [], set()

    def read(self, image: Any) -> list[RecognizedLine]:
        self.sizes.append(image.size)
        self.threads.add(threading.get_ident())
        red, green, blue = image.getpixel((2, 2))
        if green > 100:
            raise RequestError("pictures", "are too green")
        if max(red, blue) < 100:
            raise BackendError("the model failed")
        self.truncated += image.width > 1000
        return [RecognizedLine(f"A {'red' if red > blue else 'blue'} page.", (0.1, 0.2, 0.9, 0.3))]


def page(color: Any, width: int = 85, height: int = 110) -> Any:
    return Image.new("RGB", (width, height), color)


def send(live: LiveServer, data: bytes, name: str = "scan.pdf") -> Any:
    return live.client.post("/v1/files", files={"file": (name, data)}, data={"purpose": "user_data"})


@pytest.fixture
def serving(byte_tokenizer: Any) -> Any:
    """serving(**settings) -> a server, and what reads its scanned pages."""
    running = []

    def start(**settings: Any) -> tuple[LiveServer, Colors]:
        engine, colors = FakeEngine(byte_tokenizer), Colors()
        app = create_app(engine, ServerSettings(port=0, **settings), ocr=colors)
        running.append(LiveServer(engine, app=app).__enter__())
        return running[-1], colors

    yield start
    for live in running:
        live.__exit__()


def text_of(live: LiveServer, file: dict[str, Any]) -> str:
    return str(live.client.get(f"/v1/files/{file['id']}/content").text)


def test_scanned_pages_are_read(serving: Any) -> None:
    live, colors = serving()
    file = send(live, scanned_pdf([page(RED), "Typed text.", page(BLUE)])).json()
    assert text_of(live, file) == "A red page.\n\nTyped text.\n\nA blue page.\n\n"
    assert (file["pages"], file["warnings"]) == (3, ["pages that the OCR model has read: 1, 3"])
    assert colors.sizes == [(85, 110)] * 2, "a page with text is not read again"
    stored = live.app.state.server.files.get("", file["id"]).text
    start = stored.text.index("A blue page.")
    assert stored.page_of(start) == 3 and stored.box_of(start, start + 4) == (0.1, 0.2, 0.9, 0.3)


def test_pictures_are_documents(serving: Any) -> None:
    live, _ = serving()
    out = io.BytesIO()
    page(RED).save(out, "PNG")
    assert text_of(live, send(live, out.getvalue(), "photo.png").json()) == "A red page.\n\n"


def test_files_with_text_need_no_model(serving: Any) -> None:
    live, colors = serving()
    assert text_of(live, send(live, pdf(["One", "Two"])).json()) == "One\n\nTwo\n\n"
    assert text_of(live, send(live, b"plain", "a.txt").json()) == "plain"
    assert colors.sizes == []


def test_pages_that_cannot_be_read_are_named(serving: Any) -> None:
    live, _ = serving()
    file = send(live, scanned_pdf([page(GREEN), page(RED), page(RED, 4_000, 10)])).json()
    assert text_of(live, file) == "A red page.\n\n"
    assert file["warnings"][0] == "pages that the OCR model has read: 2"
    assert file["warnings"][1].startswith("pages whose pictures cannot be read: 1 (pictures: are too green), 3 (has 4,000 x 10")
    refused = send(live, scanned_pdf([page(GREEN)]))
    assert_error(refused, 400, "file")
    assert "the pictures of its pages cannot be read: 1 (pictures: are too green)" in refused.json()["error"]["message"]
    empty = send(live, pdf([""]))
    assert_error(empty, 400, "file")
    assert "has no text on its 1 page, and the OCR model found none" in empty.json()["error"]["message"]


def test_a_page_that_ends_its_worker(serving: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Too much time or memory for one page; the others are read."""
    live, _ = serving()
    workers = live.app.state.server.reader.workers
    call = workers.call

    def ends_at_page_2(payload: dict[str, Any]) -> Any:
        if payload.get("page") == 2:
            raise WorkerError("it takes too much memory")
        return call(payload)

    monkeypatch.setattr(workers, "call", ends_at_page_2)
    file = send(live, scanned_pdf([page(RED), page(BLUE)])).json()
    assert text_of(live, file) == "A red page.\n\n"
    assert file["warnings"][1] == "pages whose pictures cannot be read: 2 (cannot be read: it takes too much memory)"


def test_text_that_is_cut_off_is_reported(serving: Any) -> None:
    live, _ = serving()
    file = send(live, scanned_pdf([page(RED), page(RED, 1100, 100)])).json()
    assert file["warnings"][-1] == "pages with more text than the OCR model writes, which is cut off: 2"


def test_large_pages_are_scaled_down(serving: Any) -> None:
    """A worker sends at most 25 MB of pixels."""
    live, colors = serving()
    assert send(live, scanned_pdf([page(RED, 3000, 4000)])).status_code == 200
    ((width, height),) = colors.sizes
    assert width * height <= 1 << 23 and width * height > (1 << 23) * 0.99 and abs(width / height - 0.75) < 0.01


def test_a_limit_of_pages(serving: Any) -> None:
    live, colors = serving(max_scanned_pages=2)
    assert send(live, scanned_pdf([page(RED), "Typed.", page(BLUE)])).status_code == 200
    refused = send(live, scanned_pdf([page(RED)] * 3))
    assert_error(refused, 400, "file")
    assert "has 3 pages without text, of which at most 2 are read by the OCR model" in refused.json()["error"]["message"]
    assert len(colors.sizes) == 2


def test_empty_pages_do_not_count(serving: Any) -> None:
    live, colors = serving(max_scanned_pages=1)
    file = send(live, scanned_pdf(["Typed.", "", "", page(RED)])).json()
    assert text_of(live, file) == "Typed.\n\nA red page.\n\n" and len(colors.sizes) == 1
    assert file["warnings"] == ["pages that the OCR model has read: 4", "pages without text (empty or images): 2, 3"]


def test_a_model_that_fails(serving: Any) -> None:
    """The server goes on."""
    live, _ = serving()
    assert_error(send(live, scanned_pdf([page(BLACK)])), 500)
    assert text_of(live, send(live, scanned_pdf([page(RED)])).json()) == "A red page.\n\n"


def test_one_page_at_a_time(serving: Any) -> None:
    """The model is not for several threads."""
    live, colors = serving()
    results: list[Any] = []
    threads = [threading.Thread(target=lambda: results.append(send(live, scanned_pdf([page(RED)] * 3)))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [result.status_code for result in results] == [200] * 3 and len(colors.sizes) == 9 and len(colors.threads) == 1


def test_pictures_of_a_page_take_turns(serving: Any) -> None:
    """A page with many pictures does not keep the model from others."""
    live, colors = serving()
    read, begun, goes_on = colors.read, threading.Event(), threading.Event()

    def held(image: Any) -> list[RecognizedLine]:
        begun.set()
        assert goes_on.wait(60)
        return read(image)

    colors.read = held
    several = pdf_of_pictures([page(RED, 80, 30), page(RED, 70, 30), page(RED, 60, 30)])
    threads = [threading.Thread(target=send, args=(live, data)) for data in (several, scanned_pdf([page(BLUE)]))]
    threads[0].start()
    assert begun.wait(60)
    threads[1].start()
    queue = live.app.state.server.reader.queues[1]
    deadline = time.monotonic() + 60
    while not queue.waiting and time.monotonic() < deadline:
        time.sleep(0.01)
    goes_on.set()
    for thread in threads:
        thread.join()
    assert colors.sizes == [(80, 30), (85, 110), (70, 30), (60, 30)]


def test_without_a_model(make_server: Any) -> None:
    live = make_server()
    refused = send(live, scanned_pdf([page(RED)]))
    assert_error(refused, 400, "file")
    assert "dso serve read them with an OCR model (--ocr MODEL)" in refused.json()["error"]["message"]
