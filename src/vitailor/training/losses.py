"""What is learned: labels, a teacher, or both."""

from __future__ import annotations

from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn

from .config import TrainConfig


class Outputs(nn.Module):
    """A model that returns (features before the head (B, D), logits (B, classes)).

    Where features are not needed they are the logits, and the model runs through its own `forward`.
    """

    def __init__(self, model: nn.Module, features: bool) -> None:
        super().__init__()
        self.model, self.features = model, features

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        if not self.features:
            logits = self.model(images)
            return logits, logits
        host = cast(Any, self.model)
        tokens = host.forward_features(images)
        return host.forward_head(tokens, pre_logits=True), host.forward_head(tokens)


def task_loss(logits: Tensor, labels: Tensor, config: TrainConfig) -> Tensor:
    """Cross entropy with class indices (B,), or with mixed distributions (B, classes)."""
    smoothing = 0.0 if labels.is_floating_point() else config.label_smoothing
    return F.cross_entropy(logits.float(), labels, label_smoothing=smoothing)


def teacher_loss(
    student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor], config: TrainConfig
) -> Tensor:
    """Distance of the student's (features, logits) from the teacher's.

    "soft": KL divergence at temperature T, times T^2 (Hinton et al., arXiv 1503.02531). "hard": cross
    entropy with the teacher's decision (DeiT, arXiv 2012.12877). "feature": mean squared error of the
    features before the head, relative to the teacher's mean square.
    """
    if config.distill == "feature":
        error = (student[0] - teacher[0]).float().square().mean()
        return error / teacher[0].float().square().mean().clamp_min(1e-12)
    got, want = student[1].float(), teacher[1].float()
    if config.distill == "hard":
        return F.cross_entropy(got, want.argmax(-1))
    t = config.temperature
    divergence = F.kl_div(
        (got / t).log_softmax(-1),
        (want / t).log_softmax(-1),
        log_target=True,
        reduction="batchmean",
    )
    return divergence * t**2


def total_loss(
    student: tuple[Tensor, Tensor],
    teacher: tuple[Tensor, Tensor] | None,
    labels: Tensor,
    config: TrainConfig,
) -> Tensor:
    """(1 - alpha) of the labels' loss and alpha of the teacher's; the labels' alone without a teacher."""
    if teacher is None:
        return task_loss(student[1], labels, config)
    # Every parameter takes part, also the head where features are learned: processes wait for all.
    loss = 0.0 * student[1].float().sum()
    if config.alpha < 1:
        loss = loss + (1 - config.alpha) * task_loss(student[1], labels, config)
    return loss + config.alpha * teacher_loss(student, teacher, config)
