"""Token merging alone, with the same number merged in every block (ToMe, arXiv 2210.09461).

Needs no images: nothing is measured and no weight changes.
"""

from __future__ import annotations

from typing import ClassVar

from ..allocate import allocate_uniform
from ..budget import Budget
from ..errors import UsageError
from ..plan import BlockPlan, Plan
from ..shape import Matching, ViTShape
from ..sizes import Steps
from ..surgery import apply
from .base import Method, Outcome, Task, keeps_all, with_matching, within


class TokenMerge(Method):
    """Merge a constant number of tokens in every block.

    Args:
        matching: how tokens are paired, see `shape.Matching`; "cosine" as ToMe does.
    """

    name: ClassVar[str] = "token-merge"

    matching: Matching = "cosine"

    @property
    def needs_images(self) -> bool:
        return False

    def check(self, shape: ViTShape, budget: Budget) -> None:
        if budget.metric == "params":
            raise UsageError(
                "Merging tokens removes no parameters.", "Give a budget in MACs or latency."
            )
        if budget.metric == "macs":
            limit, steps = budget.limit(shape), Steps.for_shape(shape)
            allocate_uniform(with_matching(shape, self.matching), "macs", limit, ("tokens",), steps)

    def plan(self, task: Task) -> Plan:
        if keeps_all(task.budget, task.shape):
            return Plan.identity(task.shape)
        dense = with_matching(task.shape, self.matching)
        steps = Steps.for_shape(dense)

        def plan_of(shape: ViTShape) -> Plan:
            if shape == dense:
                return Plan.identity(task.shape)
            counts = [
                b.num_tokens_out if b.num_tokens_out < b.num_tokens_in else None
                for b in shape.blocks
            ]
            blocks = tuple(BlockPlan(num_tokens_out=count) for count in counts)
            return Plan(blocks=blocks, matching=dense.matching)

        def milliseconds(shapes: list[ViTShape]) -> list[float]:
            return task.stopwatch([apply(task.model, plan_of(shape)) for shape in shapes])

        def allocate(metric: str, limit: int) -> ViTShape:
            return allocate_uniform(dense, metric, limit, ("tokens",), steps)

        return plan_of(within(task.budget, dense, allocate, milliseconds))

    def run(self, task: Task) -> Outcome:
        plan = self.plan(task)
        return Outcome(apply(task.model, plan), plan)
