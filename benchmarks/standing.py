"""The standing set: what this project's speed is judged by, a row of the table each. Data alone; `run.py` measures.

A row's verdict is a ratio to other engines on the same work in the same run, so that it means the same on any machine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from deepseek_optimizer.bench.work import Work

OURS = "ours"


@dataclass(frozen=True)
class Rival:
    """engine: a name of `bench.peers.PEERS`, or `OURS`. form: of the model, see `models.model`. label: for people. work: where
    it is not the row's own."""

    engine: str
    form: str
    label: str
    work: Work | None = None


@dataclass(frozen=True)
class Bar:
    """The fastest of `rivals` times `at_least` is asked for, or that ours reads at `or_percent` of the machine's bandwidth.
    `reach`: what would be better still."""

    rivals: tuple[Rival, ...]
    at_least: float
    reach: float | None = None
    or_percent: float | None = None


@dataclass(frozen=True)
class Row:
    """Attributes:
    name: for the command line and the results.
    model: of `models.TITLES`.
    form: that ours runs on.
    figure: of `bench.metrics.METRICS`; more is better.
    bars: one each that ours is measured against.
    fields: of DeepSeekConfig, for ours.
    read_percent: of the machine's read bandwidth that is asked for too.
    busy: another process keeps one core busy while ours runs.
    """

    name: str
    title: str
    model: str
    work: Work
    figure: str
    bars: tuple[Bar, ...]
    fields: Mapping[str, Any] = field(default_factory=dict)
    read_percent: float | None = None
    busy: bool = False
    repeats: int = 2
    warmup: int = 1
    form: str = "int4"

    @property
    def ours(self) -> Rival:
        conditions = [f"{name}={value}" for name, value in self.fields.items()] + ["a core taken"] * self.busy
        return Rival(OURS, self.form, ", ".join((f"ours {self.form}", *conditions)))

    @property
    def rivals(self) -> list[Rival]:
        return list(dict.fromkeys(rival for bar in self.bars for rival in bar.rivals))

    def quick(self) -> Row:
        """Of tiny lengths: whether it works, not how fast."""
        work = replace(self.work, prompt=min(self.work.prompt, 32), new=min(self.work.new, 4))
        return replace(self, work=work, repeats=1, warmup=0)


ALONE = Rival(OURS, "int4", "ours int4")
Q4_0, Q4_1 = (Rival("llama.cpp", kind, f"llama.cpp {kind}") for kind in ("Q4_0", "Q4_1"))
OPENVINO, VLLM = Rival("openvino", "openvino", "OpenVINO int4"), Rival("vllm", "bf16", "vLLM bf16")
AVX2, AVX512 = (Rival(f"llama.cpp-{isa}", "Q4_0", f"llama.cpp Q4_0, built for {isa}") for isa in ("avx2", "avx512"))

DECODE, PREFILL, OUTPUT = "decode_tok_s", "prefill_tok_s", "output_tok_s"
SMOL_DECODE, AT_ONCE = Work(512, 65), Work(256, 128, batch=16)
AT_ONCE_BARS = (Bar((VLLM,), 4.0, 6.0), Bar((Q4_0,), 1.5, 2.0))
ONCE: dict[str, Any] = {"repeats": 1, "warmup": 0}  # where a run takes long enough to be steady

STANDING = (
    Row("smol-decode", "SmolLM2 decode at 512", "smol", SMOL_DECODE, DECODE, (Bar((Q4_0, Q4_1), 1.5, 2.0),)),
    Row("smol-prefill", "SmolLM2 prefill 512", "smol", Work(512, 1), PREFILL, (Bar((OPENVINO,), 1.2, 1.6),), repeats=4),
    Row("r1q15-decode", "r1q15 decode at 512", "r1q15", Work(512, 33), DECODE, (Bar((Q4_0,), 1.0, 1.1),), read_percent=85),
    Row("r1q15-decode-4096", "r1q15 decode at 4,096", "r1q15", Work(4096, 17), DECODE, (Bar((Q4_0,), 1.3, 1.5),), **ONCE),
    Row("r1q15-prefill", "r1q15 prefill 512", "r1q15", Work(512, 1), PREFILL, (Bar((OPENVINO,), 1.2, 1.6),)),
    Row("r1q15-prefill-4096", "r1q15 prefill 4,096", "r1q15", Work(4096, 1), PREFILL, (Bar((Q4_0,), 3.0, 5.0),), **ONCE),
    Row("smol-16", "SmolLM2, 16 at once, 256 in, 128 out", "smol", AT_ONCE, OUTPUT, AT_ONCE_BARS, repeats=1),
    Row("r1q15-16", "r1q15, 16 at once, 256 in, 128 out", "r1q15", AT_ONCE, OUTPUT, AT_ONCE_BARS, **ONCE),
    Row("smol-busy", "SmolLM2 decode at 512, a core taken", "smol", SMOL_DECODE, DECODE, (Bar((ALONE,), 0.4, 0.5),), busy=True),
    Row(
        "smol-avx2", "SmolLM2 decode at 512, AVX2 alone", "smol", SMOL_DECODE, DECODE, (Bar((AVX2,), 1.0),),
        fields={"isa": "avx2"},
    ),
    Row(
        "smol-avx512", "SmolLM2 decode at 512, AVX-512 alone", "smol", SMOL_DECODE, DECODE, (Bar((AVX512,), 1.0),),
        fields={"isa": "avx512"},
    ),
)  # fmt: skip
