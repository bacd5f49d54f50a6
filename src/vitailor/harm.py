"""How much each cut harms the outputs: curves measured on a few calibration images, one cut at a time.

The harm of a plan is modelled as a sum. Cutting a dimension of a block costs what it costs alone. Merging
from n to m tokens in block l costs g_l(m) - g_l(n), where g_l(m) is the harm of going down to m tokens
at block l in the dense model: what earlier blocks merged already need not be lost again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import PchipInterpolator

from .shape import ViTShape
from .simulate import Simulator
from .sizes import FIELDS, Dimension, Steps, grid, with_size

Curve = Callable[[NDArray[np.float64]], NDArray[np.float64]]

#: Fractions kept at which a curve is measured; tokens, which matter most, at more points.
POINTS: dict[Dimension, tuple[float, ...]] = {
    "tokens": (0.85, 0.6, 0.35, 0.15),
    "qk": (0.75, 0.5, 0.25),
    "v": (0.75, 0.5),
    "neurons": (0.75, 0.5),
    "heads": (0.5,),
}


class Tilt(NamedTuple):
    """How cuts interact, in four numbers; all curves are bent alike, so few images suffice to find them.

    Attributes:
        tokens: log of the weight of token cuts against all others.
        token_slope, width_slope: log of the weight of cuts in the last block against the first.
        power: exponent on every curve.
    """

    tokens: float = 0.0
    token_slope: float = 0.0
    width_slope: float = 0.0
    power: float = 1.0


FLAT = Tilt()


@dataclass(frozen=True)
class HarmModel:
    """Harm of each size of each dimension of each block; 0 at the dense size.

    Attributes:
        dense: the model that is cut.
        curves: harm of each cut alone, as measured.
        tilt: correction for cuts made together.
        weights: what the harm of each dimension is multiplied by; 1 where it is not named.
    """

    dense: ViTShape
    curves: dict[tuple[int, Dimension], Curve]
    tilt: Tilt = FLAT
    weights: Mapping[Dimension, float] = field(default_factory=dict)

    def table(
        self, index: int, dimension: Dimension, sizes: NDArray[np.int64]
    ) -> NDArray[np.float64]:
        """Harm at each of the sizes."""
        curve = self.curves.get((index, dimension))
        if curve is None:
            return np.zeros(len(sizes))
        depth = index / max(1, self.dense.depth - 1) - 0.5
        weight = self.tilt.width_slope * depth
        if dimension == "tokens":
            weight = self.tilt.tokens + self.tilt.token_slope * depth
        weight += np.log(self.weights.get(dimension, 1.0))
        return np.asarray(np.exp(weight) * curve(sizes.astype(float)) ** self.tilt.power)

    def weighted(self, weights: Mapping[Dimension, float]) -> HarmModel:
        return replace(self, weights=weights)

    def tilted(self, tilt: Tilt) -> HarmModel:
        return replace(self, tilt=tilt)


def measure(simulator: Simulator, dimensions: tuple[Dimension, ...], steps: Steps) -> HarmModel:
    """Measure the curves of all blocks and dimensions, in the dense model."""
    dense = simulator.dense
    todo = [(i, d) for i in range(dense.depth) for d in dimensions]
    curves: dict[tuple[int, Dimension], Curve] = {}
    for i, dimension in todo:
        sizes = _measured_sizes(dense, i, dimension, steps)
        harms = [simulator.trial(with_size(dense, i, dimension, s), i).harm for s in sizes]
        full: int = getattr(dense.blocks[i], FIELDS[dimension])
        if sizes:
            curves[i, dimension] = _interpolate(full, sizes, harms)
    return HarmModel(dense, curves)


def _measured_sizes(dense: ViTShape, i: int, dimension: Dimension, steps: Steps) -> list[int]:
    """A few sizes of the grid, the smallest token count among them."""
    sizes = grid(dense, i, dimension, steps)
    full = sizes[-1]
    wanted = [min(sizes, key=lambda s: abs(s - share * full)) for share in POINTS[dimension]]
    if dimension in ("tokens", "heads"):
        wanted.append(sizes[0])
    return sorted({s for s in wanted if s < full}, reverse=True)


def _interpolate(full: int, sizes: list[int], harms: list[float]) -> Curve:
    """A rising curve through the measurements, by what was removed; harm grows about quadratically,
    so its root is interpolated. Beyond the last point it is extended along the last slope."""
    removed = np.array([0.0] + [float(full - s) for s in sizes])
    root = np.sqrt(np.maximum.accumulate(np.maximum([0.0, *harms], 0.0)))
    spline = PchipInterpolator(removed, root, extrapolate=False)
    slope = (root[-1] - root[-2]) / (removed[-1] - removed[-2])

    def curve(size: NDArray[np.float64]) -> NDArray[np.float64]:
        # More than the model has, as for tokens that it merges already, harms no less than none.
        gone = np.maximum(full - size, 0.0)
        inside = spline(np.minimum(gone, removed[-1]))
        beyond = np.maximum(gone - removed[-1], 0.0) * slope
        return np.asarray((inside + beyond) ** 2)

    return curve


#: Harms of single sizes, by block, dimension and size.
Known = dict[tuple[int, Dimension, int], float]


def total(harm: HarmModel, shape: ViTShape, known: Known | None = None) -> float:
    """Modelled harm of a shape.

    Args:
        known: remembers single harms for shapes that have most sizes in common.
    """
    known = {} if known is None else known

    def at(i: int, dimension: Dimension, size: int) -> float:
        key = (i, dimension, size)
        if key not in known:
            known[key] = float(harm.table(i, dimension, np.array([size]))[0])
        return known[key]

    result = 0.0
    for i, block in enumerate(shape.blocks):
        for dimension in ("qk", "v", "neurons", "heads"):
            result += at(i, dimension, getattr(block, FIELDS[dimension]))
        result += at(i, "tokens", block.num_tokens_out) - at(i, "tokens", block.num_tokens_in)
    return result
