"""Policies as weights on measured harms: what a search proposes is how much each kind of cut is to count.

Where `policy.Space` has ratios, here each proposal bends the harm model and leaves the rest to
`allocate.allocate_marginal`, which finds the sizes of least bent harm, block by block, exactly on the budget. The
middle of the cube is the model as it was measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import exp

from .allocate import allocate_marginal
from .harm import HarmModel, Tilt
from .policy import CUT
from .shape import ViTShape
from .sizes import Dimension, Steps

#: The value that leaves a harm as it was measured.
NEUTRAL = 0.5
#: How far weights, slopes over depth, and the exponent of every curve go from neutral, the first two as logarithms.
WEIGHT, SLOPE, POWER = 1.5, 2.0, 0.6


@dataclass(frozen=True)
class HarmSpace:
    """The allocations that bent harm models lead to.

    Attributes:
        harm: as measured, of each cut alone.
        dimensions: which may be cut.
        steps: sizes are multiples of these.
    """

    harm: HarmModel
    dimensions: Sequence[Dimension]
    steps: Steps

    @property
    def names(self) -> tuple[str, ...]:
        """The free numbers: a weight of each dimension, slopes over depth, and the exponent."""
        weights = [d for d in CUT if d in self.dimensions]
        slopes = ["tokens by depth"] if "tokens" in weights else []
        slopes += ["widths by depth"] if set(weights) - {"tokens"} else []
        return (*weights, *slopes, "exponent")

    @property
    def first(self) -> tuple[float, ...]:
        """The direction that bends nothing."""
        return (NEUTRAL,) * len(self.names)

    def on_budget(self, direction: Mapping[str, float], metric: str, limit: int) -> ViTShape:
        """The sizes that a direction, values from 0 to 1 by name, leads to within a budget.

        Raises:
            BudgetError: when the smallest sizes still cost too much.
        """

        def bend(name: str, far: float) -> float:
            return far * (2 * direction.get(name, NEUTRAL) - 1)

        tilt = Tilt(
            token_slope=bend("tokens by depth", SLOPE),
            width_slope=bend("widths by depth", SLOPE),
            power=1 + bend("exponent", POWER),
        )
        weights = {d: exp(bend(d, WEIGHT)) for d in self.dimensions}
        bent = self.harm.weighted(weights).tilted(tilt)
        return allocate_marginal(bent, metric, limit, self.dimensions, self.steps)
