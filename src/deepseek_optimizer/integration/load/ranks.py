"""Loading a model into several processes: the parts of its weights that each of them has, and starting the others.

Each process creates the whole model on the meta device and reads its own parts from the checkpoint.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from ...backends.cpu import CpuBackend, unavailable_reason
from ...backends.cpu.environment import forced_threads
from ...backends.cpu.group import SharedGroup
from ...backends.cpu.native import library, number
from ...backends.parallel import Leader, Links
from ...backends.parallel.backend import shard_of
from ...checkpoint import Checkpoint
from ...checkpoint.load import Part
from ...config import DeepSeekConfig
from ...errors import BackendError, ConfigError, UnsupportedModelError
from ...graph.parallel import Parallel
from ...graph.parallel.layer_shares import Machine
from ...graph.parallel.pipeline import split_layers
from ...quant import get_format
from ...system.backend_entries import AUTO
from ..bind.graphs import loaded_mtp_layers, model_graph, mtp_graphs, planned_graph
from ..bind.modules import PackedLinear
from ..bind.packed_experts import PackedExperts
from ..bind.swap import expected_tensors
from .member import Member, Share, cpus_of_process
from .rendezvous import Place
from .several_machines import rank_of_machines, stage_of_machines

_MODULE = "deepseek_optimizer.integration.load.rank_process"


def check_divisible(settings: DeepSeekConfig, device: torch.device, no_plan: str | None, *, packed: bool) -> None:
    """Raises an error if a model with these settings cannot run in several processes.

    Args:
        settings: with `parallel`.
        device: where the model is loaded to.
        no_plan: why it has no execution plan; None: it has one.
        packed: its weights are packed already, so that its settings for choosing formats have been carried out.

    Raises:
        ConfigError: a setting conflicts with `parallel`.
        BackendError: the native backend is not available, or the system is not Linux.
    """
    ways = f"parallel: {settings.parallel}"
    if no_plan is not None:
        raise ConfigError(
            f"{ways} needs an execution plan, which this model does not have ({no_plan}); load it without parallel"
        )
    if device.type != "cpu" or settings.backend not in (AUTO, CpuBackend.name):
        raise ConfigError(f'{ways} runs on backend "cpu" only; leave backend and device unset, or load it without parallel')
    if not packed and (settings.kl_budget is not None or settings.calibration is not None):
        raise ConfigError(
            f"{ways}: calibration and kl_budget need the whole model; convert it first with `dso convert`, and load the result "
            "with parallel"
        )
    if sys.platform != "linux":  # descriptors passed to other processes, memory without a name, options of sockets
        raise BackendError(f"{ways} needs Linux; load the model without parallel")
    if (reason := unavailable_reason()) is not None:
        raise BackendError(f"{ways} needs the native backend: {reason}")


def check_no_adapter(config: DeepSeekConfig | None, fields: Mapping[str, Any]) -> None:
    """Raises ConfigError if a model that an adapter of PEFT is loaded into would be divided.

    Args:
        config, fields: as in `load_model`.
    """
    parallel = Parallel.of(fields.get("parallel", Parallel() if config is None else config.parallel))
    if parallel.ranks > 1:
        raise ConfigError(
            f"parallel: {parallel} has no adapters; merge the adapter into the model first (PEFT's merge_and_unload), or load "
            "it without parallel"
        )


def check_undivided(settings: DeepSeekConfig) -> None:
    """Raises ConfigError if settings for a model that `load_model` does not load would divide it."""
    if settings.parallel.ranks > 1:
        raise ConfigError(
            f"parallel: {settings.parallel} is for load_model and dso commands only, since each process reads "
            "its own part of a checkpoint; use load_model(path, config), or leave parallel unset"
        )


def share_of(model: Any, settings: DeepSeekConfig, rank: int, machines: list[Machine] | None = None) -> Share:
    """What a rank has.

    Args:
        model: from `loader.sketch`.
        settings: with `parallel`.
        rank: the rank.
        machines: see `Member`.

    Raises:
        UnsupportedModelError, ConfigError: the model cannot be divided so.
    """
    if settings.parallel.pipeline == 1:
        return Share(_parts_of(model, settings, rank))
    formats, _ = expected_tensors(model)
    tensors = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}
    graph, count = planned_graph(model, settings)[0], settings.parallel.pipeline
    stages = split_layers(graph, count, lambda name: int(tensors[name].nbytes), machines)
    others = {name for stage in stages[1:] for name in stage.weights()}
    own = set(stages[rank].weights())
    return Share({}, [name for name in formats if name in own or (rank == 0 and name not in others)], stages)


def _parts_of(model: Any, settings: DeepSeekConfig, rank: int) -> dict[str, Part]:
    parallel, parts = settings.parallel, dict[str, Part]()
    formats = _Formats({name: f for name, f in expected_tensors(model)[0].items() if f is not None})
    main, *mtp = (model_graph(model, (), loaded_mtp_layers(model))[0], *mtp_graphs(model))
    if parallel.expert > 1 and not any(node.op == "experts_down" for node in main.nodes):
        raise ConfigError(f"parallel: {parallel} needs a model with experts, which {main.family} is not; use tensor")
    shards = [shard_of(graph, rank, parallel, formats) for graph in (main, *mtp)]
    for shard in shards:
        parts |= {name: (part.rows, part.cols, part.experts) for name, part in shard.parts.items()}
    for graph, shard in zip((main, *mtp), shards, strict=True):
        for name in parts.keys() & set(graph.weights()):
            own = shard.parts.get(name)
            if own is None or (own.rows, own.cols, own.experts) != parts[name]:
                raise UnsupportedModelError(f"parallel: {parallel} would divide {name} in two ways; load it without parallel")
    for path, module in model.named_modules():
        if isinstance(module, PackedLinear) and module.order is not None and f"{path}.weight" in parts:
            raise UnsupportedModelError(
                f"parallel: {parallel} cannot divide {path}.weight, which has its columns in another order; use pipeline, or "
                "load it without parallel"
            )
    return parts


class _Formats(dict[str, str]):
    """Formats by name; matrices that are not packed are divided like fp32."""

    def __missing__(self, name: str) -> str:
        return get_format("fp32").name


def bytes_of_parts(model: Any, parts: Mapping[str, Part], ranks: int) -> Iterator[torch.Tensor]:
    """The weights that one of several ranks has, as tensors without data of as many bytes.

    Args:
        model: from `loader.sketch`.
        parts: the parts of tensors that a rank does not have as a whole, by name.
        ranks: how many ranks divide these tensors.
    """
    tensors = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}
    for name in expected_tensors(model)[0]:
        size = tensors[name].nbytes // (ranks if name in parts else 1)
        yield torch.empty(size, dtype=torch.uint8, device="meta")


def narrow(model: Any, parts: Mapping[str, Part]) -> None:
    """Gives packed modules the sizes of the parts that they hold."""
    for name, module in model.named_modules():
        rows, cols, _ = parts.get(f"{name}.weight", (None, None, None))
        if isinstance(module, PackedExperts):
            inner, _, experts = parts.get(f"{name}.gate_up_proj", (None, None, None))
            module.num_experts = module.num_experts if experts is None else experts[1] - experts[0]
            module.intermediate_dim = module.intermediate_dim if inner is None else inner[1] - inner[0]
        elif isinstance(module, PackedLinear):
            module.out_features = module.out_features if rows is None else rows[1] - rows[0]
            module.in_features = module.in_features if cols is None else cols[1] - cols[0]


def start_ranks(checkpoint: Checkpoint, settings: DeepSeekConfig) -> Member:
    """Starts the other processes, which load their parts of a checkpoint; this one becomes their leader. Those on several
    machines have all been started already.

    Raises:
        BackendError: a process cannot be started, or the others cannot be reached.
        ConfigError: the environment describes another number of processes.
    """
    ranks, pipeline = settings.parallel.ranks, settings.parallel.pipeline > 1
    cores = number(library().dso_default_threads())
    threads = settings.threads or forced_threads() or max(1, cores // settings.parallel.at_once)
    if (place := Place.of_environment()) is not None:
        if place.ranks != ranks:
            raise ConfigError(f"parallel: {settings.parallel} needs {ranks} processes, but WORLD_SIZE is {place.ranks}")
        return stage_of_machines(place, threads) if pipeline else rank_of_machines(place, settings)
    cpus = [None] * ranks if pipeline else [cpus_of_process(rank, ranks, threads) for rank in range(ranks)]
    memory = -1 if pipeline else os.memfd_create("dso-group", os.MFD_CLOEXEC)
    processes: list[subprocess.Popen[bytes]] = []
    try:
        group = None if pipeline else SharedGroup(memory, 0, ranks)
        answers = []
        for rank in range(1, ranks):
            ours, theirs = socket.socketpair()
            link = Connection(ours.detach())
            try:
                processes.append(_start(memory, theirs.fileno()))
            finally:
                theirs.close()
            answers.append(link)
            link.send(_job(checkpoint.path, settings, rank, threads, cpus[rank]))
    except BaseException:
        for process in processes:
            process.kill()
            process.wait()
        raise
    finally:
        if memory >= 0:
            os.close(memory)
    leader = Links(answers, processes) if group is None else Leader(group, processes, answers, cpus[0])
    return Member(0, threads, group, leader, cpus=cpus[0])


def _start(memory: int, pipe: int) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    # Unlike -m, this does not look for modules in the working directory, which may have files of any name.
    start = f"import sys; sys.path[:] = filter(None, sys.path); from {_MODULE} import main; sys.exit(main())"
    command = [sys.executable, "-c", start, str(memory), str(pipe)]
    try:
        passed = (pipe,) if memory < 0 else (memory, pipe)
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=passed, env=environment)
    except OSError as error:
        raise BackendError(f"a further process cannot be started ({error}); load the model without parallel") from error


def _job(path: Path, settings: DeepSeekConfig, rank: int, threads: int, cpus: list[int] | None) -> dict[str, Any]:
    return {
        "path": str(path),
        "settings": settings.to_dict(),
        "rank": rank,
        "ranks": settings.parallel.ranks,
        "threads": threads,
        "cpus": cpus,
    }
