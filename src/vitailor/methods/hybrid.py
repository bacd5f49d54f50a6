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
3. What is removed by selection, heads' dims and hidden units, is compensated in closed form, on the inputs that
   each block really gets; what factors lose of the mean goes into their biases. With gates, hidden units are
   removed from a model that was trained to do without them, and are not compensated.
4. Optionally, fine-tuning.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..allocate import allocate_uniform, rounded
from ..budget import Budget
from ..calibrate import Moments, dense_sweep
from ..criteria import Order, explained, output_error
from ..errors import UsageError
from ..hosts import Tensors, host_of, shape_of
from ..orders import plan_for
from ..plan import Plan
from ..provenance import weights_hash
from ..ranks import Spectrum, at_share, with_ranks, within_budget
from ..reconstruct import cut
from ..shape import DENSE, ViTShape
from ..sizes import FIELDS, Dimension, Steps
from ..surgery import apply, hollow, written
from ..training import TrainConfig
from . import stages
from .base import Method, Outcome, Task, keeps_all, within
from .closed_form import ClosedForm, Prepared
from .judging import fingerprint
from .low_rank import LowRank, Projection, flat_spectra, inputs_of
from .vtp import VTP

ATTENTION: tuple[Projection, ...] = ("q", "k", "v", "out")
#: Share of a block's hidden units that stay whatever their gates, unless the budget wants fewer.
FLOOR = 0.05


class Hybrid(Method):
    """Attention by low rank, feed-forward by pruning.

    Args:
        form: of low rank: "per-head" makes heads smaller, "factors" makes each projection two.
        attention: share of the full rank that stays in every block (of value dims alone where queries and
            keys are normalised), hidden units then being cut alike in all blocks, or with gates by their
            ranks in each block; None shares the budget out over both. Factors save only at ranks below
            half the width.
        activation_aware: factors are those of the weights as real inputs see them; else of the weights.
        compensation: regress what was removed on what was kept.
        ridge: towards no compensation, as a fraction of the kept inputs' mean variance.
        scores: what hidden units are ranked by: "output_error", or "gates" learned in sparse training.
        l1: lambda, the weight of the gates' penalty.
        sparse_epochs, sparse_lr: of sparse training; None for those of fine-tuning.
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
    sparse_lr: Annotated[float, Field(gt=0)] | None = None
    training: TrainConfig | None = None

    @property
    def trains(self) -> TrainConfig | None:
        return self.training

    def check(self, shape: ViTShape, budget: Budget) -> None:
        if self.scores == "gates" and self.training is None:
            raise UsageError(
                "Gates are learned in training.", "Give training settings, or rank by output_error."
            )
        if self.form == "per-head" and not self.activation_aware:
            raise UsageError(
                "Smaller heads are those of the weights as real inputs see them.",
                "Choose form=factors, or leave activation_aware as it is.",
            )
        if self.scores == "gates" and budget.metric not in ("macs", "params"):
            raise UsageError(
                "Gates are pruned to a number of MACs or parameters, not to a latency.",
                "Give the budget so, or rank by output_error.",
            )
        if any(block.ranks != DENSE for block in shape.blocks):
            raise UsageError(
                "The model has low-rank projections already.",
                "Multiply them out first (vitailor.merge_back).",
            )
        if self.form == "factors" and self.attention is not None and self.attention < 1:
            flat = flat_spectra(shape, ATTENTION)
            if not any(at_share(flat, self.attention)):
                raise UsageError(
                    f"Two factors at {self.attention:g} of the full rank cost no less than the projection.",
                    "Keep less than half, or choose form=per-head, which saves at any rank.",
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
        if self.scores == "output_error":
            return self._prepare(task).plan
        low = self._settled(task)
        vtp, rest = self._gates(task, low)
        return _with_neurons(low.plan, vtp.plan(rest))

    def run(self, task: Task) -> Outcome:
        if keeps_all(task.budget, task.shape):
            return Outcome(copy.deepcopy(task.model), Plan.identity(task.shape))
        task.progress(0, 1)
        low = self._untrained(task) if self.training is None else self._settled(task)
        small, plan, facts = low.model, low.plan, dict(low.facts)
        if self.scores == "gates":
            vtp, rest = self._gates(task, low)
            found = vtp.run(rest)
            small, plan = found.model, _with_neurons(plan, found.plan)
            facts |= found.facts
        task.progress(1, 1)
        if self.training is not None:
            identity = self._identity(task)
            facts["finetune"] = stages.finetune(task, self.training, small, identity)
        return Outcome(small, plan, facts)

    def _settled(self, task: Task) -> Outcome:
        """What training begins with, made once."""
        assert self.training is not None  # checked before any work
        identity = self._identity(task)
        return stages.settled(task, self.training, identity, lambda: self._untrained(task))

    def _identity(self, task: Task) -> dict[str, str]:
        """What the outcome without training depends on."""
        free = {"training", "sparse_epochs", "sparse_lr", "l1"}
        return {
            "model": weights_hash(task.model),
            "budget": str(task.budget),
            "hybrid": self.model_dump_json(exclude=free),
            "seed": str(task.seed),
            "calibration": fingerprint(task.data) if task.data is not None else "",
        }

    def _untrained(self, task: Task) -> Outcome:
        """Steps 1 to 3; where gates are to decide on hidden units, all of these still there."""
        ready = self._prepare(task)
        plan, target = ready.plan, ready.plan.result(task.shape)
        if self.scores == "gates":
            blocks = tuple(block.model_copy(update={"neurons": None}) for block in plan.blocks)
            plan = plan.model_copy(update={"blocks": blocks})
        if self.compensation:
            small = cut(ready.model, plan, task.batches(), self.ridge, task.model)
        else:
            small = apply(ready.model, plan)
        limits = {"macs": target.macs, "params": target.params}
        neurons = [block.mlp_dim for block in target.blocks]
        return Outcome(small, plan, {**ready.facts, "limits": limits, "neurons": neurons})

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
        found = [(host.read(block), own) for block, own in zip(blocks, moments, strict=True)]
        inputs = [inputs_of(*one) if self.activation_aware else {} for one in found]
        orders = [
            output_error(*one, self.ridge, block.gains())
            for one, block in zip(found, blocks, strict=True)
        ]
        allocate = self._alike(task.shape)
        if self.attention is None:
            spectra = low.spectra(task.model, inputs)
            for i, (tensors, own) in enumerate(found):
                energies = self._energies(tensors, own.hidden, orders[i], blocks[i].gains()[1])
                spectra.append(_neurons(task.shape, i, energies))

            def allocate(metric: str, limit: int) -> ViTShape:
                choice = within_budget(task.shape, spectra, metric, limit)
                return with_ranks(task.shape, spectra, choice)

        def milliseconds(shapes: list[ViTShape]) -> list[float]:
            return task.stopwatch([hollow(task.model, shape) for shape in shapes])

        target = within(task.budget, task.shape, allocate, milliseconds)
        plan = plan_for(task.shape, target, orders)
        weights, errors = low.decompose(task.model, plan, inputs, task.seed)
        nearest = written(task.model, task.shape, weights)
        return Prepared(nearest, plan, {"errors": errors, "dense": low.left_dense(plan)})

    def _energies(
        self, tensors: Tensors, hidden: Moments, order: Order, gain: Tensor | None
    ) -> Tensor:
        """What each hidden unit adds to the energy of the MLP's output, best first."""
        written = tensors["fc2.weight"].double()
        if gain is not None:
            written = written * gain.double().unsqueeze(1)
        # A bias takes up the mean, if there is one and compensation may use it.
        centred = self.compensation and "fc2.bias" in tensors
        second = hidden.covariance if centred else hidden.second / hidden.count
        return explained(written, second, order.neurons, self.ridge if self.compensation else None)

    def _alike(self, shape: ViTShape) -> Callable[[str, int], ViTShape]:
        """Attention at the given share in all blocks; hidden units, alike too, meet the budget."""
        share, steps = self.attention or 1.0, Steps.for_shape(shape)
        if self.form == "factors":
            flat = flat_spectra(shape, ATTENTION)
            low = with_ranks(shape, flat, at_share(flat, share))
        else:
            dims: tuple[Dimension, ...] = ("v",) if shape.qk_norm else ("qk", "v")
            sizes = [{FIELDS[d]: rounded(b, d, share, steps) for d in dims} for b in shape.blocks]
            pairs = zip(shape.blocks, sizes, strict=True)
            low = shape.with_blocks(tuple(b.model_copy(update=own) for b, own in pairs))
        return lambda metric, limit: allocate_uniform(low, metric, limit, ("neurons",), steps)

    def _gates(self, task: Task, low: Outcome) -> tuple[VTP, Task]:
        """Learned gates on the hidden units of the model whose attention is at low rank."""
        assert self.training is not None  # checked before any work
        metric, shape = task.budget.metric, shape_of(low.model)
        shares = [
            n / block.mlp_dim for n, block in zip(low.facts["neurons"], shape.blocks, strict=True)
        ]
        vtp = VTP(
            placement="hidden",
            l1=self.l1,
            scope="global" if self.attention is None else "layer",
            floor=min(FLOOR, *shares),
            stage="prune",
            sparse_epochs=self.sparse_epochs,
            sparse_lr=self.sparse_lr,
            training=self.training,
        )
        budget = Budget(**{metric: low.facts["limits"][metric]})
        return vtp, replace(
            task, model=low.model, shape=shape, budget=budget, teacher=task.taught_by
        )


def _with_neurons(plan: Plan, neurons: Plan) -> Plan:
    """The plan with the hidden units that another keeps."""
    blocks = tuple(
        own.model_copy(update={"neurons": other.neurons})
        for own, other in zip(plan.blocks, neurons.blocks, strict=True)
    )
    return plan.model_copy(update={"blocks": blocks})


def _neurons(shape: ViTShape, index: int, energies: Tensor) -> Spectrum:
    """What each number of a block's hidden units keeps."""
    block = shape.blocks[index]
    fan_in = block.mlp_features or shape.embed_dim
    return Spectrum(index, "neurons", fan_in, shape.embed_dim, energies, units=block.mlp_dim)


def _flat_neurons(shape: ViTShape) -> list[Spectrum]:
    """The same where nothing is known."""
    return [_neurons(shape, i, torch.ones(b.mlp_dim)) for i, b in enumerate(shape.blocks)]
