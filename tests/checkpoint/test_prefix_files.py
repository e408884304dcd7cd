"""A prefix cache in files: contents are exact or absent, the size limit holds, and several processes share a directory."""

from __future__ import annotations

import logging
import os
import random
import threading
import time
from pathlib import Path

import pytest

from deepseek_optimizer.checkpoint.locks import hold
from deepseek_optimizer.checkpoint.prefix_files import PrefixFiles
from deepseek_optimizer.errors import ConfigError

SIZE, STATE = 100, 300
FILE = 72 + SIZE  # with its header
FINGERPRINT = bytes(range(16))


def key(n: int) -> bytes:
    return n.to_bytes(16, "little")


def content(n: int, size: int = SIZE) -> bytes:
    return random.Random(n).randbytes(size)


def opened(directory: Path, max_bytes: int = 1 << 20, fingerprint: bytes = FINGERPRINT) -> PrefixFiles:
    return PrefixFiles(directory, fingerprint, max_bytes, SIZE, STATE)


def names(files: PrefixFiles) -> set[str]:
    return {path.name for path in (files.directory / FINGERPRINT.hex()).iterdir()}


def size_of(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def test_round_trip_in_another_process(tmp_path):
    files = opened(tmp_path / "new" / "cache")
    files.write(key(1), 0, content(1), time.time_ns())
    files.write(key(1), 3, content(2), time.time_ns())
    files.write(key(1), -1, content(3, STATE), time.time_ns())
    again = opened(tmp_path / "new" / "cache")
    assert again.has(key(1), 0) and again.read(key(1), 0) == content(1)
    assert again.read(key(1), 3) == content(2) and again.read(key(1), -1) == content(3, STATE)
    assert not again.has(key(1), 1) and again.read(key(1), 1) is None and again.read(key(2), 0) is None
    assert again.size == size_of(tmp_path) == 2 * FILE + 72 + STATE


def test_only_the_owner_has_access(tmp_path):
    files = opened(tmp_path / "cache")
    files.write(key(1), 0, content(1), time.time_ns())
    paths = [tmp_path / "cache", *(tmp_path / "cache").rglob("*")]
    assert [path.stat().st_mode & 0o777 for path in paths] == [0o700, 0o700, 0o600]
    paths[1].chmod(0o755)
    opened(tmp_path / "cache")
    assert paths[1].stat().st_mode & 0o777 == 0o700


def test_other_fingerprints_find_nothing(tmp_path):
    opened(tmp_path).write(key(1), 0, content(1), time.time_ns())
    other = opened(tmp_path, fingerprint=bytes(16))
    assert not other.has(key(1), 0) and other.read(key(1), 0) is None
    own = tmp_path / bytes(16).hex()
    os.rename(next((tmp_path / FINGERPRINT.hex()).iterdir()), own / f"{key(1).hex()}.0")  # moved by someone
    assert other.has(key(1), 0) and other.read(key(1), 0) is None and list(own.iterdir()) == []


def test_any_damage_is_detected_and_the_file_deleted(tmp_path, caplog):
    files, place = opened(tmp_path), tmp_path / FINGERPRINT.hex() / f"{key(1).hex()}.0"
    files.write(key(1), 0, content(1), time.time_ns())
    whole, draw = place.read_bytes(), random.Random(3)
    damaged = [whole[:n] + bytes([whole[n] ^ 1 << draw.randrange(8)]) + whole[n + 1 :] for n in range(len(whole))]
    for data in [*damaged, whole[:-1], whole[:71], b"", whole + b"\0"]:
        place.write_bytes(data)
        assert files.read(key(1), 0) is None and not place.exists()
    assert files.damaged_files == len(damaged) + 4 and "damaged" in caplog.text and str(tmp_path) not in caplog.text
    place.write_bytes(whole)
    assert files.read(key(1), 0) == content(1)


def test_a_file_of_another_name_is_not_used(tmp_path):
    files = opened(tmp_path)
    for n, group in ((1, 0), (2, 0)):
        files.write(key(n), group, content(n), time.time_ns())
    folder = tmp_path / FINGERPRINT.hex()
    os.replace(folder / f"{key(2).hex()}.0", folder / f"{key(1).hex()}.0")
    os.link(folder / f"{key(1).hex()}.0", folder / f"{key(2).hex()}.1")
    assert files.read(key(1), 0) is None and files.read(key(2), 1) is None


def test_links_are_not_followed(tmp_path, caplog):
    files = opened(tmp_path / "a")
    files.write(key(1), 0, content(1), time.time_ns())
    place = tmp_path / "a" / FINGERPRINT.hex() / f"{key(1).hex()}.0"
    os.rename(place, tmp_path / "elsewhere")
    place.symlink_to(tmp_path / "elsewhere")
    assert files.read(key(1), 0) is None and "cannot be read" in caplog.text


@pytest.mark.parametrize("room", [1, 5, 40])
def test_the_least_recently_used_files_are_deleted(tmp_path, room):
    files, order = opened(tmp_path, room * FILE + 200), []
    draw, now = random.Random(room), time.time_ns()
    for n in range(100):
        if order and draw.random() < 0.5:
            used = draw.choice(order)
            if files.touch(key(used), 0, now + n):
                order.remove(used)
                order.append(used)
        files.write(key(n), 0, content(n), now + n)
        order.append(n)
        assert size_of(tmp_path) <= files.max_bytes
    left = [n for n in order if files.has(key(n), 0)]
    assert left == order[-len(left) :] and len(left) >= max(1, room - room // 16 - 1)
    assert files.evicted_files == 100 - len(left)


def test_the_limit_counts_all_models_and_processes(tmp_path):
    limit = 64 * FILE
    first, second = opened(tmp_path, limit), opened(tmp_path, limit, bytes(16))
    for n in range(200):
        (first if n % 2 else second).write(key(n), 0, content(n), time.time_ns())
        assert size_of(tmp_path) <= limit + 2 * limit // 16
    assert first.has(key(199), 0) and second.has(key(198), 0)
    assert not first.has(key(1), 0) and not second.has(key(0), 0)
    opened(tmp_path, 20 * FILE)  # a smaller limit holds from the start
    assert size_of(tmp_path) <= 20 * FILE


def test_nothing_is_deleted_while_another_process_does(tmp_path):
    files = opened(tmp_path, 4 * FILE)
    lock = hold(tmp_path)
    try:
        for n in range(8):
            files.write(key(n), 0, content(n), time.time_ns())
        assert len(names(files)) == 8 and files.evicted_files == 0
    finally:
        os.close(lock)
    files.write(key(9), 0, content(9), time.time_ns())
    assert size_of(tmp_path) <= 4 * FILE


def test_writers_and_readers_at_once(tmp_path):
    """Every read returns the exact content or nothing, while files are written, replaced and deleted."""
    wrong: list[int] = []

    def work(seed: int) -> None:
        files, draw = opened(tmp_path, 20 * FILE), random.Random(seed)
        for _ in range(150):
            n = draw.randrange(40)
            if draw.random() < 0.5:
                files.write(key(n), 0, content(n), time.time_ns())
            elif files.read(key(n), 0) not in (None, content(n)):
                wrong.append(n)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and not [name for name in names(opened(tmp_path)) if name.endswith(".tmp")]


def test_files_of_killed_writers_are_removed(tmp_path):
    files = opened(tmp_path)
    folder = tmp_path / FINGERPRINT.hex()
    for name, age in ((".old.tmp", 4000), (".new.tmp", 10)):
        (folder / name).write_bytes(b"half")
        os.utime(folder / name, (time.time() - age,) * 2)
    assert not files.has(key(1), 0)
    opened(tmp_path)
    assert names(files) == {".new.tmp"}


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    files = opened(tmp_path)

    def fails(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(OSError, match="No space"):
        files.write(key(1), 0, content(1), time.time_ns())
    assert names(files) == set() and files.size == 0


def test_unusable_directories_are_config_errors(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"prefix_cache_dir: .* cannot be used"):
        opened(tmp_path / "file")
    with pytest.raises(ConfigError, match="prefix_cache_bytes must be at least"):
        opened(tmp_path / "a", STATE)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(ConfigError, match="belongs to another user"):
        opened(tmp_path / "a")


def test_unrelated_files_are_left_alone(tmp_path, caplog):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.0").write_bytes(bytes(10_000))
    (tmp_path / "readme").write_bytes(bytes(10_000))
    with caplog.at_level(logging.WARNING):
        files = opened(tmp_path, 3 * FILE)
    for n in range(5):
        files.write(key(n), 0, content(n), time.time_ns())
    assert (tmp_path / "notes" / "a.0").exists() and (tmp_path / "readme").exists() and files.size <= 3 * FILE
