"""Whether the checkpoint is whole: files, config, names and shapes. Only headers are read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from ...errors import CheckpointError, ConfigError
from ..case import Case
from ..finding import Finding

NAME = "checkpoint"


def check(case: Case) -> Iterator[Finding]:
    """What `load_model` would refuse, found without loading."""
    from ...checkpoint import check_tensors
    from ...integration.bind.swap import expected_tensors
    from ...integration.load.loader import not_wanted

    try:
        checkpoint, model = case.checkpoint, case.sketch
        wanted, shapes = expected_tensors(model)
        check_tensors(checkpoint, wanted, shapes, not_wanted(checkpoint, model))
    except (CheckpointError, ConfigError) as error:
        at_fault = {name: getattr(error, name, None) for name in ("file", "tensor")}
        yield Finding(
            NAME, "error", "this checkpoint cannot be loaded", str(error),
            "fetch the files again, complete and from their source; a model of a family this version doesn't know needs "
            "another version", {"model": case.model, **{k: v for k, v in at_fault.items() if v}},
        )  # fmt: skip
        return
    infos = checkpoint.tensors.values()
    facts = {
        "path": str(checkpoint.path), "kind": checkpoint.kind, "family": case.graph.family, "tensors": len(infos),
        "bytes": sum(i.nbytes for i in infos), "stored_as": dict(Counter(i.dtype for i in infos)),
    }  # fmt: skip
    whole = f"{case.graph.family} in {checkpoint.kind}: {len(infos)} tensors, all that the model needs"
    yield Finding(NAME, "ok", whole, facts=facts)
    if case.settings.precision == "auto":
        parts = ((t, kept) for name, kept in wanted.items() if kept for t in checkpoint.stored(name, shapes[name]))
        lossy = ((checkpoint.info(t).dtype, kept) for t, kept in parts if checkpoint.lossless_format(t) is None)
        for (stored, kept), count in Counter(lossy).items():
            yield Finding(
                NAME, "note", f"{count} matrices stored as {stored} are kept as {kept}, which rounds them again",
                f"there are no kernels for {stored}", "a GGUF file in Q4_0, Q4_1 or Q8_0 is taken over without loss", facts,
            )  # fmt: skip
