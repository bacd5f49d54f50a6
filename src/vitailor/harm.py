"""How much each cut harms the outputs: curves measured on a few calibration images, one cut at a time.

The harm of a plan is modelled as a sum. Cutting a dimension of a block costs what it costs alone. Merging
from n to m tokens in block l costs g_l(m) - g_l(n), where g_l(m) is the harm of going down to m tokens
at block l in the dense model: what earlier blocks merged already need not be lost again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import PchipInterpolator

from .shape import ViTShape
from .simulate import Simulator
from .sizes import FIELDS, Dimension, Steps, grid, with_size

Curve = Callable[[NDArray[np.float64]], NDArray[np.float64]]
Progress = Callable[[float], None]

#: Fractions kept at which a curve is measured; tokens, which matter most, at more points.
POINTS: dict[Dimension, tuple[float, ...]] = {
    "tokens": (0.85, 0.6, 0.35, 0.15),
    "qk": (0.75, 0.5, 0.25),
    "v": (0.75, 0.5),
    "neurons": (0.75, 0.5),
    "heads": (0.5,),
}

#: A curve is scaled by at most this factor at a time, and not at all where it tells of less harm (nats).
MOST = 3.0
NEGLIGIBLE = 1e-4


@dataclass(frozen=True)
class HarmModel:
    """Harm of each size of each dimension of each block, alone; 0 at the dense size."""

    dense: ViTShape
    curves: dict[tuple[int, Dimension], Curve]

    def table(self, index: int, dimension: Dimension, sizes: NDArray[np.int64]) -> NDArray[np.float64]:
        """Harm at each of the sizes."""
        curve = self.curves.get((index, dimension))
        return np.zeros(len(sizes)) if curve is None else curve(sizes.astype(float))


def measure(
    simulator: Simulator,
    dimensions: tuple[Dimension, ...],
    steps: Steps,
    progress: Progress | None = None,
) -> HarmModel:
    """Measure the curves of all blocks and dimensions, in the dense model."""
    dense = simulator.dense
    todo = [(i, d) for i in range(dense.depth) for d in dimensions]
    curves: dict[tuple[int, Dimension], Curve] = {}
    for done, (i, dimension) in enumerate(todo):
        sizes = _measured_sizes(dense, i, dimension, steps)
        harms = [simulator.trial(with_size(dense, i, dimension, s), i).harm for s in sizes]
        full: int = getattr(dense.blocks[i], FIELDS[dimension])
        if sizes:
            curves[i, dimension] = _interpolate(full, sizes, harms)
        if progress is not None:
            progress((done + 1) / len(todo))
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
        gone = full - size
        inside = spline(np.minimum(gone, removed[-1]))
        beyond = np.maximum(gone - removed[-1], 0.0) * slope
        return np.asarray((inside + beyond) ** 2)

    return curve


def in_context(
    harm: HarmModel, simulator: Simulator, shape: ViTShape, dimensions: tuple[Dimension, ...]
) -> HarmModel:
    """The curves, each scaled so that undoing its cut in `shape` undoes the harm it really does there.

    Cuts interact: together they harm more, or less, than the sum of what each does alone. So the model
    is corrected where it is used. For each cut of `shape`, the harm with that cut alone undone is
    measured; the curve is scaled by the ratio of measured to modelled difference, kept within a factor
    of `MOST` since small differences are noisy.
    """
    whole = simulator.trial(shape, 0)
    context = simulator.at(whole)
    curves = dict(harm.curves)
    for i in range(shape.depth):
        for dimension in dimensions:
            undone = _undo(shape, harm.dense, i, dimension)
            if undone is None or (i, dimension) not in curves:
                continue
            modelled = total(harm, shape) - total(harm, undone)
            measured = whole.harm - context.trial(undone, i).harm
            if modelled > NEGLIGIBLE:
                ratio = float(np.clip(measured / modelled, 1 / MOST, MOST))
                curves[i, dimension] = _scaled(curves[i, dimension], ratio)
    return HarmModel(harm.dense, curves)


def _undo(shape: ViTShape, dense: ViTShape, i: int, dimension: Dimension) -> ViTShape | None:
    """The shape without one of its cuts; later blocks keep their token counts."""
    block, full = shape.blocks[i], dense.blocks[i]
    if dimension != "tokens":
        size = getattr(full, FIELDS[dimension])
        return None if size == getattr(block, FIELDS[dimension]) else with_size(shape, i, dimension, size)
    if block.num_tokens_out == block.num_tokens_in:
        return None
    blocks = list(shape.blocks)
    blocks[i] = block.model_copy(update={"num_tokens_out": block.num_tokens_in})
    if i + 1 < len(blocks):
        blocks[i + 1] = blocks[i + 1].model_copy(update={"num_tokens_in": block.num_tokens_in})
    return shape.model_copy(update={"blocks": tuple(blocks)})


def _scaled(curve: Curve, ratio: float) -> Curve:
    return lambda sizes: curve(sizes) * ratio


def total(harm: HarmModel, shape: ViTShape) -> float:
    """Modelled harm of a shape."""
    result = 0.0
    for i, block in enumerate(shape.blocks):
        for dimension in ("qk", "v", "neurons", "heads"):
            size = np.array([getattr(block, FIELDS[dimension])])
            result += float(harm.table(i, dimension, size)[0])
        ends = np.array([block.num_tokens_in, block.num_tokens_out])
        before, after = harm.table(i, "tokens", ends)
        result += float(after - before)
    return result
