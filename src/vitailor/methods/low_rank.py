"""Low rank: projections decomposed at the ranks a budget allows.

The second stage of "Vision Transformer Pruning via Matrix Decomposition" (arXiv 2308.10839), for dense models
and for models that VTP has pruned:

1. A sweep of unlabeled images collects the second moments of what each projection reads.
2. Ranks are shared out so that in sum the projections lose the least shares of their outputs' energies, all
   projections counting alike; a projection that would save nothing stays dense.
3. Each projection is decomposed: SVD, four versions of QR or two of LU, of the weights alone or of the
   weights as real inputs see them. Its bias takes up what is lost of the mean.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import nn

from ..budget import Budget
from ..calibrate import BlockMoments, dense_sweep
from ..decompose import Decomposition, energies
from ..errors import DataError, UsageError
from ..factors import (
    Inputs,
    bias_of,
    factored,
    gain_of,
    lost,
    read_by_mlp,
    scaled,
    second_of,
    weight_of,
)
from ..hosts import Tensors, host_of
from ..plan import BlockPlan, Plan
from ..ranks import Spectrum, at_energy, at_share, with_ranks, within_budget
from ..shape import DENSE, ViTShape
from ..surgery import hollow, written
from .base import Method, Outcome, Task, keeps_all, within

Projection = Literal["q", "k", "v", "out", "fc1", "fc2"]
ALL: tuple[Projection, ...] = ("q", "k", "v", "out", "fc1", "fc2")


class LowRank(Method):
    """Replace projections by two thinner ones.

    Args:
        decomposition: see `decompose`.
        activation_aware: decompose the weights as the second moments of real inputs weigh them, and let
            biases take up what is lost of the mean; without, the weights alone are looked at and no image
            is needed.
        projections: which are decomposed.
        share: the same share of the full rank for all, instead of sharing a budget out.
        energy: the least rank that keeps this share of the energy, instead.
        step: ranks that are shared out are multiples of it.

    With `share` or `energy` the budget, in MACs or parameters, is only checked. The energies are those that SVD keeps,
    whatever the decomposition. A projection that two thinner ones would not make smaller stays as it is, and so does
    one at which a budget is better not saved; the record's "dense" names these, block by block.

    Queries, keys and values of a block are three layers as soon as one of them is factored: a first factor for all three
    together was measured, and is no faster on a CPU.

    Rows of what is written to the residual stream count as layer scale weighs them, where there is any. For
    "qr-importance" the scores are measured: each input's share in the output.

    Attention can be had at low rank without a second multiplication: W_q W_k^T and W_v W_o of each head are
    products already, and at a lower rank the head is smaller. `ClosedForm(dimensions=("qk", "v"))` does
    that, and `Hybrid` together with hidden units.
    """

    name: ClassVar[str] = "low-rank"

    decomposition: Decomposition = "svd"
    activation_aware: bool = True
    projections: Annotated[tuple[Projection, ...], Field(min_length=1)] = ALL
    share: Annotated[float, Field(gt=0, le=1)] | None = None
    energy: Annotated[float, Field(gt=0, le=1)] | None = None
    step: Annotated[int, Field(ge=1)] = 1

    @property
    def needs_images(self) -> bool:
        return self.activation_aware

    def check(self, shape: ViTShape, budget: Budget) -> None:
        if self.share is not None and self.energy is not None:
            raise UsageError("Both share and energy are given.", "Give one of them, or none.")
        fixed = "share" if self.share is not None else "energy"
        if not self._shares_out and budget.metric not in ("macs", "params"):
            raise UsageError(
                f"{fixed} fixes the sizes, so that a latency cannot be met.",
                f"Leave {fixed} out, or give a budget in MACs or parameters.",
            )
        if any(block.ranks != DENSE for block in shape.blocks):
            raise UsageError(
                "The model has low-rank projections already.",
                "Multiply them out first (vitailor.merge_back).",
            )
        if (
            self._shares_out
            and budget.metric in ("macs", "params")
            and not keeps_all(budget, shape)
        ):
            flat = flat_spectra(shape, self.projections)
            within_budget(shape, flat, budget.metric, budget.limit(shape), self.step)

    def plan(self, task: Task) -> Plan:
        if self._leaves(task):
            return Plan.identity(task.shape)
        return self._plan(task, self.inputs(task))

    def run(self, task: Task) -> Outcome:
        if self._leaves(task):
            return Outcome(copy.deepcopy(task.model), Plan.identity(task.shape))
        task.progress(0, 3)
        inputs = self.inputs(task)
        task.progress(1, 3)
        plan = self._plan(task, inputs)
        task.progress(2, 3)
        weights, errors = self.decompose(task.model, plan, inputs, task.seed)
        task.progress(3, 3)
        small = written(task.model, plan.result(task.shape), weights)
        return Outcome(small, plan, {"errors": errors, "dense": self.left_dense(plan)})

    def _leaves(self, task: Task) -> bool:
        """Whether there is nothing to do."""
        return self._shares_out and keeps_all(task.budget, task.shape)

    @property
    def _shares_out(self) -> bool:
        return self.share is None and self.energy is None

    # -- step 1 ----------------------------------------------------------------------------------

    def inputs(self, task: Task) -> list[Inputs]:
        """Moments of what each projection of each block reads; empty for the plain form."""
        if not self.activation_aware:
            return [{} for _ in task.shape.blocks]
        found = dense_sweep(task.model, task.batches(), attention_input=True)
        host = host_of(task.model)
        return [
            inputs_of(host.read(host.block(task.model, i)), moments)
            for i, moments in enumerate(found)
        ]

    # -- step 2 ----------------------------------------------------------------------------------

    def _plan(self, task: Task, inputs: list[Inputs]) -> Plan:
        spectra = self.spectra(task.model, inputs)

        def choose(metric: str, limit: int) -> ViTShape:
            choice = within_budget(task.shape, spectra, metric, limit, self.step)
            return with_ranks(task.shape, spectra, choice)

        def milliseconds(shapes: list[ViTShape]) -> list[float]:
            return task.stopwatch([hollow(task.model, shape) for shape in shapes])

        if self.share is not None:
            return _plan_of(with_ranks(task.shape, spectra, at_share(spectra, self.share)))
        if self.energy is not None:
            return _plan_of(with_ranks(task.shape, spectra, at_energy(spectra, self.energy)))
        return _plan_of(within(task.budget, task.shape, choose, milliseconds))

    def spectra(self, model: nn.Module, inputs: list[Inputs]) -> list[Spectrum]:
        """What each rank of each projection keeps."""
        host, found = host_of(model), []
        for i, known in enumerate(inputs):
            tensors = host.read(host.block(model, i))
            for name in self.projections:
                weight = weight_of(tensors, name).double()
                weight = scaled(weight, gain_of(host.block(model, i), name))
                moments = second_of(known.get(name), bias_of(tensors, name) is not None)
                out, width = weight.shape
                found.append(Spectrum(i, name, width, out, energies(weight, moments)))
        return found

    # -- step 3 ----------------------------------------------------------------------------------

    @torch.no_grad()
    def decompose(
        self, model: nn.Module, plan: Plan, inputs: list[Inputs], seed: int
    ) -> tuple[list[Tensors], list[dict[str, float]]]:
        """Factors of the planned ranks.

        Returns:
            For each block its canonical tensors with the nearest weights of these ranks and their factors, nothing where
            none is planned; and what each loses, as a share of the outputs' root mean square (plain form: of the
            weights' norm).
        """
        host, weights, told = host_of(model), [], []
        for i, (block_plan, known) in enumerate(zip(plan.blocks, inputs, strict=True)):
            block = host.block(model, i)
            tensors, errors = host.read(block), {}
            for name, rank in block_plan.ranks:
                if rank is None:
                    continue
                read, gain = known.get(name), gain_of(block, name)
                new = factored(
                    tensors, name, rank, self.decomposition, inputs=read, gain=gain, seed=seed
                )
                errors[name] = lost(tensors, new, name, read, gain)
                tensors |= new
            weights.append(tensors if errors else {})
            told.append(errors)
        return weights, told

    def left_dense(self, plan: Plan) -> list[list[str]]:
        """The projections of each block that a plan leaves as they are."""
        return [
            [name for name, rank in block.ranks if rank is None and name in self.projections]
            for block in plan.blocks
        ]


def inputs_of(tensors: Tensors, moments: BlockMoments) -> Inputs:
    """Moments of what each projection of a block reads."""
    if moments.attn_input is None:
        raise DataError("Nothing is known of what attention reads.", "Sweep with attention_input.")
    attention = dict.fromkeys("qkv", moments.attn_input)
    mlp = {"fc1": read_by_mlp(tensors, moments.mlp_input), "fc2": moments.hidden}
    return attention | {"out": moments.mixed} | mlp


def _plan_of(shape: ViTShape) -> Plan:
    return Plan(blocks=tuple(BlockPlan(ranks=block.ranks) for block in shape.blocks))


def flat_spectra(shape: ViTShape, projections: Sequence[Projection]) -> list[Spectrum]:
    """Spectra of which nothing is known but their sizes."""
    return [
        Spectrum(i, name, fan_in, fan_out, torch.ones(min(fan_in, fan_out)))
        for i, sizes in enumerate(shape.linears())
        for name, (fan_in, fan_out) in sizes.items()
        if name in projections
    ]
