"""Documents uploaded by clients: /v1/files, its limits, and who may use a file."""

from __future__ import annotations

import io
import time
import zipfile

import openai
import pytest

from deepseek_optimizer.longdoc.document import TextFile
from deepseek_optimizer.server.documents.file_store import FileStore
from deepseek_optimizer.server.http.problems import ApiError
from deepseek_optimizer.server.keys import ApiKeys
from deepseek_optimizer.server.settings import ServerSettings
from support.documents import pdf
from support.live_server import assert_error

HEAD = b"POST /v1/files HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=B\r\n"


def send(client, data: bytes | str, name: str = "notes.txt", headers: dict | None = None, **fields: str):
    fields = {"purpose": "user_data"} | fields
    return client.post("/v1/files", files={"file": (name, data)}, data=fields, headers=headers)


def form(*parts: bytes) -> bytes:
    return b"".join(b"--B\r\nContent-Disposition: form-data; " + part + b"\r\n" for part in parts) + b"--B--\r\n"


FILE = b'name="file"; filename="a.txt"\r\n\r\nsome text'
PURPOSE = b'name="purpose"\r\n\r\nuser_data'


def post_form(client, body: bytes, kind: str = "multipart/form-data; boundary=B"):
    return client.post("/v1/files", content=body, headers={"content-type": kind})


def test_life_cycle_of_a_file(client):
    sent = send(client, pdf(["First page", "Second page"]), "report.pdf")
    assert sent.status_code == 200, sent.text
    file = sent.json()
    assert (file["object"], file["filename"], file["purpose"], file["status"]) == (
        "file",
        "report.pdf",
        "user_data",
        "processed",
    )
    assert file["pages"] == 2 and file["bytes"] == len(pdf(["First page", "Second page"]))
    assert abs(file["created_at"] - time.time()) < 5 and file["expires_at"] - file["created_at"] == 86_400
    assert client.get(f"/v1/files/{file['id']}").json() == file
    content = client.get(f"/v1/files/{file['id']}/content")
    assert content.text.startswith("First page") and content.headers["content-type"].startswith("text/plain")
    assert len(content.text) == file["characters"]
    assert file in client.get("/v1/files").json()["data"]
    assert client.delete(f"/v1/files/{file['id']}").json() == {"id": file["id"], "object": "file", "deleted": True}
    for method, path in [("GET", ""), ("GET", "/content"), ("DELETE", "")]:
        assert_error(client.request(method, f"/v1/files/{file['id']}{path}"), 404)


def test_openai_client(live):
    client = openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0)
    after = {"anchor": "created_at", "seconds": 3600}
    file = client.files.create(file=("a.md", b"# Title\n\nThe door is green."), purpose="user_data", expires_after=after)
    assert file.filename == "a.md" and file.expires_at == file.created_at + 3600
    assert client.files.retrieve(file.id).bytes == file.bytes
    assert file.id in [one.id for one in client.files.list(purpose="user_data", limit=100)]
    assert client.files.content(file.id).text == "# Title\n\nThe door is green."
    assert client.files.delete(file.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(file.id)


def test_lists_in_pages(client):
    ids = [send(client, "x", f"{i}.txt", purpose="assistants").json()["id"] for i in range(3)]
    first = client.get("/v1/files?purpose=assistants&limit=2").json()
    assert [file["id"] for file in first["data"]] == ids[:0:-1] and first["has_more"]
    rest = client.get(f"/v1/files?purpose=assistants&after={first['last_id']}").json()
    assert [file["id"] for file in rest["data"]] == ids[:1] and not rest["has_more"]
    assert [file["id"] for file in client.get("/v1/files?purpose=assistants&order=asc").json()["data"]] == ids
    for query in ["limit=0", "limit=x", "order=up", "purpose=evals", "after=nothing", f"after={'x' * 300}"]:
        assert_error(client.get(f"/v1/files?{query}"), 400, query.partition("=")[0])
    for id in ids:
        client.delete(f"/v1/files/{id}")


@pytest.mark.parametrize(
    "name,data,said",
    [
        ("locked.pdf", pdf(["secret"], user="key"), "needs a password"),
        ("scan.pdf", pdf([""]), "only images"),
        ("broken.pdf", pdf(["some text"])[:200], "damaged PDF"),
        ("program", b"\x7fELF\x02\x01\x01" + bytes(200), "a program or library"),
        ("data.txt", bytes(range(256)) * 40, ""),
        ("empty.txt", b"", "empty"),
        ("pic.txt", b"\x89PNG\r\n\x1a\n" + b"\0" * 50, "PNG"),
    ],
)
def test_files_that_cannot_be_read(client, name, data, said):
    found = send(client, data, name)
    assert_error(found, 400, "file")
    error = found.json()["error"]
    assert error["message"].startswith(name) and said in error["message"] and error["code"] == "unreadable_file"


def test_a_word_document_that_is_a_zip_bomb(client):
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("word/document.xml", b"<a>" + b" " * (60 << 20) + b"</a>")
    found = send(client, packed.getvalue(), "bomb.docx")
    assert_error(found, 400, "file")
    assert "unpacks to" in found.json()["error"]["message"]


def test_a_pdf_that_takes_long(make_server):
    """Its conversion is stopped, and the next file is converted."""
    live = make_server(ServerSettings(file_read_seconds=0.5))
    data = pdf(["some words of text\n" * 200_000])
    found = send(live.client, data, "slow.pdf")
    assert_error(found, 400, "file")
    assert "slow.pdf: cannot be read: it takes too long" in found.json()["error"]["message"]
    assert send(live.client, "a text").status_code == 200
    assert live.client.get("/health").status_code == 200


def test_a_line_of_fifty_megabytes(make_server):
    live = make_server(ServerSettings(max_file_bytes=51 << 20))
    assert live.client.post("/v1/files", files={"file": ("a.txt", b"ab" * (25 << 20))}, data={"purpose": "user_data"}).json()[
        "characters"
    ] == (50 << 20)


@pytest.mark.parametrize(
    "name,kept",
    [
        ("../../etc/passwd", "passwd"),
        ("C:\\Users\\me\\a.txt", "a.txt"),
        ("/abs/olute.md", "olute.md"),
        ("..", "file"),
        ("naïve 文件 😀.txt", "naïve 文件 😀.txt"),
        ('quo"te.txt', 'quo"te.txt'),
        ("<img src=x onerror=alert(1)>.txt", "<img src=x onerror=alert(1)>.txt"),
        ("x" * 255, "x" * 255),
    ],
)
def test_names_are_labels(client, name, kept):
    assert send(client, "text", name).json()["filename"] == kept


@pytest.mark.parametrize("name", [b"a\\0b", b"x" * 256, b"x" * 3000, b"a\x00b.txt", b"a\x1bb"])
def test_invalid_names(client, name):
    body = form(b'name="file"; filename="' + name.replace(b"\\0", b"\0") + b'"\r\n\r\ntext', PURPOSE)
    assert_error(post_form(client, body), 400)


def test_names_of_four_kilobytes(client):
    assert_error(post_form(client, form(b'name="file"; filename="' + b"n" * 4096 + b'"\r\n\r\ntext', PURPOSE)), 400)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"nothing",
        b"--B\r\n",
        b"--C\r\nContent-Disposition: form-data; name=\"file\"\r\n\r\nx\r\n--C--\r\n",
        form(FILE, PURPOSE)[:-6],  # truncated
        form(FILE, PURPOSE)[:-7] + b"--B\r\n",  # ends before the next part
        form(FILE, FILE, PURPOSE),
        form(PURPOSE),
        form(FILE),
        form(FILE, b'name="purpose"\r\n\r\nfine-tune'),
        form(FILE, b'name="purpose"\r\n\r\n' + b"x" * 1000),
        form(FILE, PURPOSE, b'name="expires_after[seconds]"\r\n\r\n1'),
        form(FILE, PURPOSE, b'name="expires_after[seconds]"\r\n\r\n4e3'),
        form(FILE, PURPOSE, b'name="expires_after[anchor]"\r\n\r\nnow'),
        form(*[PURPOSE] * 20),
        form(b"name=\"file\"\r\n" + b"X-Header: " + b"y" * 9000 + b"\r\n\r\ntext", PURPOSE),
        form(b"name=\"file\"\r\n" + b"".join(b"X-%d: y\r\n" % i for i in range(500)) + b"\r\ntext", PURPOSE),
        form(b"filename=\"a\"\r\n\r\ntext", PURPOSE),
        b"\xff" * 300,
    ],
)  # fmt: skip
def test_invalid_forms(client, body):
    assert_error(post_form(client, body), 400)


@pytest.mark.parametrize("kind", ["", "application/json", "text/plain", "application/x-www-form-urlencoded", "multipart/mixed"])
def test_another_content_type(client, kind):
    assert_error(post_form(client, form(FILE, PURPOSE), kind), 415)
    assert_error(post_form(client, form(FILE, PURPOSE), "multipart/form-data"), 400)
    assert_error(post_form(client, form(FILE, PURPOSE), f"multipart/form-data; boundary={'b' * 250}"), 400)


def test_limits_apply_before_everything_is_read(make_server):
    live = make_server(ServerSettings(max_file_bytes=100_000))
    long = b"Content-Length: 400000\r\n\r\n" + form(FILE, PURPOSE)[:50]
    answer = live.raw(HEAD + long)  # rejected by its header, before any of the file is sent
    assert answer.startswith(b"HTTP/1.1 413 ") and b'"file_too_large"' in answer
    chunk = b"%x\r\n%s\r\n" % (60_000, b"x" * 60_000)
    begun = b'--B\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
    body = b"%x\r\n%s\r\n" % (len(begun), begun) + chunk * 2
    answer = live.raw(HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + body)  # and chunked, without an end
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert send(live.client, "y" * 100_000).status_code == 200
    assert_error(send(live.client, "y" * 100_001), 413, "file")
    assert live.app.state.server.files.held < 200_000


def test_a_slow_upload(make_server):
    live = make_server(ServerSettings(upload_seconds=0.3))
    answer = live.raw(HEAD + b"Content-Length: 1000\r\n\r\n" + form(FILE)[:40])
    assert answer.startswith(b"HTTP/1.1 408 ")


def test_a_disconnect_during_an_upload_leaves_nothing(make_server):
    live = make_server(ServerSettings())
    files = live.app.state.server.files
    with live.connect() as sock:
        begun = b"--B\r\nContent-Disposition: form-data; " + FILE + b"x" * 100_000
        sock.sendall(HEAD + b"Content-Length: 1000000\r\n\r\n" + begun)
        deadline = time.monotonic() + 10
        while files.held < 100_000 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert files.held >= 100_000
    while files.held and time.monotonic() < deadline:
        time.sleep(0.01)
    assert files.held == 0 and len(files) == 0


def test_uploads_in_any_chunks(client):
    body = form(b'name="file"; filename="a.txt"\r\n\r\n' + b"\r\n--B\r--\r\n-B\r\n" * 3, PURPOSE)
    for size in (1, 7, 64):
        pieces = (body[i : i + size] for i in range(0, len(body), size))
        sent = client.post("/v1/files", content=pieces, headers={"content-type": "multipart/form-data; boundary=B"})
        # "\r\n--B" within the file would end it; everything else is content
        assert sent.status_code in (200, 400)
    whole = form(b'name="file"; filename="a.txt"\r\n\r\n' + b"\r\n-B\r--\r\n--C" * 3, PURPOSE)
    for size in (1, 7, 64):
        pieces = (whole[i : i + size] for i in range(0, len(whole), size))
        sent = client.post("/v1/files", content=pieces, headers={"content-type": "multipart/form-data; boundary=B"})
        assert client.get(f"/v1/files/{sent.json()['id']}/content").text == "\n-B\n--\n--C" * 3


def test_files_belong_to_their_key(make_server):
    live = make_server(ServerSettings(keys=ApiKeys(["one", "two"])))
    one, two = ({"Authorization": f"Bearer {key}"} for key in ("one", "two"))
    assert_error(send(live.client, "text"), 401)
    id = send(live.client, "the text of one", headers=one).json()["id"]
    assert live.client.get("/v1/files", headers=two).json()["data"] == []
    for method, path in [("GET", ""), ("GET", "/content"), ("DELETE", "")]:
        assert_error(live.client.request(method, f"/v1/files/{id}{path}", headers=two), 404)
        assert_error(live.client.request(method, f"/v1/files/{id}{path}"), 401)
    chat = {
        "messages": [{"role": "user", "content": [{"type": "file", "file": {"file_id": id}}, {"type": "text", "text": "?"}]}]
    }
    assert_error(live.client.post("/v1/chat/completions", json=chat, headers=two), 404, "file_id")
    assert live.client.get(f"/v1/files/{id}", headers=one).status_code == 200


def test_storage_per_key_is_limited(make_server):
    settings = ServerSettings(
        keys=ApiKeys(["one", "two"]), max_file_bytes_per_client=60_000, max_file_bytes_total=100_000, max_files_per_client=3
    )
    live = make_server(settings)
    one, two = ({"Authorization": f"Bearer {key}"} for key in ("one", "two"))
    id = send(live.client, "x" * 40_000, headers=one).json()["id"]
    full = send(live.client, "x" * 40_000, headers=one)
    assert_error(full, 413, "file")
    assert full.json()["error"]["code"] == "file_memory"
    assert send(live.client, "x" * 30_000, headers=two).status_code == 200
    others = send(live.client, "x" * 22_000, headers=two)  # within the limit of the key, but not within the total
    assert_error(others, 503)
    assert others.headers["retry-after"]
    live.client.delete(f"/v1/files/{id}", headers=one)
    for status in (200, 200, 200, 400):
        assert send(live.client, "small", headers=one).status_code == status


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_files_expire_and_free_their_memory():
    wall, clock = Clock(), Clock()
    gone = []
    store = FileStore(ServerSettings(file_seconds=100), lambda owner, digest: gone.append((owner, digest)), wall, clock)
    text = TextFile("a.txt", "x" * 10_000)
    short = store.add("me", "user_data", 1, "d1", text, seconds=50)
    long = store.add("me", "user_data", 1, "d2", text, seconds=10_000)
    assert (short.expires, long.expires) == (1050, 1100)  # limited to the server's maximum
    held = store.held
    assert held > 20_000
    for wall.now in (0, 10**10):  # setting the clock forwards or backwards neither expires nor preserves files
        assert store.of("me") == [short, long]
    clock.now = 1049
    assert store.get("me", short.id) is short
    clock.now = 1050
    with pytest.raises(ApiError):
        store.get("me", short.id)
    assert store.of("me") == [long] and store.held == held // 2
    clock.now = 1100
    store.sweep()
    assert store.held == 0 and len(store) == 0
    assert gone == [("me", "d1"), ("me", "d2")]


def test_rejected_memory_is_not_counted():
    store = FileStore(ServerSettings(max_file_bytes_per_client=1000, max_file_bytes_total=1500, max_uploads_total=2))
    with store.room("a", "a") as room:
        room.set(800)
        with pytest.raises(ApiError) as refused:
            room.set(1001)
        assert refused.value.status == 413 and store.held == 800
        with store.room("b", "b") as other:
            with pytest.raises(ApiError) as refused:
                other.set(900)
            assert refused.value.status == 503
            with pytest.raises(ApiError), store.room("c", "c"):
                pass
    assert store.held == 0


def test_a_missing_extra_is_reported(live, monkeypatch):
    reader = live.app.state.server.reader
    missing = {"missing": 'reading PDF needs pypdf: pip install "deepseek-optimizer[longdoc]"'}
    monkeypatch.setattr(reader.workers, "call", lambda payload: missing)
    found = send(live.client, "text")
    assert_error(found, 501)
    assert "deepseek-optimizer[longdoc]" in found.json()["error"]["message"]


def test_pages_of_other_origins_cannot_upload(make_server):
    """A browser sends forms of any page to any server without a preflight request."""
    live = make_server(ServerSettings(allow_origins=("https://friend.example",)))
    for origin in ("https://evil.example", "null", "http://127.0.0.1:1", f"http://127.0.0.1:{live.port}.evil.example"):
        assert_error(send(live.client, "text", headers={"Origin": origin}), 403)
        assert_error(send(live.client, "text", headers={"Origin": origin, "Sec-Fetch-Site": "cross-site"}), 403)
    assert live.client.get("/v1/files").json()["data"] == []
    for origin in (live.url, "https://friend.example"):
        assert send(live.client, "text", headers={"Origin": origin}).status_code == 200
    behind_a_proxy = {"Origin": "https://name.example", "Sec-Fetch-Site": "same-origin"}
    assert send(live.client, "text", headers=behind_a_proxy).status_code == 200
