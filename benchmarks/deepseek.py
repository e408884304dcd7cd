"""DeepSeek's own architectures: rows as in `standing.py`. Weights are random, shapes real; `models.py` says which."""

from __future__ import annotations

from deepseek_optimizer.bench.work import Work

from .standing import DECODE, ONCE, OURS, PREFILL, Q4_0, VLLM, Bar, Rival, Row

TRANSFORMERS = Rival("transformers", "bf16", "Transformers bf16")
AT_512, AT_4096 = Work(512, 33), Work(4096, 33)
SHORT = Rival(OURS, "int4", "ours int4 at 512", AT_512)
V4_SHORT = Rival(OURS, "mxfp4", "ours at 512", AT_512)
V32_SHORT = Rival(OURS, "int4", "ours int4 at 4,096", AT_4096)
NEAR_FLOOR = 100 / 1.6  # per cent of bandwidth at which a step takes 1.6 times as long as reading its bytes

DEEPSEEK = (
    Row("v2l6-decode", "v2l6 decode at 512", "v2l6", AT_512, DECODE, (Bar((TRANSFORMERS,), 4.0),), read_percent=NEAR_FLOOR),
    Row(
        "v2l6-decode-4096", "v2l6 decode at 4,096", "v2l6", AT_4096, DECODE,
        (Bar((TRANSFORMERS,), 15.0), Bar((SHORT,), 1 / 1.25)), read_percent=NEAR_FLOOR, **ONCE,
    ),
    Row("v2l6-prefill", "v2l6 prefill 512", "v2l6", Work(512, 1), PREFILL, (Bar((VLLM, TRANSFORMERS), 1.5),)),
    Row("v2l6-prefill-4096", "v2l6 prefill 4,096", "v2l6", Work(4096, 1), PREFILL, (Bar((VLLM, TRANSFORMERS), 1.3),), **ONCE),
    Row(
        "v2l6-fp8", "v2l6 decode at 512 in fp8", "v2l6", AT_512, DECODE, (Bar((Rival(OURS, "int8", "ours int8"),), 0.9),),
        form="fp8",
    ),
    Row(
        "v2lite-decode", "V2-Lite decode at 512", "v2lite", Work(512, 17), DECODE,
        (Bar((Q4_0,), 2.5, or_percent=100 / 1.5),), **ONCE,
    ),
    Row(
        "v32-dsa", "v32 decode at 32,768, sparse attention", "v32", Work(32768, 17), DECODE, (Bar((V32_SHORT,), 1 / 1.3),),
        **ONCE,
    ),
    Row(
        "v4-decode-32k", "v4 decode at 32,768", "v4", Work(32768, 17), DECODE, (Bar((V4_SHORT,), 1 / 1.15),), read_percent=75,
        form="mxfp4", **ONCE,
    ),
    Row(
        "v4l1-decode", "v4l1 decode at 512", "v4l1", AT_512, DECODE, (Bar((TRANSFORMERS,), 10.0),), read_percent=75,
        form="mxfp4", **ONCE,
    ),
)  # fmt: skip
