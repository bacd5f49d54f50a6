"""Before training: what cannot work is refused, and devices, parameters and generators are made ready."""

from __future__ import annotations

import copy
import os
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from timm.optim import create_optimizer_v2, get_optimizer_class
from torch import nn

from ..data import ImageSet
from ..errors import UsageError
from .config import TrainConfig

#: Gates go from 1 to 0 in the updates that change weights by a few percent.
GATES_FASTER = 100


def check(
    model: nn.Module, config: TrainConfig, images: ImageSet, teacher: nn.Module | None
) -> None:
    """Refuse what cannot be trained.

    Raises:
        UsageError: saying why.
    """
    if config.needs_labels and not images.labeled:
        raise UsageError(
            f"{images.source} has no labels, which this training needs.",
            "Sort the images into class folders, or distil with alpha 1.",
        )
    if config.distill is not None and teacher is None:
        raise UsageError(
            f"distill '{config.distill}' needs a teacher.", "Pass teacher=, or --teacher."
        )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UsageError("All parameters are frozen.", "Let some of them train (requires_grad_).")
    ours, theirs = (getattr(m, "num_classes", None) for m in (model, teacher))
    known = ours is not None and theirs is not None
    if known and config.distill in ("soft", "hard") and ours != theirs:
        raise UsageError(
            f"The teacher has {theirs} classes and the model {ours}.",
            "Take a teacher of the same classes, or learn its features (distill=feature).",
        )
    require_float32(model)


def require_float32(model: nn.Module) -> None:
    """Refuse to train weights of another precision.

    Raises:
        UsageError: saying what to do.
    """
    if next(model.parameters()).dtype != torch.float32:
        raise UsageError(
            "Weights are trained in float32.", "Convert the model, and set precision for speed."
        )


def accelerator_for(
    config: TrainConfig, device: torch.device | None, folder: Path | None
) -> Accelerator:
    """Accelerate on this device, or where it finds itself under a launcher.

    Raises:
        UsageError: when the batches cannot be shared out, or a tracker cannot be had.
    """
    # Accelerate remembers precision and device of a process's first training. Where processes have found
    # each other they must stay together.
    alone = not torch.distributed.is_initialized()
    AcceleratorState._reset_state(reset_partial_state=alone)
    # Without an accelerator it has to be told: its processes would else not find each other.
    on_cpu = not torch.accelerator.is_available()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a tracker that is missing: that is an error here
        try:
            accelerator = Accelerator(
                cpu=on_cpu or (device is not None and device.type == "cpu"),
                mixed_precision=config.precision,
                log_with=config.tracker,
                project_dir=folder if config.tracker else None,
            )
        except ValueError as error:
            mend = "Correct precision or tracker"
            if config.tracker and folder is None:
                mend += ", or pass folder=, where a tracker writes"
            raise UsageError(f"{error}", f"{mend}.") from error
    if config.tracker and not accelerator.log_with:
        raise UsageError(
            f"The tracker '{config.tracker}' is not installed.", "Install it, or train without."
        )
    processes = accelerator.num_processes
    if config.batch_size % (config.accumulate * processes):
        raise UsageError(
            f"batch_size {config.batch_size} cannot be shared out over {processes} processes with "
            f"accumulate {config.accumulate}.",
            "Make it a multiple of both.",
        )
    if config.mixes and config.batch_size // (config.accumulate * processes) % 2:
        raise UsageError(
            "Mixup and CutMix need an even number of images in each forward pass.",
            "Change batch_size.",
        )
    return accelerator


@contextmanager
def on_device(device: torch.device | None) -> Iterator[None]:
    """What "the GPU" means inside, for a process that is alone."""
    named = device is not None and device.type == "cuda" and device.index is not None
    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    with torch.cuda.device(device) if named and alone else nullcontext():
        yield


def parameter_groups(model: nn.Module, config: TrainConfig) -> list[dict[str, Any]]:
    """Matrices decay, vectors do not, and gates have their own learning rate; gates come last."""
    found: dict[str, list[nn.Parameter]] = {"matrices": [], "vectors": [], "gates": []}
    skip: set[str] = (
        cast(Any, model).no_weight_decay() if hasattr(model, "no_weight_decay") else set()
    )
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if name.rpartition(".")[2] == "gate":
            found["gates"].append(parameter)
        elif parameter.dim() < 2 or name in skip:
            found["vectors"].append(parameter)
        else:
            found["matrices"].append(parameter)
    gate_lr = config.gate_lr or GATES_FASTER * config.lr
    groups = [
        {"params": found["matrices"], "weight_decay": config.weight_decay, "lr": config.lr},
        {"params": found["vectors"], "weight_decay": 0.0, "lr": config.lr},
        {"params": found["gates"], "weight_decay": 0.0, "lr": gate_lr},
    ]
    return [group for group in groups if group["params"]]


def optimizer_for(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """timm's optimiser of that name.

    Raises:
        UsageError: when it needs what this machine does not have.
    """
    groups = parameter_groups(model, config)
    try:
        fused = _fused(config, next(model.parameters()).device)
        return create_optimizer_v2(
            groups, opt=config.optimizer, lr=config.lr, weight_decay=0.0, **fused
        )
    except (AssertionError, ImportError, RuntimeError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UsageError(
            f"The optimizer '{config.optimizer}' cannot be used here: {reason}", "Choose another."
        ) from error


def _fused(config: TrainConfig, device: torch.device) -> dict[str, Any]:
    """Asks for one kernel an update where torch has one: on CPUs loops over parameters take twice as long."""
    known = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)  # on CPUs and GPUs alike
    # In fp16 the kernel would decide by itself whether a step is skipped, unseen by Accelerate.
    if config.precision == "fp16" or device.type not in ("cpu", "cuda"):
        return {}
    kind = get_optimizer_class(config.optimizer, bind_defaults=False)
    return {"fused": True} if kind in known else {}


def frozen(teacher: nn.Module, device: torch.device) -> nn.Module:
    """A copy that neither learns nor changes its mode, and leaves the caller's where it is."""
    still = copy.deepcopy(teacher).to(device).eval()
    return still.requires_grad_(False)


@contextmanager
def generators_as_before() -> Iterator[None]:
    """Every global generator afterwards as it was."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002
