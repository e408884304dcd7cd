"""Whether the checkpoint is complete: files, config, names and shapes. Reads only headers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from ...errors import CheckpointError, ConfigError
from ..case import Case
from ..finding import Finding

NAME = "checkpoint"


def check(case: Case) -> Iterator[Finding]:
    """Finds what `load_model` would reject, without loading."""
    from ...checkpoint import check_tensors
    from ...integration.bind.swap import expected_tensors
    from ...integration.load.general import why_general_path
    from ...integration.load.loader import not_wanted
    from ...models import ENCODERS

    try:
        checkpoint = case.checkpoint
        if (reason := why_general_path(checkpoint, None, case.fields)) is not None:
            kind = checkpoint.config().get("model_type")
            path = "encoder" if kind in ENCODERS else "general"
            what = "is an encoder" if path == "encoder" else "takes the general path: only its linear layers run on our kernels"
            yield Finding(
                NAME, "note", f"{kind} {what}", f"{reason} The doctor's other checks need an execution plan for decoding",
                "load_model or `dso info MODEL` loads it and reports what runs natively", {"path": path, "family": kind},
            )  # fmt: skip
            return
        model = case.sketch
        wanted, shapes = expected_tensors(model)
        check_tensors(checkpoint, wanted, shapes, not_wanted(checkpoint, model))
    except (CheckpointError, ConfigError) as error:
        at_fault = {name: getattr(error, name, None) for name in ("file", "tensor")}
        yield Finding(
            NAME, "error", "this checkpoint cannot be loaded", str(error),
            "download all files again from their source; a model family that this version does not support needs a newer "
            "version", {"model": case.model, **{k: v for k, v in at_fault.items() if v}},
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
        parts = (
            (t, format_name)
            for name, format_name in wanted.items()
            if format_name
            for t in checkpoint.stored(name, shapes[name])
        )
        lossy = ((checkpoint.info(t).dtype, format_name) for t, format_name in parts if checkpoint.lossless_format(t) is None)
        for (stored, format_name), count in Counter(lossy).items():
            yield Finding(
                NAME, "note", f"{count} matrices stored as {stored} are converted to {format_name}, which rounds them again",
                f"there are no kernels for {stored}", "use a GGUF file in Q4_K_M or Q8_0, which loads without loss", facts,
            )  # fmt: skip
