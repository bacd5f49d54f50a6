"""Vision Transformer Pruning (Zhu et al., arXiv 2104.08500).

1. Sparse training: a gate on every feature that a projection reads is trained together with the weights,
   under the task's loss + lambda * ||a||_1.
2. Pruning: features whose |a| falls below a threshold go; the threshold follows from a rate or a budget.
3. Fine-tuning without the penalty.

The gates' values are folded into the weights that stay, so that pruning changes the function by nothing
but what it removes; `harden` sets them to 1 instead, as the paper does.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from hashlib import sha256
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import nn

from ..budget import Budget, cost
from ..criteria import Importance, magnitude
from ..errors import BudgetError, UsageError
from ..gates import (
    Placement,
    fold_gates,
    gates_of,
    importance,
    insert_gates,
    l1,
    remove_gates,
    shrink,
)
from ..hosts import host_of
from ..orders import plan_for
from ..plan import Plan
from ..provenance import weights_hash
from ..shape import ViTShape
from ..surgery import apply
from ..threshold import GATED, Layer, Scope, at_rate, kept, rank, within_budget
from ..training import TrainConfig, fit
from . import stages
from .base import Method, Outcome, Task, keeps_all, within

Stage = Literal["sparse", "prune", "finetune"]


class VTP(Method):
    """Prune what a projection reads by learned importance, between sparse training and fine-tuning.

    Args:
        placement: "inputs" gates the paper's four places, "outputs" the outputs of Q, K and V and the
            hidden units, as published code does, "hidden" the hidden units alone.
        l1: lambda, the weight of the penalty.
        proximal: apply the penalty as a proximal step after each update instead of in the loss.
        scope: against what a feature is ranked: all others, its kind, or its layer.
        rate: share of the gated features to prune; None prunes until the budget is met. With a rate the
            budget is only checked.
        floor: share of each layer's features that stay in any case.
        harden: let gates end as 0 or 1 instead of folding their values into the weights.
        scores: "gates", or "magnitude" to rank by the norms of weights, without sparse training: the
            baseline, with all else equal.
        stage: the last stage to do. What the folder holds of it and of earlier ones is not done again.
        sparse_epochs: of sparse training; None for as many as of fine-tuning, as in the paper.
        sparse_lr: learning rate of the weights in sparse training; None for that of fine-tuning. A pruned model
            often needs a larger one to recover than the whole one stands.
        training: settings of both trainings.
    """

    name: ClassVar[str] = "vtp"

    placement: Placement = "inputs"
    l1: Annotated[float, Field(ge=0)] = 1e-4
    proximal: bool = False
    scope: Scope = "global"
    rate: Annotated[float, Field(gt=0, lt=1)] | None = None
    floor: Annotated[float, Field(ge=0, lt=1)] = 0.05
    harden: bool = False
    scores: Literal["gates", "magnitude"] = "gates"
    stage: Stage = "finetune"
    sparse_epochs: Annotated[int, Field(ge=1)] | None = None
    sparse_lr: Annotated[float, Field(gt=0)] | None = None
    training: TrainConfig = TrainConfig()

    @property
    def trains(self) -> TrainConfig | None:
        return self.training

    @property
    def needs_images(self) -> bool:
        return False

    def check(self, shape: ViTShape, budget: Budget) -> None:
        if self.placement == "outputs" and shape.qk_norm:
            raise UsageError(
                "The model normalises queries and keys, so their outputs cannot be gated.",
                "Gate the inputs (placement=inputs).",
            )
        if budget.metric in ("macs", "params") and not self._leaves(budget, shape):
            floors = at_rate(shape, self._layers(_alike(shape)), 1.1)
            least, limit = cost(floors, budget.metric), budget.limit(shape)
            if least > limit:
                raise BudgetError(
                    f"{limit:,} {budget.metric} are out of reach: with every layer at its floor the model "
                    f"has {least:,}.",
                    "Ask for more, lower the floor, or cut tokens too (closed-form).",
                )

    def plan(self, task: Task) -> Plan:
        if self._leaves(task.budget, task.shape):
            return Plan.identity(task.shape)
        scored = self._sparse(task)
        return self._prune(task, scored)[0]

    def run(self, task: Task) -> Outcome:
        if self._leaves(task.budget, task.shape):
            return Outcome(copy.deepcopy(task.model), Plan.identity(task.shape))
        gated = self._sparse(task)
        if self.stage == "sparse":
            return Outcome(
                fold_gates(gated), Plan.identity(task.shape), self._gate_facts(gated), whole=False
            )
        plan, facts = self._prune(task, gated)
        plain = remove_gates(gated) if self.harden else fold_gates(gated)
        small = apply(plain, plan)
        if self.stage == "finetune":
            facts["finetune"] = stages.finetune(task, self.training, small)
        return Outcome(small, plan, facts)

    # -- stage 1 ---------------------------------------------------------------------------------

    def _sparse(self, task: Task) -> nn.Module:
        """The model with trained gates; with gates at 1 where weights are to be ranked by magnitude."""
        gated = insert_gates(task.model, self.placement)
        if self.scores == "magnitude":
            return gated
        own = {
            "epochs": self.sparse_epochs or self.training.epochs,
            "lr": self.sparse_lr or self.training.lr,
        }
        config = stages.seeded(self.training, task).model_copy(update=own)
        fit(
            gated,
            config,
            stages.images(task),
            teacher=task.taught_by,
            folder=stages.folder(task, stages.SPARSE),
            resume=task.resume,
            penalty=None if self.proximal else lambda model: self.l1 * l1(model),
            after_update=(lambda model, lr: shrink(model, lr * self.l1)) if self.proximal else None,
            observe=lambda model: self._observe(task, model),
            identity={
                "model": weights_hash(task.model),
                "placement": self.placement,
                "l1": f"{self.l1}, {self.proximal}",
            },
            on_event=stages.told(task, "sparse training"),
            device=task.device,
        )
        return gated

    def _observe(self, task: Task, gated: nn.Module) -> dict[str, float]:
        """The share of gates that would be pruned now, and the threshold that does it."""
        scores = importance(gated)
        if self.rate is None and task.budget.metric not in ("macs", "params"):
            return {}
        layers = self._layers(scores)
        target = self._target(task, gated, scores, layers)
        share = 1 - sum(kept(target, layer) for layer in layers) / sum(len(r.ranks) for r in layers)
        return {"pruned": share, "threshold": float(_magnitudes(gated).quantile(share))}

    # -- stage 2 ---------------------------------------------------------------------------------

    def _prune(self, task: Task, gated: nn.Module) -> tuple[Plan, dict[str, Any]]:
        if self.scores == "magnitude":
            host = host_of(task.model)
            blocks = [host.block(task.model, i) for i in range(task.shape.depth)]
            scores = [magnitude(host.read(block)) for block in blocks]
        else:
            scores = importance(gated)
        layers = self._layers(scores)

        def make() -> Plan:
            target = self._target(task, gated, scores, layers)
            return plan_for(task.shape, target, [s.order() for s in scores])

        by_the_clock = task.budget.metric not in ("macs", "params")
        plan = self._agreed(task, gated, make) if by_the_clock else make()
        target = plan.result(task.shape)
        if not by_the_clock:
            spent, limit = cost(target, task.budget.metric), task.budget.limit(task.shape)
            if spent > limit:
                raise BudgetError(
                    f"A rate of {self.rate} leaves {spent:,} {task.budget.metric}, over the budget of "
                    f"{limit:,}.",
                    "Prune more, or leave the rate out.",
                )
        return plan, {"kept": _shares(target, layers), **self._gate_facts(gated)}

    def _agreed(self, task: Task, gated: nn.Module, make: Callable[[], Plan]) -> Plan:
        """The plan that was first made for these gates: latencies come out otherwise every time, and in
        every process."""
        identity = {
            "gates": weights_hash(gated),
            "budget": str(task.budget),
            "settings": self.model_dump_json(exclude={"stage", "training"}),
        }
        name = stages.PLAN.format(sha256("".join(identity.values()).encode()).hexdigest()[:8])
        found = stages.agreed(
            task, self.training, name, identity, lambda: {"plan": make().to_json()}
        )
        return Plan.from_json(found["plan"])

    def _target(
        self, task: Task, gated: nn.Module, scores: Sequence[Importance], layers: Sequence[Layer]
    ) -> ViTShape:
        """The sizes that the scores, and the rate or the budget, come to."""
        if self.rate is not None:
            return at_rate(task.shape, layers, self.rate)

        def allocate(metric: str, limit: int) -> ViTShape:
            return within_budget(task.shape, layers, metric, limit)

        def milliseconds(shapes: list[ViTShape]) -> list[float]:
            orders = [s.order() for s in scores]
            plain = fold_gates(gated)
            return task.stopwatch([apply(plain, plan_for(task.shape, s, orders)) for s in shapes])

        return within(task.budget, task.shape, allocate, milliseconds)

    def _layers(self, scores: Sequence[Importance]) -> list[Layer]:
        return rank(scores, GATED[self.placement], self.scope, self.floor)

    def _leaves(self, budget: Budget, shape: ViTShape) -> bool:
        """Whether there is nothing to do."""
        return self.rate is None and self.stage != "sparse" and keeps_all(budget, shape)

    def _gate_facts(self, gated: nn.Module) -> dict[str, Any]:
        if self.scores == "magnitude":
            return {}
        points = torch.tensor([0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0], dtype=torch.float64)
        found = _magnitudes(gated).quantile(points).tolist()
        return {"gate_quantiles": [round(q, 5) for q in found]}


def _magnitudes(gated: nn.Module) -> torch.Tensor:
    """Absolute values of all gates in one row."""
    return torch.cat([g.detach().abs().flatten() for _, g in gates_of(gated)]).double().cpu()


def _shares(target: ViTShape, layers: Sequence[Layer]) -> dict[str, list[float]]:
    """Share of the units of each kind that stay, block by block."""
    found: dict[str, list[float]] = {}
    for layer in layers:
        share = kept(target, layer) / len(layer.ranks)
        found.setdefault(layer.kind, []).append(round(share, 4))
    return found


def _alike(shape: ViTShape) -> list[Importance]:
    """Scores that are all the same."""

    def ones(*sizes: int) -> torch.Tensor:
        return torch.ones(sizes)

    return [
        Importance(
            qk_dims=ones(block.num_heads, block.qk_dim),
            v_dims=ones(block.num_heads, block.v_dim),
            neurons=ones(block.mlp_dim),
            attn_features=ones(block.attn_features or shape.embed_dim),
            mlp_features=ones(block.mlp_features or shape.embed_dim),
        )
        for block in shape.blocks
    ]
