"""OpenVINO GenAI, on a model exported by optimum-intel."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from ...errors import ConfigError
from ..work import Work
from .base import arguments, check_depth, script

_INT4 = "--task text-generation-with-past --weight-format int4 --sym --group-size 32 --ratio 1.0"
_INTERMEDIATE = "openvino_model.xml"  # in an exported directory


def export_command(python: Path, model: Path, out: Path) -> list[str]:
    """The command that exports `model`, a Transformers directory, to `out` in int4 for OpenVINO."""
    return [str(python.parent / "optimum-cli"), "export", "openvino", "-m", str(model), *_INT4.split(), str(out)]


class OpenVino:
    name = "openvino"
    requirements: Sequence[str] = ("openvino-genai==2026.4.1.0", "optimum-intel==2.2.0", "nncf==3.4.0")
    unwanted: Sequence[str] = ()
    environment: dict[str, str] = {}

    def command(self, python: Path, model: Path, work: Work, *, threads: int, repeats: int, warmup: int) -> list[str]:
        check_depth(self.name, work)
        if not (model / _INTERMEDIATE).exists():
            raise ConfigError(
                f"openvino needs an exported model, and {model} has no {_INTERMEDIATE}; "
                f"export it with: {shlex.join(export_command(python, model, Path('OUT')))}; "
                "then pass it with --peer-model openvino=OUT"
            )
        options = arguments(work, threads=threads, repeats=repeats, warmup=warmup)
        return [str(python), script("openvino_side.py"), str(model), *options]
