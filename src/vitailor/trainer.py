"""`train`: fine-tune or distil any model. The verb over the training loop."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import timm
import torch
from huggingface_hub import try_to_load_from_cache
from torch import nn

from .benchmarking import conditions
from .data import ClassMap, Data, ImageSet, open_images
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
        device: where to train; by default a GPU where there is one. Under a launcher each process has
            its own.
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
    if teacher is not None:
        teacher = _on_images_of(teacher, model, preprocessing)
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
        device=None if device is None else torch.device(device),
    )
    known = provenance_of(model) or Provenance(shape=shape)
    # Accuracies that were measured before are not those of the trained model.
    record = {key: value for key, value in known.record.items() if key not in ACCURACIES}
    if test is not None and result.top1:
        record |= {"top1": {"after": result.top1[-1]}, "images": len(test)}
        record |= {"evaluated_on": test.source, "evaluated_list_hash": test.list_hash}
    facts = _facts(config, result, found, device, teacher)
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
    if not _is_at_hand(first.source):
        return None
    try:
        teacher = open_model(first.source).model
    except (VitailorError, OSError):
        return None
    return teacher if weights_hash(teacher) == first.weights_hash else None


def _is_at_hand(source: str) -> bool:
    """Whether a model can be opened without a download."""
    if "=" in source or Path(source).exists():
        return True
    if not timm.is_model(source):
        return False
    repository = getattr(timm.get_pretrained_cfg(source), "hf_hub_id", None)
    if not repository:
        return False
    files = ("model.safetensors", "open_clip_model.safetensors", "pytorch_model.bin")
    return any(isinstance(try_to_load_from_cache(repository, file), str) for file in files)


class Renormalised(nn.Module):
    """A teacher that is given images with another mean and standard deviation than it wants."""

    scale: torch.Tensor
    shift: torch.Tensor

    def __init__(self, teacher: nn.Module, given: Preprocessing, wanted: Preprocessing) -> None:
        super().__init__()
        self.teacher, self.num_classes = teacher, getattr(teacher, "num_classes", None)
        scale = [a / b for a, b in zip(given.std, wanted.std, strict=True)]
        ends = zip(given.mean, wanted.mean, wanted.std, strict=True)
        shift = [(a - b) / s for a, b, s in ends]
        self.register_buffer("scale", torch.tensor(scale).view(-1, 1, 1))
        self.register_buffer("shift", torch.tensor(shift).view(-1, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return cast(torch.Tensor, self.teacher(x * self.scale + self.shift))

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        host = cast(Any, self.teacher)
        return cast(torch.Tensor, host.forward_features(x * self.scale + self.shift))

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        return cast(torch.Tensor, cast(Any, self.teacher).forward_head(x, pre_logits=pre_logits))


def _on_images_of(teacher: nn.Module, model: nn.Module, given: Preprocessing) -> nn.Module:
    """The teacher, taking images as the model takes them, where their own means differ.

    Where the caller has chosen another preprocessing than the model's own, it is for the teacher too.
    """
    try:
        ours, theirs = resolve_preprocessing(model), resolve_preprocessing(teacher)
    except (VitailorError, AttributeError, TypeError):
        return teacher
    same = (ours.mean, ours.std) == (theirs.mean, theirs.std)
    if same or (given.mean, given.std) != (ours.mean, ours.std):
        return teacher
    return Renormalised(teacher, given, theirs)


def _facts(
    config: TrainConfig,
    result: TrainResult,
    images: ImageSet,
    device: str | torch.device | None,
    teacher: nn.Module | None,
) -> dict[str, Any]:
    on_gpu = torch.cuda.is_available() if device is None else torch.device(device).type == "cuda"
    return {
        "settings": config.model_dump(mode="json"),
        "source": images.source,
        "images": len(images),
        "list_hash": images.list_hash,
        "teacher": weights_hash(teacher) if teacher is not None and config.distill else None,
        "epochs": result.epochs,
        "losses": list(result.losses),
        "top1": list(result.top1),
        "images_per_s": round(result.images_per_s, 2),
        "conditions": conditions(torch.device("cuda" if on_gpu else "cpu"))
        | {"threads": torch.get_num_threads()},
    }
