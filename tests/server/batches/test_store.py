"""What batches and their files take on the disk, and batches that are created while others run."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

import pytest

from deepseek_optimizer.server.batches.file_store import BatchFiles
from deepseek_optimizer.server.batches.store import Batches
from deepseek_optimizer.server.keys import ApiKeys
from deepseek_optimizer.server.settings import ServerSettings
from support.batches import COMPLETIONS, create, ended, lines, upload
from support.live_server import assert_error, wait_for


def test_kept_requests_count_for_the_limits(make_server, tmp_path):
    """A client that deletes the files of its batches cannot fill the disk, also after a restart."""
    limits = {"max_batch_bytes_per_client": 3000, "max_batch_bytes_total": 4000, "max_batches_per_client": 9}
    settings = ServerSettings(state_dir=tmp_path, keys=ApiKeys(["one", "two"]), **limits)
    one, two = ({"Authorization": f"Bearer {key}"} for key in ("one", "two"))
    first = make_server(settings)
    first.call(lambda: setattr(first.app.state.server.batches, "_runner", None))  # nothing runs
    data = lines(2, suffix="x" * 800)
    assert 1500 < len(data) < 2000
    file = upload(first.client, data, one)
    batches = [create(first.client, file, one) for _ in range(3)]
    first.client.delete(f"/v1/files/{file}", headers=one)
    assert first.client.get("/v1/files", headers=one).json()["data"] == []

    def refused(server, key, status):
        form = {"files": {"file": ("a", b"x" * 2500)}, "data": {"purpose": "batch"}}
        sent = server.client.post("/v1/files", headers=key, **form)
        assert_error(sent, status, "file" if status == 413 else None)
        return sent.json()["error"]["message"]

    assert "cancel a batch" in refused(first, one, 413)
    refused(first, two, 503)  # all clients' files
    for batch in batches[1:]:
        first.client.post(f"/v1/batches/{batch['id']}/cancel", headers=one)
    refused(first, one, 413)  # one batch still keeps them
    first.__exit__()
    second = make_server(settings, step_seconds=10.0)
    refused(second, one, 413)
    second.client.post(f"/v1/batches/{batches[0]['id']}/cancel", headers=one)
    ended(second.client, batches[0], one)
    wait_for(lambda: not second.app.state.server.batches.files._kept)
    upload(second.client, data, one)


def test_a_batch_is_not_run_before_its_requests_are_kept(make_server, monkeypatch):
    """The batch before it ends while its requests are being copied."""
    begun, release, keep = threading.Event(), threading.Event(), Batches._keep_requests

    def slow(*arguments):
        begun.set()
        release.wait(10)
        keep(*arguments)

    server = make_server(step_seconds=0.002, capacity=4)
    file = upload(server.client, lines(20, max_tokens=4))
    first = create(server.client, file)
    monkeypatch.setattr(Batches, "_keep_requests", slow)
    with ThreadPoolExecutor(1) as pool:
        second = pool.submit(create, server.client, file)
        assert begun.wait(10)
        assert ended(server.client, first)["status"] == "completed"
        wait_for(lambda: not server.app.state.server.batches.running)
        release.set()
    assert ended(server.client, second.result())["status"] == "completed"


@pytest.mark.parametrize(("error", "status"), [(FileNotFoundError(2, "deleted"), 400), (OSError(28, "full"), 507)])
def test_a_batch_that_cannot_be_stored_leaves_nothing(make_server, tmp_path, monkeypatch, error, status):
    server = make_server(ServerSettings(state_dir=tmp_path, max_batches_per_client=1))
    file = upload(server.client, lines(1))
    keep = Batches._keep_requests

    def fail(*arguments):
        keep(*arguments)
        raise error

    body = {"input_file_id": file, "endpoint": COMPLETIONS, "completion_window": "24h"}
    with monkeypatch.context() as patch:
        patch.setattr(Batches, "_keep_requests", fail)
        assert server.client.post("/v1/batches", json=body).status_code == status
    batches = server.app.state.server.batches
    assert not list(tmp_path.glob("batches/jobs/*")) and not batches.files._kept and not batches.of("")
    assert ended(server.client, create(server.client, file))["status"] == "completed"


def test_uploads_at_the_same_time(make_server, monkeypatch):
    """Files that are being written count for the limit, too."""
    server = make_server(ServerSettings(max_batch_bytes_per_client=3000))
    barrier, writing = threading.Barrier(2), BatchFiles.writing

    @contextmanager
    def slow(*arguments):
        with suppress(threading.BrokenBarrierError):
            barrier.wait(1)
        with writing(*arguments) as out:
            yield out

    monkeypatch.setattr(BatchFiles, "writing", slow)
    form = {"files": {"file": ("a", b"x" * 2000)}, "data": {"purpose": "batch"}}
    with ThreadPoolExecutor(2) as pool:
        statuses = list(pool.map(lambda _: server.client.post("/v1/files", **form).status_code, range(2)))
    assert sorted(statuses) == [200, 413]
