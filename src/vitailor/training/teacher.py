"""What a teacher says about each image: computed with every batch, or once and remembered.

Where augmentation is no more than flips, every epoch shows the same views of an image, and the teacher
need not run again. All outputs are computed before training, in a fixed order, so that they do not depend
on where a training was interrupted.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..data import ImageSet, loader, readers
from ..errors import UsageError
from .config import TrainConfig
from .images import Seeded
from .losses import Outputs

FILE = "teacher.safetensors"
MAX_BYTES = 2**30
#: Images that are read twice to see whether they come out the same.
PROBES = 32
BATCH = 64


def consult(
    teacher: Outputs,
    student: nn.Module,
    images: ImageSet,
    config: TrainConfig,
    accelerator: Accelerator,
    folder: Path | None,
    identity: Mapping[str, Any],
    tell: Callable[[int, int], None],
) -> Tensor | None:
    """See that the teacher fits, and have it look at all images beforehand where that saves work.

    Args:
        folder: where outputs are kept for a training that is resumed.
        identity: of the training, see `fit`.
        tell: called with how many images are done and their number.

    Returns:
        What `lookup` reads, or None where the teacher is to be asked with every batch.

    Raises:
        UsageError: when teacher and student do not go together.
    """
    width = _common_width(teacher, student, images, config, accelerator.device)
    shared = len(images) >= accelerator.num_processes  # every process has some to ask about
    worth = shared and worth_remembering(config, len(images), width)
    seen = probe(images) if worth else None
    if seen is None:
        return None
    about = ("teacher", "images", "distill", "hflip", "precision")
    key = json.dumps({name: identity[name] for name in about} | {"seen": seen})
    table = load(folder, key) if folder is not None else None
    have = torch.tensor(float(table is not None), device=accelerator.device)
    everywhere: Tensor = accelerator.reduce(have, reduction="sum")
    if table is None or int(everywhere) < accelerator.num_processes:
        table = remember(teacher, images, config, accelerator, tell)
        if folder is not None and accelerator.is_main_process:
            save(folder, key, table)
    return table.to(accelerator.device)


@torch.no_grad()
def _common_width(
    teacher: Outputs,
    student: nn.Module,
    images: ImageSet,
    config: TrainConfig,
    device: torch.device,
) -> int:
    """How many numbers student and teacher give for an image, of the kind that is learned."""
    x = images[0][0].unsqueeze(0).to(device, torch.float32)
    kind = 0 if config.distill == "feature" else 1
    ours = int(Outputs(student.eval(), teacher.features)(x)[kind].shape[1])
    try:
        theirs = int(teacher(x)[kind].shape[1])
    except (AssertionError, RuntimeError, AttributeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UsageError(
            f"The teacher cannot take images of {tuple(x.shape[2:])} pixels: {reason}",
            "Take a teacher of the model's input size.",
        ) from error
    if ours != theirs:
        what, other = ("features", "soft") if kind == 0 else ("classes", "feature")
        raise UsageError(
            f"The teacher gives {theirs} {what} and the model {ours}.",
            f"Learn something else of it (distill={other}).",
        )
    return ours


def views_of(config: TrainConfig) -> tuple[int, ...]:
    """Which views of an image can come up: as it is (0), flipped (1)."""
    return {0.0: (0,), 1.0: (1,)}.get(config.hflip, (0, 1))


def worth_remembering(config: TrainConfig, count: int, width: int) -> bool:
    """Whether remembering `width` numbers for each view of an image fits in memory and saves work."""
    few = len(views_of(config)) < config.epochs
    return few and not config.mixes and 2 * count * width * 4 <= MAX_BYTES


def probe(images: ImageSet) -> str | None:
    """A hash of some images as they come, or None where they come out otherwise every time."""
    seen = sha256()
    once, again = Seeded(images, 1), Seeded(images, 2)
    for i in range(min(PROBES, len(images))):
        first = once[0, i][0]
        if not torch.equal(first, again[1, i][0]):
            return None
        seen.update(first.float().contiguous().numpy().tobytes())
    return seen.hexdigest()


@torch.no_grad()
def remember(
    teacher: Outputs,
    images: ImageSet,
    config: TrainConfig,
    accelerator: Accelerator,
    tell: Callable[[int, int], None],
) -> Tensor:
    """The teacher's features or logits, whichever are learned, for view v at row v: (2 * images, width).

    Processes share the work; `tell` is called with how many of its images one has done and their number.
    """
    mine = range(accelerator.process_index, len(images), accelerator.num_processes)
    table: Tensor | None = None
    done = 0
    workers = readers(images, accelerator.device, config.workers)
    for batch, _ in loader(images.subset(mine), batch_size=BATCH, workers=workers):
        rows, x = list(mine[done : done + len(batch)]), batch.to(accelerator.device, torch.float32)
        done += len(rows)
        for view in views_of(config):
            with accelerator.autocast():
                features, logits = teacher(x.flip(-1) if view else x)
            found = (features if config.distill == "feature" else logits).float()
            if table is None:
                table = found.new_zeros(2 * len(images), found.shape[1])
            table[torch.tensor(rows, device=table.device) * 2 + view] = found
        tell(done, len(mine))
    assert table is not None
    total: Tensor = accelerator.reduce(table, reduction="sum")
    return total


def load(folder: Path, identity: str) -> Tensor | None:
    """Outputs remembered in an earlier run of the same training, if they are there."""
    try:
        with safe_open(folder / FILE, framework="pt") as file:
            if (file.metadata() or {}).get("identity") != identity:
                return None
            table: Tensor = file.get_tensor("outputs")
            return table
    except (OSError, SafetensorError):
        return None


def save(folder: Path, identity: str, table: Tensor) -> None:
    """Put outputs beside the checkpoints; a killed process leaves no half a file."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".{FILE}.{os.getpid()}"
    try:
        save_file({"outputs": table.cpu()}, partial, {"identity": identity})
        partial.replace(folder / FILE)
    finally:
        partial.unlink(missing_ok=True)


def lookup(table: Tensor, views: Tensor) -> tuple[Tensor, Tensor]:
    """What the teacher says about these views, in place of both its features and its logits."""
    found = table[views.to(table.device)]
    return found, found
