"""Weight files that change while a model uses them: an error that names the file, no crash and no wrong token."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest

from deepseek_optimizer import load_model
from deepseek_optimizer.backends.cpu.native import library_path
from support import changed_files, warm_python
from support.saved_llama import saved_llama

LOST = "was cut short or cannot be read while its weights are in use; restore the file and load the model again"
WRITTEN = "was written to while its weights are in use; restore the file and load the model again"
WHAT = {"emptied": LOST, "halved": LOST, "overwritten": WRITTEN}


def run(*command: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, command)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)


@pytest.fixture(scope="module")
def found(tmp_path_factory, byte_tokenizer):
    folder = tmp_path_factory.mktemp("changed")
    floats = saved_llama(folder / "floats", byte_tokenizer, tie_word_embeddings=False)
    load_model(floats, precision="int8").save_pretrained(folder / "packed")
    code = f"import runpy; runpy.run_path({changed_files.__file__!r}, run_name='__main__')"
    done = warm_python.run(code, folder / "packed", floats, folder / "work")
    assert done.returncode == 0, (done.returncode, done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1])


def is_changed(found, words: str) -> bool:
    return found[0] == "CheckpointChangedError" and "model.safetensors: " in found[1] and words in found[1]


def test_only_packed_files_are_mapped(found):
    """The handler of SIGBUS is installed with the first of them."""
    handlers = {"handler at first": False, "handler so far": False, "handler": True}
    ways = {"load_model": True, "from_pretrained": True, "float": False, "reference": False, "other names": False}
    assert found["mapped"] == handlers | ways


@pytest.mark.parametrize("way", changed_files.LOADERS)
@pytest.mark.parametrize("change", WHAT)
def test_a_modified_file_is_a_permanent_error_of_the_model(found, way, change):
    case = found["changes"][f"{way} {change}"]
    for name in ("after", "again", "twin"):
        assert is_changed(case[name], WHAT[change]), case[name]
    assert case["other"] == case["loaded"] == case["before"]


@pytest.mark.parametrize("way", changed_files.LOADERS)
@pytest.mark.parametrize("change", ["replaced", "removed"])
def test_a_replaced_file_stays_in_use(found, way, change):
    case = found["changes"][f"{way} {change}"]
    assert len(case["before"][0]) == 32
    assert all(case[name] == case["before"] for name in ("after", "again", "twin", "other", "loaded"))


READERS = ("embedding", "linear", "gradient", "dequantized", "table", "forward", "engine", "own forward")


@pytest.mark.parametrize("reader", [*READERS, "save", "cut while saving", "own save"])
def test_every_reader_of_weights_raises_the_error(found, reader):
    assert is_changed(found["readers"][reader], LOST), found["readers"][reader]


def test_lost_weights_are_not_saved_and_copies_stay_valid(found):
    assert found["readers"]["saved"] is False and found["readers"]["apart"] is True


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("load_model, cut", "truncated while it was being read"),
        ("load_model, overwritten", "was modified while it was being read"),
        ("load_model packed, cut", "cut short"),
        ("from_pretrained, cut", "cut short"),
        ("from_pretrained, overwritten", "was modified while it was read"),
    ],
)
def test_a_file_that_changes_while_it_is_loaded(found, case, words):
    assert is_changed(found["loading"][case], words), found["loading"][case]


FAULTS = """
import ctypes as C, faulthandler, mmap, os, sys
add, folder = C.CDLL(sys.argv[1]).dso_mapping_add, sys.argv[2]
add.argtypes = C.c_void_p, C.c_int64, C.c_int32, C.c_int64, C.c_char_p, C.c_void_p

def mapped(name):
    file = open(os.path.join(folder, name), "w+b")
    file.write(bytes([1]) * 8192)
    file.flush()
    return file, mmap.mmap(file.fileno(), 8192, access=mmap.ACCESS_COPY)

def watch(pages):
    assert add(C.addressof(C.c_char.from_buffer(pages)), 8192, -1, 0, b"x", C.byref(C.c_int64())) == 0

file, ours = mapped("ours")
watch(ours)
faulthandler.enable()
more = mapped("more")[1]
watch(more)  # the library puts its handler first again
file.truncate(0)
print(sum(ours[:]), flush=True)
file, theirs = mapped("theirs")
file.truncate(0)
theirs[0]
"""


def test_other_faults_still_kill_with_faulthandler_output(tmp_path):
    done = run("-c", FAULTS, library_path(), tmp_path)
    assert done.returncode == -signal.SIGBUS and done.stdout == "0\n", (done.returncode, done.stderr)
    assert "Fatal Python error: Bus error" in done.stderr
