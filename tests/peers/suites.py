"""The suites: whose tests are run, and how they are arranged for pytest."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .deviations import Deviation
from .llama_deviations import LLAMA_SERVER
from .source import Distribution
from .vllm_deviations import VLLM

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Suite:
    """Tests of one server.

    Attributes:
        name: of the server.
        title: what the tests are from.
        distribution: contains them.
        folder: the folder that pytest runs in.
        files: patterns of the test files in it.
        starts: what a file, or the fixtures of its folder, must contain for it to test a server: the name of the class that
            starts one.
        plugin: the pytest plugin that replaces the fixtures.
        arrange: adds what the distribution lacks to a copy of the files.
        deviations: explanations of the tests that do not pass.
    """

    name: str
    title: str
    distribution: Distribution
    folder: str
    files: tuple[str, ...]
    starts: str
    plugin: str
    arrange: Callable[[Path], None]
    deviations: Sequence[Deviation]

    def stage(self, files: Path, target: Path) -> Path:
        """Copies the files of the distribution to a new folder; returns the one to run pytest in."""
        shutil.copytree(files, target)
        self.arrange(target)
        return target / self.folder

    def test_files(self, folder: Path) -> list[str]:
        """The paths of the tests of a server, in a staged folder."""
        found = [path for pattern in self.files for path in sorted(folder.glob(pattern))]
        return [path.relative_to(folder).as_posix() for path in found if self._tests_a_server(path)]

    def _tests_a_server(self, file: Path) -> bool:
        text, fixtures = file.read_text(encoding="utf-8"), file.with_name("conftest.py")
        if self.starts in text:
            return True
        return "client: openai." in text and fixtures.is_file() and self.starts in fixtures.read_text(encoding="utf-8")


def _arrange_llama_server(target: Path) -> None:
    # Their utils.py imports wget to download models.
    (target / "tools/server/tests/wget.py").write_text('"""Not used: nothing is downloaded."""\n')


_UTILS = """\
from pathlib import Path

from peers.vllm_server import RemoteOpenAIServer, any_decorator

ROCM_EXTRA_ARGS, ROCM_ENV_OVERRIDES, VLLM_PATH = [], {}, Path(__file__).parents[1]


def __getattr__(name):
    return any_decorator
"""


_CONFTEST = """\
from peers.vllm_reference import HfRunner, LocalAssetServer, hf_runner, local_asset_server
"""


def _arrange_vllm(target: Path) -> None:
    (target / "tests" / "utils.py").write_text(_UTILS)
    (target / "tests" / "ci_envs.py").touch()
    (target / "tests" / "models" / "registry.py").write_text("HF_EXAMPLE_MODELS = None\n")
    (target / "pybase64.py").write_text("from base64 import *\n")
    (target / "tests" / "__init__.py").touch()
    (target / "tests" / "conftest.py").write_text(_CONFTEST)
    (target / "pytest.ini").write_text("[pytest]\n")


SUITES = (
    Suite(
        name="llama-server",
        title="llama.cpp's server tests, in the source distribution of llama-cpp-python 0.3.36",
        distribution=Distribution(
            project="llama-cpp-python",
            version="0.3.36",
            sha256="832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e",
            kept=("vendor/llama.cpp/tools/server/tests", "vendor/llama.cpp/models/templates"),
            root="vendor/llama.cpp",
        ),
        folder="tools/server/tests",
        files=("unit/test_*.py",),
        starts="ServerPreset",
        plugin="peers.llama_server",
        arrange=_arrange_llama_server,
        deviations=LLAMA_SERVER,
    ),
    Suite(
        name="vLLM",
        title="The server tests of vLLM 0.33.0",
        distribution=Distribution(
            project="vllm",
            version="0.33.0",
            sha256="f4c33c2503d52bb411146afa9618a4f48bed68912f617e6803ac8d76e4c74112",
            kept=("tests/entrypoints", "tests/models/utils.py", "tests/models/language/pooling/embed_utils.py"),
        ),
        folder=".",
        files=("tests/entrypoints/**/test_*.py",),
        starts="RemoteOpenAIServer",
        plugin="peers.vllm_server",
        arrange=_arrange_vllm,
        deviations=VLLM,
    ),
)
