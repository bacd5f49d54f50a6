"""`train`: fine-tune or distil any model. The verb over the training loop."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from .benchmarking import conditions
from .data import ClassMap, Data, open_images
from .errors import VitailorError
from .hosts import shape_of
from .models import open_model
from .preprocessing import Preprocessing, resolve_preprocessing
from .provenance import Provenance, provenance_of, weights_hash
from .shape import revise
from .training import Augmentation, Event, TrainConfig, TrainResult, fit

#: What `compress` records of the accuracy of its result.
ACCURACIES = ("top1", "top5", "images", "evaluated_on", "evaluated_list_hash")


def train(
    model: nn.Module,
    data: Data,
    config: TrainConfig | None = None,
    *,
    val: Data | None = None,
    teacher: nn.Module | None = None,
    folder: str | os.PathLike[str] | None = None,
    resume: bool = False,
    images: int | None = None,
    class_map: ClassMap | None = None,
    device: str | torch.device | None = None,
    preprocessing: Preprocessing | None = None,
    on_event: Callable[[Event], None] | None = None,
) -> nn.Module:
    """Train a model: on labels, from a teacher, or both.

    Runs where Accelerate runs; as one of several processes under `accelerate launch` or `torchrun` every
    process calls it with the same arguments.

    Args:
        model: any supported model in float32, compressed or not; left exactly as it is.
        data: training images, as `compress` takes them; files are augmented as `config` says.
        config: settings; those of `TrainConfig()` by default.
        val: labeled images to measure accuracy on after each epoch.
        teacher: for distillation, in eval mode or not; left as it is. With a teacher and no
            `config.distill`, its class distribution is what is learned.
        folder: for checkpoints, "last.pt" and "best.pt"; None for none.
        resume: go on from "last.pt" there, if there is one, exactly as if nothing had been interrupted.
        images: train on so many of the images, drawn by seed.
        class_map: class index of each class folder.
        device: "cpu" stays on the CPU where there is a GPU.
        preprocessing: of image files; the model's own by default.
        on_event: told after each update and each epoch, in the first process.

    Returns:
        The trained model, in eval mode, on the device of `model`. Its `.vitailor.record["training"]` has
        the settings, the loss and top-1 of each epoch, and images per second.

    Raises:
        UsageError, DataError, UnsupportedModelError: before training, for what cannot work.
        TrainingError: when the loss is not finite; the last good checkpoint stays.
    """
    config = config or TrainConfig()
    if teacher is not None and config.distill is None:
        config = config.model_copy(update={"distill": "soft"})
    shape = shape_of(model)
    preprocessing = preprocessing or resolve_preprocessing(model)
    classes = shape.num_classes or None
    found = open_images(
        data,
        Augmentation.of(preprocessing, config),
        num_classes=classes,
        class_map=class_map,
        images=images,
        seed=config.seed,
        labels_needed=config.needs_labels,
        split="train",
    )
    test = None
    if val is not None:
        test = open_images(
            val, preprocessing, num_classes=classes, class_map=class_map, labels_needed=True
        )
    student = copy.deepcopy(model)
    result = fit(
        student,
        config,
        found,
        val=test,
        teacher=teacher,
        folder=Path(folder) if folder is not None else None,
        resume=resume,
        on_event=on_event,
        identity={"model": weights_hash(model)},
        cpu=device is not None and torch.device(device).type == "cpu",
    )
    known = provenance_of(model) or Provenance(shape=shape)
    # Accuracies that were measured before are not those of the trained model.
    record = {key: value for key, value in known.record.items() if key not in ACCURACIES}
    if test is not None and result.top1:
        record |= {"top1": {"after": result.top1[-1]}, "images": len(test)}
        record |= {"evaluated_on": test.source, "evaluated_list_hash": test.list_hash}
    facts = _facts(config, result, found.source, len(found), found.list_hash)
    cast(Any, student).vitailor = revise(
        known,
        record={**record, "training": facts},
        preprocessing=preprocessing,
        class_names=known.class_names or found.class_names or None,
    )
    return student


def default_teacher(model: nn.Module) -> nn.Module | None:
    """The dense model that a compressed one came from, where it can be had without being named.

    It must be at hand under the name that the artifact records, and have the weights it had then.
    """
    known = provenance_of(model)
    if known is None or not known.steps:
        return None
    first = known.steps[0]
    try:
        teacher = open_model(first.source).model
    except (VitailorError, OSError):
        return None
    return teacher if weights_hash(teacher) == first.weights_hash else None


def _facts(
    config: TrainConfig, result: TrainResult, source: str, images: int, list_hash: str
) -> dict[str, Any]:
    return {
        "settings": config.model_dump(mode="json"),
        "source": source,
        "images": images,
        "list_hash": list_hash,
        "epochs": result.epochs,
        "losses": list(result.losses),
        "top1": list(result.top1),
        "images_per_s": round(result.images_per_s, 2),
        "conditions": conditions(torch.device("cpu")) | {"threads": torch.get_num_threads()},
    }
