"""Low rank for attention, pruning for the feed-forward halves, under one budget.

After "Vision Transformer Compression with Structured Pruning and Low Rank Approximation" (arXiv 2203.13444),
which finds that pruning everything by learned gates empties the feed-forward halves, and so prunes these at
a lower rate and takes the rest from attention by low rank. With the four projections of attention factored
at rank k of d features, and a share p of four times d hidden units pruned, k/d + 1 - p times two thirds of a
block's weights stay: half of them for p = 0.25 + k/d.

1. Attention at low rank. "factors": each projection becomes two, as in the paper. "per-head": in each head,
   W_q W_k^T and W_v W_o are what is approximated; a lower rank then is a smaller head, which costs no extra
   multiplication and saves at any rank.
2. Hidden units pruned, by the error of the output after compensation or by learned gates; how many, so that
   the budget is met. Unless attention's share is given, it is found together with theirs: where it harms
   least.
3. What is lost is compensated in closed form, on the inputs that each block really gets.
4. Optionally, fine-tuning.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from ..allocate import allocate_uniform
from ..budget import Budget
from ..calibrate import dense_sweep
from ..criteria import explained, output_error
from ..errors import UsageError
from ..hosts import host_of, shape_of
from ..orders import plan_for
from ..plan import Plan
from ..ranks import Spectrum, at_share, with_ranks, within_budget
from ..reconstruct import cut
from ..shape import DENSE, ViTShape
from ..sizes import Steps
from ..surgery import apply
from ..training import TrainConfig
from . import stages
from .base import Method, Outcome, Task, keeps_all, within
from .closed_form import ClosedForm, Prepared
from .low_rank import LowRank, Projection, flat_spectra, inputs_of
from .vtp import VTP

ATTENTION: tuple[Projection, ...] = ("q", "k", "v", "out")


class Hybrid(Method):
    """Attention by low rank, feed-forward by pruning at a lower rate.

    Args:
        form: of low rank: "per-head" makes heads smaller, "factors" makes each projection two.
        attention: share of the full rank that stays in every block, hidden units then being cut alike in all
            blocks; None shares the budget out over both.
        activation_aware: "factors" are those of the weights as real inputs see them; else of the weights.
        compensation: regress what was removed on what was kept.
        ridge: towards no compensation, as a fraction of the kept inputs' mean variance.
        scores: what hidden units are ranked by: "output_error", or "gates" learned in sparse training.
        l1: lambda, the weight of the gates' penalty.
        sparse_epochs: of sparse training; None for as many as of fine-tuning.
        training: settings of sparse training and of fine-tuning; None for no training at all.
    """

    name: ClassVar[str] = "hybrid"

    form: Literal["per-head", "factors"] = "per-head"
    attention: Annotated[float, Field(gt=0, le=1)] | None = None
    activation_aware: bool = True
    compensation: bool = True
    ridge: Annotated[float, Field(gt=0)] = 1e-3
    scores: Literal["output_error", "gates"] = "output_error"
    l1: Annotated[float, Field(ge=0)] = 1e-4
    sparse_epochs: Annotated[int, Field(ge=1)] | None = None
    training: TrainConfig | None = None

    @property
    def trains(self) -> TrainConfig | None:
        return self.training

    def check(self, shape: ViTShape, budget: Budget) -> None:
        if self.scores == "gates" and self.training is None:
            raise UsageError(
                "Gates are learned in training.", "Give training settings, or rank by output_error."
            )
        if any(block.ranks != DENSE for block in shape.blocks):
            raise UsageError(
                "The model has low-rank projections already.",
                "Multiply them out first (vitailor.surgery.merge_back).",
            )
        if budget.metric not in ("macs", "params") or keeps_all(budget, shape):
            return
        limit = budget.limit(shape)
        if self.attention is not None:
            self._alike(shape)(budget.metric, limit)
        elif self.form == "per-head":
            self._widths.check(shape, budget)
        else:
            flat = [*flat_spectra(shape, ATTENTION), *_flat_neurons(shape)]
            within_budget(shape, flat, budget.metric, limit)

    def plan(self, task: Task) -> Plan:
        if keeps_all(task.budget, task.shape):
            return Plan.identity(task.shape)
        ready = self._prepare(task)
        if self.scores == "output_error":
            return ready.plan
        vtp, rest = self._gates(task, ready)
        return _with_neurons(ready.plan, vtp.plan(rest))

    def run(self, task: Task) -> Outcome:
        if keeps_all(task.budget, task.shape):
            return Outcome(copy.deepcopy(task.model), Plan.identity(task.shape))
        task.progress(0, 2)
        ready = self._prepare(task)
        task.progress(1, 2)
        plan, facts = ready.plan, dict(ready.facts)
        if self.scores == "output_error":
            small = self._cut(task, ready.model, plan)
        else:
            vtp, rest = self._gates(task, ready)
            found = vtp.run(rest)
            small, plan = found.model, _with_neurons(plan, found.plan)
            facts |= found.facts
        task.progress(2, 2)
        if self.training is not None:
            facts["finetune"] = stages.finetune(task, self.training, small)
        return Outcome(small, plan, facts)

    # -- steps 1 and 2 ---------------------------------------------------------------------------

    def _prepare(self, task: Task) -> Prepared:
        """The model with its attention ready to be cut, and all sizes."""
        quiet = replace(task, progress=lambda done, total: None)
        return self._smaller_heads(quiet) if self.form == "per-head" else self._factored(quiet)

    @property
    def _widths(self) -> ClosedForm:
        """Heads' dims are already sorted by the low rank of their products there."""
        return ClosedForm(
            dimensions=("qk", "v", "neurons"), compensation=self.compensation, ridge=self.ridge
        )

    def _smaller_heads(self, task: Task) -> Prepared:
        if self.attention is None:
            return self._widths.prepare(task)
        ready = self._widths.sort(task)

        def milliseconds(shapes: list[ViTShape]) -> list[float]:
            plans = [plan_for(task.shape, shape, ready.orders) for shape in shapes]
            return task.stopwatch([apply(ready.model, plan) for plan in plans])

        target = within(task.budget, task.shape, self._alike(task.shape), milliseconds)
        return Prepared(ready.model, plan_for(task.shape, target, ready.orders), {})

    def _factored(self, task: Task) -> Prepared:
        low = LowRank(projections=ATTENTION, activation_aware=self.activation_aware)
        moments = dense_sweep(task.model, task.batches(), attention_input=True)
        host = host_of(task.model)
        blocks = [host.block(task.model, i) for i in range(task.shape.depth)]
        weights = [host.read(block) for block in blocks]
        found = list(zip(weights, moments, blocks, strict=True))
        inputs = [inputs_of(w, m) if self.activation_aware else {} for w, m, _ in found]
        orders = [output_error(w, m, self.ridge, block.gains()) for w, m, block in found]
        spectra = low.spectra(task.model, inputs)
        for i, (tensors, own, block) in enumerate(found):
            gain, written = block.gains()[1], tensors["fc2.weight"].double()
            written = written if gain is None else written * gain.double().unsqueeze(1)
            energies = explained(written, own.hidden.covariance, orders[i].neurons, self.ridge)
            spectra.append(_neurons(task.shape, i, energies))

        def shared_out(metric: str, limit: int) -> ViTShape:
            choice = within_budget(task.shape, spectra, metric, limit)
            return with_ranks(task.shape, spectra, choice)

        def milliseconds(shapes: list[ViTShape]) -> list[float]:
            plans = [plan_for(task.shape, shape, orders) for shape in shapes]
            return task.stopwatch([apply(task.model, plan) for plan in plans])

        allocate = shared_out if self.attention is None else self._alike(task.shape)
        target = within(task.budget, task.shape, allocate, milliseconds)
        plan, nearest = plan_for(task.shape, target, orders), copy.deepcopy(task.model)
        errors = low.decompose(nearest, plan, inputs, task.seed)
        return Prepared(nearest, plan, {"errors": errors})

    def _alike(self, shape: ViTShape) -> Callable[[str, int], ViTShape]:
        """Attention at the given share in all blocks; hidden units, alike too, meet the budget."""
        assert self.attention is not None
        share, steps = self.attention, Steps.for_shape(shape)
        if self.form == "factors":
            flat = flat_spectra(shape, ATTENTION)
            low = with_ranks(shape, flat, at_share(flat, share))
        else:
            sizes = []
            for block in shape.blocks:
                update = {"v_dim": _share(block.v_dim, share, steps.v)}
                if not shape.qk_norm:
                    update["qk_dim"] = _share(block.qk_dim, share, steps.qk)
                sizes.append(block.model_copy(update=update))
            low = shape.with_blocks(tuple(sizes))
        return lambda metric, limit: allocate_uniform(low, metric, limit, ("neurons",), steps)

    def _gates(self, task: Task, ready: Prepared) -> tuple[VTP, Task]:
        """Learned gates on the hidden units of the model whose attention is at low rank."""
        assert self.training is not None  # checked before any work
        blocks = tuple(b.model_copy(update={"neurons": None}) for b in ready.plan.blocks)
        low = self._cut(task, ready.model, ready.plan.model_copy(update={"blocks": blocks}))
        target = ready.plan.result(task.shape)
        limit = (
            {"params": target.params} if task.budget.metric == "params" else {"macs": target.macs}
        )
        vtp = VTP(
            placement="hidden",
            l1=self.l1,
            stage="prune",
            sparse_epochs=self.sparse_epochs,
            training=self.training,
        )
        rest = replace(
            task, model=low, shape=shape_of(low), budget=Budget(**limit), teacher=task.taught_by
        )
        vtp.check(rest.shape, rest.budget)
        return vtp, rest

    # -- step 3 ----------------------------------------------------------------------------------

    def _cut(self, task: Task, model: nn.Module, plan: Plan) -> nn.Module:
        if not self.compensation:
            return apply(model, plan)
        return cut(model, plan, task.batches(), self.ridge, task.model)


def _with_neurons(plan: Plan, neurons: Plan) -> Plan:
    """The plan with the hidden units that another keeps."""
    blocks = tuple(
        own.model_copy(update={"neurons": other.neurons})
        for own, other in zip(plan.blocks, neurons.blocks, strict=True)
    )
    return plan.model_copy(update={"blocks": blocks})


def _neurons(shape: ViTShape, index: int, energies: Tensor) -> Spectrum:
    """What each number of a block's hidden units keeps; their biases' parameters are not counted."""
    block = shape.blocks[index]
    fan_in = block.mlp_features or shape.embed_dim
    return Spectrum(index, "neurons", fan_in, shape.embed_dim, energies, units=block.mlp_dim)


def _flat_neurons(shape: ViTShape) -> list[Spectrum]:
    """The same where nothing is known."""
    return [_neurons(shape, i, torch.ones(b.mlp_dim)) for i, b in enumerate(shape.blocks)]


def _share(full: int, share: float, step: int) -> int:
    return min(full, max(step, round(full * share / step) * step))
