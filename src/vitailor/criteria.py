"""Which units of each block to keep first. Every criterion gives an order, best first, for every dimension.

output_error  what the block's output loses after optimal compensation; needs moments
magnitude     norms of the weights that write and read a unit; needs nothing
variance      how much a unit's activation varies; needs moments
taylor        |activation x gradient| of the loss, first order; needs gradients

Higher means keep. Orders are nested: the kept set at a smaller size is a prefix of that at a larger one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from .calibrate import BlockMoments, Moments
from .hosts import Tensors
from .linalg import add_ridge, cholesky_psd

Criterion = Literal["output_error", "magnitude", "variance", "taylor"]


@dataclass(frozen=True)
class Order:
    """Units of one block, best first.

    Attributes:
        heads: (H,). qk_dims: (H, K) and v_dims: (H, V), for each head. neurons: (F,).
        attn_features, mlp_features: (D',) features that qkv and fc1 read; None where not ordered.
        match_features: (D,) features of what the MLP reads, those that tell tokens apart best first;
            None where unknown.
        token_weights: (N,) of the places of the model's tokens, where attention alone is not to choose.
    """

    heads: Tensor
    qk_dims: Tensor
    v_dims: Tensor
    neurons: Tensor
    attn_features: Tensor | None = None
    mlp_features: Tensor | None = None
    match_features: Tensor | None = None
    token_weights: Tensor | None = None


@dataclass(frozen=True)
class Importance:
    """Scores of the units of one block, higher means keep; shapes as in `Order`, heads by their sum."""

    qk_dims: Tensor
    v_dims: Tensor
    neurons: Tensor
    attn_features: Tensor | None = None
    mlp_features: Tensor | None = None

    def order(self) -> Order:
        return Order(
            heads=self.v_dims.sum(1).argsort(descending=True, stable=True),
            qk_dims=self.qk_dims.argsort(dim=1, descending=True, stable=True),
            v_dims=self.v_dims.argsort(dim=1, descending=True, stable=True),
            neurons=self.neurons.argsort(descending=True, stable=True),
            attn_features=_descending(self.attn_features),
            mlp_features=_descending(self.mlp_features),
        )


def _descending(scores: Tensor | None) -> Tensor | None:
    return None if scores is None else scores.argsort(descending=True, stable=True)


def with_match_features(order: Order, moments: BlockMoments) -> Order:
    """The order with the features by which tokens are best compared: those that vary most."""
    varies = moments.mlp_input.covariance.diagonal()
    return replace(order, match_features=varies.argsort(descending=True, stable=True))


def magnitude(tensors: Tensors) -> Importance:
    """Product of the norms of the weights that write a unit and of those that read it; of input features,
    which every block writes, the norm of the weights that read them."""
    norm = {name: tensors[name].double() for name in tensors if name.endswith("weight")}
    readers = torch.cat([norm[f"{name}.weight"].flatten(0, 1) for name in "qkv"])
    return Importance(
        qk_dims=norm["q.weight"].norm(dim=2) * norm["k.weight"].norm(dim=2),
        v_dims=norm["v.weight"].norm(dim=2) * norm["out.weight"].norm(dim=0),
        neurons=norm["fc1.weight"].norm(dim=1) * norm["fc2.weight"].norm(dim=0),
        attn_features=readers.norm(dim=0),
        mlp_features=norm["fc1.weight"].norm(dim=0),
    )


def variance(moments: BlockMoments) -> Importance:
    """Variance of a unit's activation (Variance-Based Pruning, arXiv 2507.12988, for neurons).

    A query/key dim's score is the mean square of its contribution to the logits.
    """
    heads = moments.query.shape[0]
    query, key = (m.diagonal(dim1=1, dim2=2) for m in (moments.query, moments.key))
    return Importance(
        qk_dims=query * key,
        v_dims=moments.mixed.covariance.diagonal().unflatten(0, (heads, -1)),
        neurons=moments.hidden.covariance.diagonal(),
    )


def output_error(
    tensors: Tensors,
    moments: BlockMoments,
    ridge: float,
    gains: tuple[Tensor | None, Tensor | None] = (None, None),
) -> Order:
    """Order by the error of the block's output after optimal linear compensation.

    `gains` are the layer scales on the two halves' outputs, if there are any: an error there counts as
    much as it reaches the residual stream.

    QK and V dims are expected in sorted bases (`bases.rotate`). Heads and neurons are removed backwards
    one after the other (`eliminate`).
    """
    heads, qk, _ = tensors["q.weight"].shape
    v = tensors["v.weight"].shape[1]
    out, fc2 = tensors["out.weight"].double().flatten(1), tensors["fc2.weight"].double()
    out = out if gains[0] is None else out * gains[0].double().unsqueeze(1)
    fc2 = fc2 if gains[1] is None else fc2 * gains[1].double().unsqueeze(1)
    gone_heads = eliminate(out, moments.mixed, ridge, group=v)
    gone_neurons = eliminate(fc2, moments.hidden, ridge)
    device = out.device
    return Order(
        heads=gone_heads.flip(0),
        qk_dims=torch.arange(qk, device=device).expand(heads, -1),
        v_dims=torch.arange(v, device=device).expand(heads, -1),
        neurons=gone_neurons.flip(0),
    )


def eliminate(
    weight: Tensor, moments: Moments, ridge: float, *, group: int = 1, steps: int = 256
) -> Tensor:
    """Backward elimination of the inputs of a linear map by output error after compensation.

    Removing the set S from y = W x and regressing it on what is kept costs
    tr(W_S (P_SS)^-1 W_S^T), with P the inverse covariance of the inputs still there; then
    W <- W - W_S (P_SS)^-1 P_S and P <- P - P_:S (P_SS)^-1 P_S: (the optimal brain surgeon's update,
    Hassibi & Stork 1992). The cheapest units go first, several at a time on wide layers.

    Args:
        weight: (m, n) float64. moments: of the inputs (n).
        ridge: added to the covariance, as a fraction of its mean diagonal.
        group: consecutive inputs that are removed together (the dims of a head).
        steps: about how many rounds to take; each removes n / group / steps units.

    Returns:
        (n / group,) units in the order of removal.
    """
    units = weight.shape[1] // group
    weight = weight.clone()
    inverse = torch.linalg.inv(add_ridge(moments.covariance, ridge))
    alive = torch.ones(units, dtype=torch.bool, device=weight.device)
    removed: list[Tensor] = []
    at_once = max(1, units // steps)
    while bool(alive.any()):
        cost = _removal_costs(weight, inverse, group)
        cost[~alive] = torch.inf
        count = min(at_once, int(alive.sum()))
        chosen = cost.topk(count, largest=False).indices
        removed.append(chosen)
        alive[chosen] = False
        index = (chosen.unsqueeze(1) * group + torch.arange(group, device=weight.device)).flatten()
        gain = torch.linalg.solve(inverse[index][:, index], inverse[index])
        weight = weight - weight[:, index] @ gain
        inverse = inverse - inverse[:, index] @ gain
        # What is gone no longer takes part; a unit diagonal keeps its blocks invertible.
        weight[:, index] = 0
        inverse[index] = 0
        inverse[:, index] = 0
        inverse[index, index] = 1
    return torch.cat(removed)


def explained(weight: Tensor, moments: Tensor, order: Tensor, ridge: float | None) -> Tensor:
    """What each input of a linear map adds to the outputs' energy, given those before it in an order; what
    keeping the first r loses of E |W x|^2 is the sum beyond r.

    With compensation: for C = L L^T in this order and x = L z, the first r inputs know the first r of the
    uncorrelated z and nothing of the others, so regression on them leaves the sum of |(W L)_j|^2 over
    j > r. Without: the others are missed as they are, sum of W_i . W_j C_ij over i, j > r.

    Args:
        weight: (m, n) float64. moments: (n, n) of the inputs. order: (n,) best first.
        ridge: of the regression, as a fraction of the mean diagonal; None for no compensation.

    Returns:
        (n,) energies in that order; without compensation single ones may be negative.
    """
    ordered, seen = weight[:, order], moments[order][:, order]
    if ridge is not None:
        return (ordered @ cholesky_psd(seen, ridge)).square().sum(0)
    shared = ordered.mT @ ordered * seen
    return 2 * shared.triu(1).sum(1) + shared.diagonal()


def _removal_costs(weight: Tensor, inverse: Tensor, group: int) -> Tensor:
    if group == 1:
        return weight.square().sum(0) / inverse.diagonal()
    columns = weight.unflatten(1, (-1, group)).transpose(0, 1)
    blocks = inverse.unflatten(0, (-1, group)).unflatten(2, (-1, group))
    own = torch.stack([blocks[u, :, u] for u in range(blocks.shape[0])])
    return torch.einsum("umg,ugk,umk->u", columns, torch.linalg.inv(own), columns)
