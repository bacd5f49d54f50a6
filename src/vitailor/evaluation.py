"""Accuracy of a classifier with its interval, and the paired difference of two."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn

from .data import ClassMap, Data, ImageSet, loader, open_images, readers, resolve_preprocessing
from .errors import DataError, UnsupportedModelError
from .preprocessing import Preprocessing

Progress = Callable[[int, int], None]
Z95 = 1.959963984540054  # 97.5% quantile of the standard normal distribution


@dataclass(frozen=True)
class Accuracy:
    """Accuracy on a set of images.

    Attributes:
        top1, top5: percent of images whose label is the highest, or among the five highest outputs;
            with fewer than five classes top5 is over all of them.
        images: their number.
        top1_interval: 95% Wilson interval of top1, in percent.
        correct: for each image, in the order of the set, whether its label is the highest output.
        list_hash: hash of the list of images (`ImageSet.list_hash`).
    """

    top1: float
    top5: float
    images: int
    top1_interval: tuple[float, float]
    correct: tuple[bool, ...]
    list_hash: str = ""

    def to_json(self) -> dict[str, Any]:
        return {
            "top1": self.top1,
            "top5": self.top5,
            "images": self.images,
            "top1_interval": list(self.top1_interval),
        }


def evaluate(
    model: nn.Module,
    data: Data,
    *,
    preprocessing: Preprocessing | None = None,
    batch_size: int | None = None,
    device: str | torch.device | None = None,
    images: int | None = None,
    seed: int = 0,
    class_map: ClassMap | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Accuracy:
    """Accuracy of a model on labeled images.

    The model's device, training flags and the random state are afterwards as before.

    Args:
        model: classifier; called on (B, 3, H, W) images it returns logits (B, classes), or something
            with a `logits` attribute.
        data: images, as `open_images` takes them.
        preprocessing: what images go through; the model's own when None.
        batch_size: images at a time; None chooses by device.
        device: where to run; None means where the model is.
        images, seed, class_map: as for `open_images`.
        workers: processes that read images; None for some where an accelerator would wait for one.
        progress: called with the images done and their total after each batch.

    Raises:
        DataError: when images cannot be had, have no labels, or have labels the head does not have.
        UnsupportedModelError: when the model returns no logits.
    """
    home = _device(model)
    target = torch.device(device) if device is not None else home
    if preprocessing is None and not isinstance(data, ImageSet):
        preprocessing = resolve_preprocessing(model)
    with _evaluating(model, home, target):
        num_classes = None
        if preprocessing is not None and isinstance(data, str | os.PathLike):
            # Folders are numbered by it. Asking the model costs one image and works for every library.
            probe = torch.zeros(1, *preprocessing.input_size)
            num_classes = _logits(model, probe, target).shape[-1]
        image_set = open_images(
            data,
            preprocessing,
            num_classes=num_classes,
            class_map=class_map,
            images=images,
            seed=seed,
            labels_needed=True,
        )
        size = batch_size or (128 if target.type == "cuda" else 16)
        top1: list[bool] = []
        top5 = 0
        workers = readers(image_set, target, workers)
        for x, labels in loader(image_set, batch_size=size, workers=workers):
            logits = _logits(model, x, target).float().cpu()
            hits = _hits(logits, labels, image_set)
            top1 += hits[:, 0].tolist()
            top5 += int(hits.any(dim=1).sum())
            if progress is not None:
                progress(len(top1), len(image_set))
    total = len(top1)
    low, high = wilson_interval(sum(top1), total)
    return Accuracy(
        top1=100 * sum(top1) / total,
        top5=100 * top5 / total,
        images=total,
        top1_interval=(100 * low, 100 * high),
        correct=tuple(top1),
        list_hash=image_set.list_hash,
    )


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """95% score interval of a proportion (Wilson 1927), as fractions.

    Unlike the Wald interval it stays in [0, 1] and has a width when all or none succeed.
    """
    if trials < 1:
        raise DataError("No images were evaluated.", "Give at least one.")
    p, z2 = successes / trials, Z95**2
    centre = (p + z2 / (2 * trials)) / (1 + z2 / trials)
    half = Z95 * sqrt(p * (1 - p) / trials + z2 / (4 * trials**2)) / (1 + z2 / trials)
    # Rounding must not put the estimate outside, at p = 0 or 1.
    return min(p, max(0.0, centre - half)), max(p, min(1.0, centre + half))


def paired_difference(after: Accuracy, before: Accuracy) -> tuple[float, float, float]:
    """Difference of top-1 on the same images, in points, and its 95% interval.

    The interval is the adjusted Wald interval of Bonett and Price (2012), "Adjusted Wald confidence
    interval for a difference of binomial proportions based on paired data", Journal of Educational and
    Behavioral Statistics 37(4): one more image is counted in each of the two discordant cells. So it
    has a width (about 2.8 / images) when the models agree on every image, where the plain Wald interval
    claims certainty; Fagerland, Lydersen and Laake (2014, Statistics in Medicine 33) recommend it.

    Returns:
        difference (after minus before), and the interval's ends.

    Raises:
        DataError: when the two were not measured on the same images.
    """
    hashes = {after.list_hash, before.list_hash} - {""}
    if len(after.correct) != len(before.correct) or len(hashes) > 1:
        raise DataError(
            f"The accuracies are of different images ({before.images} before, {after.images} after).",
            "Evaluate both models on the same images, with the same seed.",
        )
    n = len(after.correct)
    pairs = list(zip(after.correct, before.correct, strict=True))
    gained = sum(a and not b for a, b in pairs)
    lost = sum(b and not a for a, b in pairs)
    p, q = (gained + 1) / (n + 2), (lost + 1) / (n + 2)
    half = Z95 * sqrt((p + q - (p - q) ** 2) / (n + 2))
    low, high = max(-1.0, p - q - half), min(1.0, p - q + half)
    return 100 * (gained - lost) / n, 100 * low, 100 * high


def _hits(logits: Tensor, labels: Tensor, images: ImageSet) -> Tensor:
    """Whether the label is the k-th highest output, for k up to five: (B, 5) bool."""
    classes = logits.shape[-1]
    if int(labels.min()) < 0 or int(labels.max()) >= classes:
        bad = int(labels.min()) if int(labels.min()) < 0 else int(labels.max())
        raise DataError(
            f"{images.source} has label {bad}, but the model has {classes} classes "
            f"(0 to {classes - 1}).",
            "Use images of the model's classes, each with a label.",
        )
    hits = logits.topk(min(5, classes), dim=-1).indices == labels[:, None]
    # A row with NaN has no order; whatever topk returns for it is not an answer.
    return hits & ~logits.isnan().any(dim=-1, keepdim=True)


@torch.inference_mode()
def _logits(model: nn.Module, x: Tensor, device: torch.device) -> Tensor:
    """Outputs for images, which are moved to the device and the model's precision: (B, classes)."""
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    output = model(x.to(device, dtype))
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        raise UnsupportedModelError(
            f"{type(model).__name__} returns no logits of shape (images, classes).",
            "Evaluate a classifier.",
        )
    return logits


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


@contextmanager
def _evaluating(model: nn.Module, home: torch.device, target: torch.device) -> Iterator[None]:
    """The model on `target` in evaluation mode; on leaving, all as before."""
    training = {module: module.training for module in model.modules()}
    cuda = [target] if target.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        try:
            if target != home:
                model.to(target)
            model.eval()
            yield
        finally:
            for module, flag in training.items():
                module.training = flag
            if target != home:
                model.to(home)
