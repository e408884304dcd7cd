"""Training on Ray: the run of `dso train`, in the workers of a `ray.train.torch.TorchTrainer`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from ..errors import ConfigError, MissingPackageError
from ..train.checkpoints.directory import checkpoints
from ..train.config import TrainConfig, make_config
from ..train.job import TrainingJob

try:
    import ray.train
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
except ImportError:
    raise MissingPackageError("training on Ray", "ray[train]", "ray-train") from None


def trainer(
    config: Mapping[str, Any] | TrainConfig,
    *,
    num_workers: int = 2,
    cpus: int = 1,
    gpus: int = 0,
    max_failures: int = 0,
    resume: bool = False,
    storage_path: str | None = None,
) -> TorchTrainer:
    """A trainer of Ray whose `fit()` runs `dso train` in several processes, on the machines of a cluster.

    Each worker is a process of the group that torchrun would start, with DDP, or FSDP2 with `fsdp` in the arguments. What the
    trainer logs is reported to Ray; `return_value` of the result has the fields of `RunSummary`. Checkpoints and the model
    are written to `output` of the configuration, which all workers must find, as the model and the data: on a shared disk.

    Args:
        config: the configuration of `dso train`, or its fields.
        num_workers: number of processes.
        cpus: processor cores of a worker, which it uses as threads.
        gpus: GPUs of a worker; 0: it trains on its cores.
        max_failures: how often the workers are started again after one has failed, and go on from the newest intact checkpoint.
        resume: go on from the newest intact checkpoint in `output`, if there is one; otherwise, an `output` with checkpoints
            is refused.
        storage_path: where Ray keeps its own records of the run; None: Ray's default.

    Raises:
        ConfigError: the configuration is invalid, a number is too small, or `output` has checkpoints already.
        MissingPackageError: Ray Train is not installed.
    """
    if num_workers < 1 or cpus < 1 or gpus < 0 or max_failures < 0:
        raise ConfigError(
            f"num_workers and cpus must be 1 or more, gpus and max_failures 0 or more, got {num_workers}, {cpus}, {gpus} and "
            f"{max_failures}"
        )
    settings = _with_absolute_paths(config if isinstance(config, TrainConfig) else make_config(config))
    output = Path(settings["output"])
    if not resume and checkpoints(output):
        raise ConfigError(f"output: {output} has checkpoints; choose another directory, or continue the run with resume=True")
    resources = {"CPU": float(cpus), **({"GPU": float(gpus)} if gpus else {})}
    return TorchTrainer(
        train_worker,
        train_loop_config={"settings": settings, "cpus": cpus},
        torch_config=TorchConfig(backend="nccl" if gpus else "gloo"),
        scaling_config=ScalingConfig(num_workers=num_workers, use_gpu=gpus > 0, resources_per_worker=resources),
        run_config=RunConfig(storage_path=storage_path, failure_config=FailureConfig(max_failures=max_failures)),
    )


def train_worker(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The run of a worker. Returns the fields of `train.job.RunSummary`.

    Args:
        settings: `settings`, the fields of `TrainConfig`, and `cpus`, the number of threads.
    """
    os.environ.setdefault("DSO_THREADS", str(settings["cpus"]))
    # workers that Ray starts again find the checkpoints of those before, and go on; others have been refused by `trainer`
    job = TrainingJob(make_config(settings["settings"]), resume=True)
    return job.run([_Report()]).to_dict()


class _Report(TrainerCallback):
    """Reports what the trainer logs to Ray, in all workers together."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        ray.train.report({"step": state.global_step, **(logs or {})})


def _with_absolute_paths(config: TrainConfig) -> dict[str, Any]:
    """The fields of a configuration for processes with other working directories."""
    fields: dict[str, Any] = config.model_dump(mode="json")

    def absolute(path: str) -> str:
        return str(Path(path).absolute()) if Path(path).exists() else path

    data = fields["data"]
    fields |= {"model": absolute(fields["model"]), "output": str(Path(fields["output"]).absolute())}
    fields["data"] = {**data, **{name: [absolute(path) for path in data[name]] for name in ("train", "eval")}}
    return fields
