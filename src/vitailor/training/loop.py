"""The loop: updates on Accelerate, validation each epoch, checkpoints, and an exact way back from them.

All randomness of an update is drawn from (seed, epoch, update, process), so a resumed training needs no
state of generators: at equal thread and process count its weights are those of an uninterrupted one, bit
for bit.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from timm.data import Mixup
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from ..data import ImageSet, readers
from ..errors import TrainingError, UsageError
from ..evaluation import evaluate
from ..processes import is_first_process
from ..provenance import weights_hash
from . import checkpoints
from .config import TrainConfig
from .images import Seeded, batches, reseed
from .losses import Outputs, total_loss
from .prepare import (
    accelerator_for,
    check,
    frozen,
    generators_as_before,
    on_device,
    optimizer_for,
)
from .progress import Event, Meter, TrainResult
from .teacher import consult, lookup

#: Adds to the loss from the model alone, e.g. an L1 norm of gates.
Penalty = Callable[[nn.Module], Tensor]
#: Changes a model's parameters in place after each update, given the learning rate of gates.
AfterUpdate = Callable[[nn.Module, float], None]
#: Changes a model before each update, given the update's number from the beginning of training.
BeforeUpdate = Callable[[nn.Module, int], None]
#: Looks at a model after each epoch and says what is worth telling, by name.
Observe = Callable[[nn.Module], dict[str, float]]


def fit(
    model: nn.Module,
    config: TrainConfig,
    images: ImageSet,
    *,
    val: ImageSet | None = None,
    teacher: nn.Module | None = None,
    folder: Path | None = None,
    resume: bool = False,
    penalty: Penalty | None = None,
    before_update: BeforeUpdate | None = None,
    after_update: AfterUpdate | None = None,
    observe: Observe | None = None,
    on_event: Callable[[Event], None] | None = None,
    identity: Mapping[str, str] | None = None,
    device: torch.device | None = None,
) -> TrainResult:
    """Train a model in place.

    Runs on whatever Accelerate finds, and as one of several processes under `accelerate launch` or
    `torchrun`: these see the same images for an update as one process does.

    Args:
        model: in float32; afterwards on its old device, in eval mode.
        images: training images; open them with `images.Augmentation` to have them augmented.
        val: labeled validation images.
        teacher: for distillation; left as it is.
        folder: for checkpoints, "last.pt" and "best.pt" (by top-1 on `val`, else by loss); None for none.
        resume: go on from "last.pt", if there is one.
        penalty: added to the loss.
        before_update: called before each update, e.g. to choose what of the model takes part.
        after_update: called after each update, e.g. for a proximal step.
        observe: looks at the model after each epoch; what it returns is told.
        on_event: told about progress, in the first process only.
        identity: what else must be as it was for a training to be resumed, e.g. a hash of the weights
            that it began with.
        device: where to train, for a process that is alone; by default an accelerator where there is one.

    Raises:
        UsageError, DataError: before training, for what cannot work.
        TrainingError: when the loss is not finite; weights in checkpoints are from before.
    """
    check(model, config, images, teacher)
    home = next(model.parameters()).device
    if folder is not None and not resume and is_first_process():
        checkpoints.clear(folder)
    with on_device(device), generators_as_before():
        accelerator = accelerator_for(config, device, folder)
        same = _identity(config, images, val, teacher) | dict(identity or {})
        state = None
        if folder is not None and resume:
            state = checkpoints.load(folder, checkpoints.LAST, same, accelerator.num_processes)
        run = _Run(model, config, images, teacher, accelerator, penalty, after_update)
        run.val, run.folder, run.identity = val, folder, same
        run.before_update, run.observe, run.on_event = before_update, observe, on_event
        result = run.train(state)
    model.to(home).eval()
    return result


def _identity(
    config: TrainConfig, images: ImageSet, val: ImageSet | None, teacher: nn.Module | None
) -> dict[str, Any]:
    """What must be the same for a training to be resumed."""
    # The first image as training sees it tells of preprocessing, and of tensors that have no names.
    first = Seeded(images, config.seed, config.hflip)[0, 0][0].float().contiguous()
    return checkpoints.settings(config) | {
        "images": images.list_hash,
        "first image": sha256(first.numpy().tobytes()).hexdigest(),
        "val": val.list_hash if val is not None else None,
        "teacher": weights_hash(teacher) if teacher is not None and config.distill else None,
    }


class _Run:
    """One training: what `fit` was given, and where it stands."""

    val: ImageSet | None = None
    folder: Path | None = None
    identity: Mapping[str, Any]
    before_update: BeforeUpdate | None = None
    observe: Observe | None = None
    on_event: Callable[[Event], None] | None = None

    def __init__(
        self,
        model: nn.Module,
        config: TrainConfig,
        images: ImageSet,
        teacher: nn.Module | None,
        accelerator: Accelerator,
        penalty: Penalty | None,
        after_update: AfterUpdate | None,
    ) -> None:
        self.model, self.config, self.images = model, config, images
        self.accelerator, self.penalty, self.after_update = accelerator, penalty, after_update
        features = config.distill == "feature"
        model.to(accelerator.device)
        optimizer = optimizer_for(model, config)
        self.updates = -(-len(images) // config.batch_size)
        self.scheduler = create_scheduler_v2(
            optimizer,
            sched=config.schedule,
            num_epochs=config.epochs,
            decay_epochs=config.epochs / 3,
            warmup_epochs=config.warmup_epochs,
            warmup_lr=0.0,
            min_lr=config.min_lr,
            step_on_epochs=False,
            updates_per_epoch=self.updates,
        )[0]
        self.wrapped, self.optimizer = accelerator.prepare(Outputs(model, features), optimizer)
        self.teacher: Outputs | None = None
        self.remembered: Tensor | None = None
        if config.distill is not None and teacher is not None:
            # A view of the caller's teacher: neither its mode nor its device may change.
            self.teacher = Outputs(frozen(teacher, accelerator.device), features)
        self.ema = ModelEmaV3(model, decay=config.ema) if config.ema else None
        self.mixup = None
        if config.mixes:
            self.mixup = Mixup(
                mixup_alpha=config.mixup,
                cutmix_alpha=config.cutmix,
                label_smoothing=config.label_smoothing,
                num_classes=int(getattr(model, "num_classes", 0)),
            )
        self.losses: list[float] = []
        self.top1: list[float] = []
        self.meter = Meter()

    # -- the loop --------------------------------------------------------------------------------

    def train(self, state: dict[str, Any] | None) -> TrainResult:
        if self.config.tracker:
            facts = {name: str(value) for name, value in self.identity.items()}
            self.accelerator.init_trackers("vitailor", config=facts)
        try:
            return self._train(state)
        finally:
            # Not end_training, which would part processes that have found each other for good.
            for tracker in self.accelerator.trackers:
                tracker.finish()

    def _train(self, state: dict[str, Any] | None) -> TrainResult:
        begin, update, total = self._restore(state)
        if self.teacher is not None and begin < self.config.epochs:
            self.remembered = consult(
                self.teacher,
                self.model,
                self.images,
                self.config,
                self.accelerator,
                self.folder,
                self.identity,
                self._tell_consulting,
            )
        for epoch in range(begin, self.config.epochs):
            self._epoch(epoch, update, total)
            update, total = 0, 0.0
        if self.ema is not None:
            self.model.load_state_dict(self.ema.module.state_dict())
        done = (tuple(self.losses), tuple(self.top1))
        return TrainResult(len(self.losses), *done, self.meter.overall)

    def _epoch(self, epoch: int, first: int, total: float) -> None:
        config, accelerator = self.config, self.accelerator
        rank, processes = accelerator.process_index, accelerator.num_processes
        workers = readers(self.images, accelerator.device, config.workers)
        found = iter(batches(self.images, config, rank, processes, epoch, first, workers))
        for update in range(first, self.updates):
            started = time.perf_counter()
            self.wrapped.train()
            total += self._update(epoch, update, found)
            self.meter.add(config.batch_size, time.perf_counter() - started)
            every = config.checkpoint_every
            if every and (update + 1) % every == 0 and update + 1 < self.updates:
                self._save(checkpoints.LAST, epoch, update + 1, total)
            self._tell(epoch, update + 1, total / (update + 1))
        self.losses.append(total / self.updates)
        judged = self.ema.module if self.ema is not None else self.model
        if self.val is not None:
            self.top1.append(self._validated(judged, self.val))
        observed = self.observe(judged) if self.observe is not None else {}
        top1 = self.top1[-1] if self.val is not None else None
        told = observed | ({} if top1 is None else {"top1": top1})
        if told:
            self._tell(epoch, self.updates, self.losses[-1], top1, observed)
        if told and self.config.tracker:
            self.accelerator.log(told, step=(epoch + 1) * self.updates)
        scores = self.top1 or [-loss for loss in self.losses]
        # The last one last: whoever resumes from it finds the best one done.
        if scores[-1] == max(scores):
            self._save(checkpoints.BEST, epoch + 1, 0, 0.0)
        self._save(checkpoints.LAST, epoch + 1, 0, 0.0)

    def _validated(self, model: nn.Module, val: ImageSet) -> float:
        """Top-1 in percent, in float32; processes share the images."""
        accelerator = self.accelerator
        mine = val.subset(range(accelerator.process_index, len(val), accelerator.num_processes))
        hits = sum(evaluate(model, mine, workers=self.config.workers).correct) if len(mine) else 0
        total: Tensor = accelerator.reduce(
            torch.tensor(float(hits), device=accelerator.device), reduction="sum"
        )
        return 100 * float(total) / len(val)

    def _update(self, epoch: int, update: int, found: Iterator[Any]) -> float:
        """One step of the optimiser; returns the loss over the whole global batch."""
        config, accelerator = self.config, self.accelerator
        step = epoch * self.updates + update
        self.scheduler.step_update(step)
        if self.before_update is not None:
            self.before_update(self.model, step)
        parts: list[Tensor] = []
        for part in range(config.accumulate):
            last = part == config.accumulate - 1
            x, labels, views = next(found)
            # Images seed the generators they draw from; everything after them draws from these.
            reseed(config.seed, epoch, update, part, accelerator.process_index)
            with nullcontext() if last else accelerator.no_sync(self.wrapped):
                loss = self._loss(
                    x.to(accelerator.device, torch.float32), labels.to(accelerator.device), views
                )
                parts.append(loss.detach())
                accelerator.backward(loss / config.accumulate)
        mean: Tensor = accelerator.reduce(torch.stack(parts).mean(), reduction="mean")
        value = float(mean)
        self._require_finite("loss", value, epoch, update)
        limit = math.inf if config.clip_grad is None else config.clip_grad
        norm = accelerator.clip_grad_norm_(self.model.parameters(), limit)
        if accelerator.scaler is None and norm is not None:  # which skips such updates by itself
            self._require_finite("gradient's norm", float(norm), epoch, update)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.after_update is not None:
            self.after_update(self.model, self.optimizer.param_groups[-1]["lr"])
        if self.ema is not None:
            self.ema.update(self.model, step=step)
        if config.tracker:
            accelerator.log({"loss": value, "lr": self._lr()}, step=step)
        return value

    def _require_finite(self, what: str, value: float, epoch: int, update: int) -> None:
        if not math.isfinite(value):
            raise TrainingError(
                f"The {what} is {value} at epoch {epoch + 1}, update {update + 1} of {self.updates}.",
                f"{self._last_good()} Lower the learning rate, or clip gradients.",
            )

    def _loss(self, x: Tensor, labels: Tensor, views: Tensor) -> Tensor:
        if not self.config.needs_labels:
            labels = labels.clamp_min(0)  # none there, and none read; but Mixup wants numbers
        if self.mixup is not None:
            x, labels = self.mixup(x, labels)
        truth = None
        if self.remembered is not None:
            truth = lookup(self.remembered, views)
        elif self.teacher is not None:
            with torch.no_grad(), self.accelerator.autocast():
                truth = self.teacher(x)
        loss = total_loss(self.wrapped(x), truth, labels, self.config)
        return loss if self.penalty is None else loss + self.penalty(self.model)

    # -- progress --------------------------------------------------------------------------------

    def _lr(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])

    def _tell_consulting(self, done: int, total: int) -> None:
        if self.on_event is not None and self.accelerator.is_main_process:
            now = Event(0, self.config.epochs, done, total, math.nan, self._lr(), 0.0, math.inf)
            self.on_event(now)

    def _tell(
        self,
        epoch: int,
        update: int,
        loss: float,
        top1: float | None = None,
        observed: dict[str, float] | None = None,
    ) -> None:
        if self.on_event is None or not self.accelerator.is_main_process:
            return
        left = (self.config.epochs - epoch) * self.updates - update
        self.on_event(
            Event(
                epoch + 1,
                self.config.epochs,
                update,
                self.updates,
                loss,
                self._lr(),
                self.meter.speed,
                self.meter.seconds_for(left * self.config.batch_size),
                top1,
                observed or {},
            )
        )

    # -- checkpoints -----------------------------------------------------------------------------

    def _save(self, name: str, epoch: int, update: int, total: float) -> None:
        if self.folder is None or not self.accelerator.is_main_process:
            return
        scaler = self.accelerator.scaler
        state = {
            "identity": dict(self.identity),
            "processes": self.accelerator.num_processes,
            "epoch": epoch,
            "update": update,
            "total": total,
            "seen": self.meter.seen,
            "seconds": self.meter.seconds,
            "losses": self.losses,
            "top1": self.top1,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ema": self.ema.module.state_dict() if self.ema is not None else None,
            "scaler": scaler.state_dict() if scaler is not None else None,
        }
        checkpoints.save(self.folder, name, state)

    def _restore(self, state: dict[str, Any] | None) -> tuple[int, int, float]:
        """Epoch and update to go on with, and the sum of that epoch's losses so far."""
        place = (-1, 0) if state is None else (state["epoch"], state["update"])
        mine = torch.tensor([place], device=self.accelerator.device)
        if (self.accelerator.gather(mine) != mine).any():
            raise UsageError(
                "Processes found different checkpoints.",
                "Train into a folder that all of them see.",
            )
        if state is None:
            return 0, 0, 0.0
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.ema is not None:
            self.ema.module.load_state_dict(state["ema"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.losses, self.top1 = list(state["losses"]), list(state["top1"])
        self.meter = Meter(state["seen"], state["seconds"])
        return state["epoch"], state["update"], state["total"]

    def _last_good(self) -> str:
        path = self.folder / checkpoints.LAST if self.folder is not None else None
        if path is None or not path.exists():
            return "There is no checkpoint yet."
        return f"The last good checkpoint is {path}."
