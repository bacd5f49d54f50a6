"""Training-free compression with closed-form compensation; the default.

1. A sweep of unlabeled images through the dense model collects second moments.
2. Attention is rotated into bases whose leading dims matter most; neurons and heads are ordered by
   backward elimination. Now any size of any dimension is a selection, and compensation is a regression.
3. The harm of cutting each dimension of each block is measured at the outputs on a few images, and the
   budget is shared out where it harms least, over all dimensions at once.
4. The model is cut, and a second sweep compensates block by block on the inputs each really gets; at
   last the mean of the outputs is matched.
5. Optionally, minutes of label-free distillation on the same images.

The same code makes the usual baselines: other criteria, no compensation, uniform cuts.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import nn

from ..allocate import (
    allocate_marginal,
    allocate_tuned,
    allocate_uniform,
    require_reachable,
)
from ..bases import rotate
from ..budget import Budget
from ..calibrate import BlockMoments, dense_sweep
from ..criteria import (
    Criterion,
    Order,
    magnitude,
    output_error,
    variance,
    with_match_features,
)
from ..errors import DataError, UsageError
from ..gradients import taylor
from ..harm import measure
from ..hosts import host_of
from ..orders import plan_for
from ..plan import Plan
from ..reconstruct import cut
from ..shape import Matching, ViTShape
from ..simulate import Simulator
from ..sizes import Dimension, Steps
from ..surgery import apply
from ..training import TrainConfig, fit
from .base import BATCH_SIZE, Method, Outcome, Task, keeps_all, with_matching, within

#: Tokens are compared by one in so many features: those that vary most, which is as good and cheaper.
MATCH_SHARE = 3
#: Decay of the moving average of weights while refining: some twenty updates.
REFINE_EMA = 0.95


@dataclass(frozen=True)
class Prepared:
    """The model to cut, in sorted bases where the criterion asks for them, and how to cut it."""

    model: nn.Module
    plan: Plan
    facts: dict[str, Any]


@dataclass(frozen=True)
class Sorted:
    """A model whose units are ordered: in sorted bases where the criterion asks for them.

    Attributes:
        moments, orders: of each block; no moments where nothing needs them.
    """

    model: nn.Module
    moments: list[BlockMoments]
    orders: list[Order]


class ClosedForm(Method):
    """Cut tokens, heads, QK and V dims and MLP neurons to one budget, without labels or training.

    Args:
        criterion: which units go first: "output_error" after compensation, or the baselines
            "magnitude", "variance" and "taylor".
        compensation: regress what was removed on what was kept.
        allocation: "marginal" cuts where it harms the outputs least, "uniform" everywhere alike.
        dimensions: what may be cut. None means all; for uniform cuts all but whole heads, since these
            would be cut twice.
        matching: how tokens are paired for merging, see `shape.Matching`.
        ridge: towards no compensation, as a fraction of the kept inputs' mean variance.
        harm_images: images on which the harm of each cut alone is measured.
        tune_images: images on which whole plans are compared to correct for how cuts interact; 0 trusts
            the sum of single harms.
        taylor_labels: "self" takes the model's own predictions as labels, "given" the data's.
        refine: epochs of label-free distillation of the features before the head, on the calibration images,
            afterwards; 0 for none.
        refine_lr: its learning rate.
    """

    name: ClassVar[str] = "closed-form"

    criterion: Criterion = "output_error"
    compensation: bool = True
    allocation: Literal["marginal", "uniform"] = "marginal"
    dimensions: Annotated[tuple[Dimension, ...], Field(min_length=1)] | None = None
    matching: Matching = "attention"
    ridge: Annotated[float, Field(gt=0)] = 1e-3
    harm_images: Annotated[int, Field(ge=1)] = 64
    tune_images: Annotated[int, Field(ge=0)] = 384
    taylor_labels: Literal["self", "given"] = "self"
    refine: Annotated[int, Field(ge=0)] = 0
    refine_lr: Annotated[float, Field(gt=0)] = 1e-5

    @property
    def needs_labels(self) -> bool:
        return self.criterion == "taylor" and self.taylor_labels == "given"

    def cuts_tokens(self, budget: Budget) -> bool:
        return budget.metric != "params" and (
            self.dimensions is None or "tokens" in self.dimensions
        )

    def check(self, shape: ViTShape, budget: Budget) -> None:
        if budget.metric == "params" and set(self.dimensions or ()) == {"tokens"}:
            raise UsageError(
                "Merging tokens removes no parameters.",
                "Allow other dimensions, or give a budget in MACs.",
            )
        if not self._dimensions(shape, budget):
            raise UsageError(
                "The model normalises queries and keys, so their dims cannot be cut.",
                "Allow other dimensions.",
            )
        if budget.metric in ("macs", "params"):
            limit, shape = budget.limit(shape), self._merging(shape)
            sizes = (self._dimensions(shape, budget), Steps.for_shape(shape))
            if self.allocation == "uniform":
                allocate_uniform(shape, budget.metric, limit, *sizes)
            else:
                require_reachable(shape, budget.metric, limit, *sizes)

    def plan(self, task: Task) -> Plan:
        if keeps_all(task.budget, task.shape):
            return Plan.identity(task.shape)
        return self.prepare(task).plan

    def run(self, task: Task) -> Outcome:
        if keeps_all(task.budget, task.shape):
            return Outcome(copy.deepcopy(task.model), Plan.identity(task.shape))
        stages = 4 + bool(self.refine)
        ready = self.prepare(task)
        if ready.plan == Plan.identity(task.shape):  # fast enough as it is
            return Outcome(copy.deepcopy(task.model), ready.plan, dict(ready.facts))
        task.progress(3, stages)
        if self.compensation:
            small = cut(ready.model, ready.plan, task.batches(), self.ridge, task.model)
        else:
            small = apply(ready.model, ready.plan)
        task.progress(4, stages)
        facts = dict(ready.facts)
        if self.refine:
            facts["refine"] = self._refine(task, small)
            task.progress(stages, stages)
        return Outcome(small, ready.plan, facts)

    def _refine(self, task: Task, small: nn.Module) -> dict[str, Any]:
        """Step 5: the small model learns the dense one's features on the calibration images.

        Features tell more than outputs that are sure, and the small model is near its best already: without a moving
        average the steps' noise outweighs what they learn.
        """
        config = TrainConfig(
            epochs=self.refine,
            batch_size=BATCH_SIZE,
            lr=self.refine_lr,
            weight_decay=0.0,
            distill="feature",
            ema=REFINE_EMA,
            seed=task.seed,
        )
        if task.data is None:
            raise DataError("There are no calibration images.", "Pass data=, or --calibrate.")
        dtype = next(small.parameters()).dtype
        teacher = task.model
        if dtype != torch.float32:  # in which weights are trained
            small.float()
            teacher = copy.deepcopy(task.model).float()
        # Models are often frozen for inference, and this one comes from such a model.
        frozen = not any(p.requires_grad for p in small.parameters())
        if frozen:
            small.requires_grad_(True)
        losses = fit(small, config, task.data, teacher=teacher, device=task.device).losses
        if frozen:
            small.requires_grad_(False)
        small.to(dtype)
        return {"epochs": self.refine, "first_loss": losses[0], "last_loss": losses[-1]}

    def prepare(self, task: Task) -> Prepared:
        """Steps 1 to 3: everything up to the plan."""
        stages = 4 + bool(self.refine)
        task.progress(0, stages)
        ready = self.sort(task)
        shape = self._merging(task.shape)
        task.progress(1, stages)
        target, facts = self._allocate(task, shape, ready)
        task.progress(2, stages)
        return Prepared(ready.model, self._plan_for(shape, target, ready), facts)

    def sort(self, task: Task) -> Sorted:
        """Steps 1 and 2."""
        moments = dense_sweep(task.model, task.batches()) if self._needs_moments else []
        model = task.model
        if self.criterion == "output_error":
            model, moments = rotate(task.model, moments)
        orders = self._orders(task, model, moments)
        if moments:
            orders = [with_match_features(o, m) for o, m in zip(orders, moments, strict=True)]
        return Sorted(model, moments, orders)

    @property
    def _needs_moments(self) -> bool:
        return self.compensation or self.criterion in ("output_error", "variance")

    def _merging(self, shape: ViTShape) -> ViTShape:
        """The shape with the rule of merging, whose cost counts."""
        compared = max(1, shape.embed_dim // MATCH_SHARE) if self._needs_moments else None
        return with_matching(shape, self.matching, compared)

    def _dimensions(self, shape: ViTShape, budget: Budget) -> tuple[Dimension, ...]:
        wanted: tuple[Dimension, ...] = self.dimensions or (
            ("tokens", "qk", "v", "neurons", "heads")
            if self.allocation == "marginal"
            else ("tokens", "qk", "v", "neurons")
        )
        # Normalised queries and keys keep their dims: a cut would change what is normalised. Tokens have no parameters.
        fixed = {"qk"} if shape.qk_norm else set()
        fixed |= {"tokens"} if budget.metric == "params" else set()
        return tuple(d for d in wanted if d not in fixed)

    def _orders(self, task: Task, model: nn.Module, moments: list[BlockMoments]) -> list[Order]:
        host = host_of(model)
        blocks = [host.block(model, i) for i in range(task.shape.depth)]
        weights = [host.read(block) for block in blocks]
        if self.criterion == "output_error":
            found = zip(weights, moments, blocks, strict=True)
            return [output_error(w, own, self.ridge, block.gains()) for w, own, block in found]
        if self.criterion == "magnitude":
            return [magnitude(tensors).order() for tensors in weights]
        if self.criterion == "variance":
            return [variance(own).order() for own in moments]
        return [s.order() for s in taylor(model, task.batches(), self.taylor_labels == "given")]

    def _plan_for(self, shape: ViTShape, target: ViTShape, ready: Sorted) -> Plan:
        """The plan for these sizes. Where the head reads prefix tokens alone, nothing reads what the last block
        makes of the others, and to pair these carefully would only take time."""
        last = target.blocks[-1]
        if shape.pools_prefix and last.num_tokens_out < last.num_tokens_in:
            fused = last.model_copy(update={"fuses": True})
            quick = target.with_blocks((*target.blocks[:-1], fused))
            target = quick if quick.macs <= target.macs else target
        return plan_for(shape, target, ready.orders)

    def _allocate(
        self,
        task: Task,
        shape: ViTShape,
        ready: Sorted,
    ) -> tuple[ViTShape, dict[str, Any]]:
        dimensions, steps = self._dimensions(shape, task.budget), Steps.for_shape(shape)
        facts: dict[str, Any] = {}

        def simulator(images: int, any_start: bool) -> Simulator:
            ridge = self.ridge if self.compensation else None
            batches = task.batches(images)
            return Simulator(
                ready.model,
                ready.moments,
                ready.orders,
                batches,
                ridge,
                shape.matching,
                shape.match_features,
                any_start,
            )

        def milliseconds(shapes: list[ViTShape]) -> list[float]:
            return task.stopwatch(
                [apply(ready.model, self._plan_for(shape, s, ready)) for s in shapes]
            )

        if self.allocation == "uniform":

            def uniform(metric: str, limit: int) -> ViTShape:
                return allocate_uniform(shape, metric, limit, dimensions, steps)

            return within(task.budget, shape, uniform, milliseconds), facts

        single = simulator(self.harm_images, any_start=True)
        harm = measure(single, dimensions, steps)
        together = simulator(self.tune_images, any_start=False) if self.tune_images else single

        def marginal(metric: str, limit: int) -> ViTShape:
            if not self.tune_images:
                return allocate_marginal(harm, metric, limit, dimensions, steps)
            return allocate_tuned(harm, together, metric, limit, dimensions, steps)

        target = within(task.budget, shape, marginal, milliseconds)
        facts["harm_evaluations"] = sum(s.evaluations for s in {single, together})
        return target, facts
