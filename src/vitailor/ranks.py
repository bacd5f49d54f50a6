"""How much rank each projection gets: a fixed share, a share of the energy, or a budget over all of them.

A projection of n inputs and m outputs at rank r costs r (n + m) instead of n m, so ranks from n m / (n + m)
on save nothing: such a projection is left dense.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .budget import cost
from .errors import BudgetError
from .shape import ViTShape, revise


@dataclass(frozen=True)
class Spectrum:
    """What each rank of a projection keeps, or each number of hidden units of an MLP.

    Attributes:
        block, name: which projection: "q", "k", "v", "out", "fc1" or "fc2"; or "neurons".
        fan_in, fan_out: its size: a rank costs a row of one and a column of the other.
        energies: (full rank) energy of the outputs, or of the weights, along each direction, falling; for
            hidden units, what each adds to those before it.
        units: how many there are, of what is kept or not as it is; None for a projection, which is
            factored.
    """

    block: int
    name: str
    fan_in: int
    fan_out: int
    energies: Tensor
    units: int | None = None

    @property
    def size(self) -> int:
        """Weights at full rank."""
        if self.units is not None:
            return self.units * (self.fan_in + self.fan_out)
        return self.fan_in * self.fan_out

    @property
    def most(self) -> int:
        """The largest rank that saves something; 0 where none does."""
        return (self.size - 1) // (self.fan_in + self.fan_out)

    def lost(self) -> Tensor:
        """(full rank + 1) share of the energy that each rank from 0 on loses."""
        total = self.energies.sum()
        if total <= 0:
            return torch.zeros(len(self.energies) + 1, dtype=torch.float64)
        kept = torch.cat(
            [torch.zeros(1, dtype=torch.float64), self.energies.double().cpu().cumsum(0)]
        )
        return (1 - kept / total.double().cpu()).clamp_min(0)


#: Rank of each spectrum's projection; None leaves it dense.
Choice = list[int | None]


def at_share(spectra: Sequence[Spectrum], share: float) -> Choice:
    """The same share of the full rank for every projection."""
    return [_saving(s, max(1, round(share * len(s.energies)))) for s in spectra]


def at_energy(spectra: Sequence[Spectrum], energy: float) -> Choice:
    """The least rank that keeps this share of each projection's energy."""
    found = []
    for spectrum in spectra:
        enough = (spectrum.lost() <= 1 - energy + 1e-12).nonzero()
        found.append(_saving(spectrum, max(1, int(enough[0]))))
    return found


def within_budget(
    dense: ViTShape, spectra: Sequence[Spectrum], metric: str, limit: int, step: int = 1
) -> Choice:
    """Ranks that lose nearly the least in sum, as shares of each projection's energy, within a budget.

    Water-filling: at a price for each unit of cost every projection takes the rank at which the next
    direction is not worth its price, or stays dense; the price is bisected to the budget. Then what is
    left is spent, one step of rank at a time, where it gains most.

    Args:
        metric, limit: "macs" or "params", and how much is allowed.
        step: ranks are multiples of it.

    Raises:
        BudgetError: when even rank `step` everywhere costs too much.
    """
    tables = [_table(dense, spectrum, metric, step) for spectrum in spectra]

    def spend(price: float) -> list[int]:
        return [int((lost + price * costs).argmin()) for _, lost, costs in tables]

    def spent(picks: Sequence[int]) -> int:
        return base + sum(int(t[2][pick]) for t, pick in zip(tables, picks, strict=True))

    base = cost(dense, metric) - sum(int(costs[-1]) for _, _, costs in tables)
    least = spent([int(costs.argmin()) for _, _, costs in tables])
    if least > limit:
        raise BudgetError(
            f"{limit:,} {metric} are out of reach: at the lowest ranks the model has {least:,}.",
            "Ask for more, or factor more projections.",
        )
    low, high = 0.0, 1.0
    while spent(spend(high)) > limit:
        high *= 4
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (low, middle) if spent(spend(middle)) <= limit else (middle, high)
    picks = _filled_up(tables, spend(high), limit, spent)
    return [table[0][pick] for table, pick in zip(tables, picks, strict=True)]


def with_ranks(shape: ViTShape, spectra: Sequence[Spectrum], choice: Choice) -> ViTShape:
    """The shape with these ranks, and numbers of hidden units."""
    blocks = list(shape.blocks)
    for spectrum, rank in zip(spectra, choice, strict=True):
        block = blocks[spectrum.block]
        if spectrum.units is None:
            update: dict[str, object] = {"ranks": revise(block.ranks, **{spectrum.name: rank})}
        else:
            update = {"mlp_dim": spectrum.units if rank is None else rank}
        blocks[spectrum.block] = block.model_copy(update=update)
    return shape.with_blocks(tuple(blocks))


#: Ranks that a projection may take, the last None for dense; what each loses; what each costs.
Table = tuple[list[int | None], Tensor, Tensor]


def _table(dense: ViTShape, spectrum: Spectrum, metric: str, step: int) -> Table:
    ranks: list[int | None] = [*range(step, spectrum.most + 1, step), None]
    lost, block = spectrum.lost(), dense.blocks[spectrum.block]
    losses = [float(lost[rank]) if rank is not None else 0.0 for rank in ranks]
    tokens = (
        block.num_tokens_out if spectrum.name in ("fc1", "fc2", "neurons") else block.num_tokens_in
    )
    unit = tokens if metric == "macs" else 1
    each = spectrum.fan_in + spectrum.fan_out
    if spectrum.units is not None and metric == "params" and dense.mlp_bias:
        each += 1
    whole = spectrum.size if spectrum.units is None else spectrum.units * each
    costs = [unit * (rank * each if rank is not None else whole) for rank in ranks]
    return ranks, torch.tensor(losses, dtype=torch.float64), torch.tensor(costs)


def _filled_up(
    tables: Sequence[Table],
    picks: list[int],
    limit: int,
    spent: Callable[[Sequence[int]], int],
) -> list[int]:
    """More where it gains most for what it costs, until nothing that fits gains. Losses need not fall at every
    step: where one does not, a later one may."""
    left = limit - spent(picks)
    while True:
        best, gain = (0, 0), 0.0
        for i, (_, lost, costs) in enumerate(tables):
            pick = picks[i]
            extra = costs[pick + 1 :] - costs[pick]
            worth = (lost[pick] - lost[pick + 1 :]) / extra.clamp_min(1)
            worth[extra > left] = 0
            if len(worth) and float(worth.max()) > gain:
                best, gain = (i, pick + 1 + int(worth.argmax())), float(worth.max())
        if not gain:
            return picks
        i, pick = best
        left -= int(tables[i][2][pick] - tables[i][2][picks[i]])
        picks[i] = pick


def _saving(spectrum: Spectrum, rank: int) -> int | None:
    return rank if rank <= spectrum.most else None
