"""Minutes of label-free distillation: the compressed model learns the dense model's outputs on the
calibration images. The input model is never touched; the compressed one is trained in place."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from .calibrate import Batches, images_of
from .simulate import divergence


def distil(
    teacher: nn.Module, student: nn.Module, batches: Batches, epochs: int, lr: float, seed: int
) -> dict[str, Any]:
    """Train `student` in place to give the teacher's outputs.

    AdamW without weight decay, cosine schedule, gradients clipped to norm 1; images are flipped left to
    right at random, by seed. The loss is the mean KL divergence from the teacher's class distribution
    (relative squared error for a model without classes). No labels are used.

    Returns:
        Loss of the first and of the last epoch, in nats.
    """
    generator = torch.Generator().manual_seed(seed)
    device = next(student.parameters()).device
    classes = int(getattr(student, "num_classes", 0))
    optimizer = torch.optim.AdamW(student.parameters(), lr=lr, weight_decay=0.0)
    count = sum(1 for _ in batches)
    losses: list[float] = []
    step = 0
    for _ in range(epochs):
        total, images_seen = 0.0, 0
        for batch in batches:
            images = images_of(batch).to(device)
            flip = torch.rand(len(images), generator=generator) < 0.5
            images = torch.where(flip.to(device)[:, None, None, None], images.flip(-1), images)
            with torch.no_grad():
                truth = teacher(images)
            loss = divergence(student(images), truth, classes).mean()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            for group in optimizer.param_groups:
                group["lr"] = lr * 0.5 * (1 + math.cos(math.pi * step / (epochs * count)))
            optimizer.step()
            step += 1
            total, images_seen = (
                total + float(loss.detach()) * len(images),
                images_seen + len(images),
            )
        losses.append(total / images_seen)
    optimizer.zero_grad()
    return {"epochs": epochs, "first_loss": losses[0], "last_loss": losses[-1]}
