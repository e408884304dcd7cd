"""Steps with rows of pictures equal the reference backend's: positions on three axes, features, tokens that see later ones."""

from __future__ import annotations

import torch

from support import triton_interpreter

DEVICE = triton_interpreter.require_device()

from deepseek_optimizer.backends.base import DECODE
from deepseek_optimizer.backends.cuda.backend import CudaBackend
from deepseek_optimizer.backends.reference import ReferenceBackend
from support import family_configs as configs
from support.models import assert_close_rows, random_ids, random_model, weights_of
from support.steps import Part, run_step, runner

from ..cpu.packing import packed_weights
from ..test_step_pictures import ends_of, graph_of, pictures_of
from .plans import FORMAT_TOLERANCE
from .test_plan import TWO


def test_rows_of_pictures():
    """Beside a sequence without any, and then decoding, without axes and features."""
    config = configs.llama(**TWO)
    graph, weights = graph_of(config), packed_weights(weights_of(random_model(config)), "fp32")
    ids, results = random_ids(config, 25), []
    for owner in (CudaBackend(DEVICE), ReferenceBackend()):
        run = runner(owner, graph, weights, blocks=4)
        sequences = [run.sequence(), run.sequence()]
        parts = [Part(sequences[0], ids[:19]), Part(sequences[1], ids[19:])]
        more = {"visible_to": ends_of([0, 0], [19, 6]), **pictures_of(graph, 25)}
        seen = run_step(run.plan, run.store, parts, **more).logits
        decoded = run_step(run.plan, run.store, [Part(each, [5], DECODE) for each in sequences]).logits
        results.append(torch.cat((seen, decoded)).cpu())
    assert_close_rows(*results, FORMAT_TOLERANCE["fp32"])
