"""`apply(model, plan)`: a new, physically smaller model. The input model is never touched.

One table says which axis of which tensor each dimension slices; everything else follows from it.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from .hosts import Tensors, host_of
from .plan import BlockPlan, Plan
from .provenance import provenance_of
from .shape import DENSE, ViTShape, revise

#: For each canonical tensor (`hosts`), the dimension that each of its axes counts.
AXES: dict[str, tuple[str | None, ...]] = {
    "q.weight": ("heads", "qk_dims", "attn_features"),
    "q.bias": ("heads", "qk_dims"),
    "k.weight": ("heads", "qk_dims", "attn_features"),
    "k.bias": ("heads", "qk_dims"),
    "v.weight": ("heads", "v_dims", "attn_features"),
    "v.bias": ("heads", "v_dims"),
    "out.weight": (None, "heads", "v_dims"),
    "out.bias": (None,),
    "fc1.weight": ("neurons", "mlp_features"),
    "fc1.bias": ("neurons",),
    "fc2.weight": (None, "neurons"),
    "fc2.bias": (None,),
    "attn_features": ("attn_features",),
    "mlp_features": ("mlp_features",),
}


@torch.no_grad()
def apply(model: nn.Module, plan: Plan) -> nn.Module:
    """Select what the plan keeps and build the smaller model, on the same device and dtype.

    Args:
        model: any supported model; left exactly as it is.
        plan: what to keep, relative to `model`.

    Returns:
        A model of the host's class. Blocks the plan does not touch keep the host's own modules.

    Raises:
        PlanError: when the plan does not fit the model.
        UnsupportedModelError: when the model cannot be accounted for.
    """
    host = host_of(model)
    shape = host.describe(model)
    after = plan.result(shape)
    small = copy.deepcopy(model)
    host.resize(small, after)
    for i, block in enumerate(plan.blocks):
        if block.touches_attention or block.touches_mlp:
            tensors = host.read(host.block(model, i))
            for name, kept in (
                ("attn_features", block.attn_features),
                ("mlp_features", block.mlp_features),
            ):
                if kept is not None and name not in tensors:
                    tensors[name] = torch.arange(shape.embed_dim)
            new = host.block(small, i)
            host.write(new, select(tensors, block), after.blocks[i].ranks)
    if plan.match_features is not None and after.merges_tokens:
        for i, features in enumerate(plan.match_features):
            found = host.block(small, i).match_features
            if found is not None:
                found.copy_(torch.tensor(features))
    if plan.token_weights is not None and after.merges_tokens:
        for i, weights in enumerate(plan.token_weights):
            own = host.block(small, i).token_weights
            if own is not None:
                own.copy_(torch.tensor(weights))
    return small


def merge_back(model: nn.Module) -> nn.Module:
    """The same function with every low-rank factorisation multiplied out to a dense layer.

    A record that the model carries is that of the compression; its shape and what it tells of the result's cost are the
    new model's.
    """
    host = host_of(model)
    shape = host.describe(model)
    whole = shape.with_blocks(tuple(b.model_copy(update={"ranks": DENSE}) for b in shape.blocks))
    weights = [
        host.read(host.block(model, i)) if b.ranks != DENSE else {}
        for i, b in enumerate(shape.blocks)
    ]
    dense = written(model, whole, weights)
    known = provenance_of(model)
    if known is not None:
        costs = {
            name: {**known.record[name], "after": getattr(whole, name)}
            for name in ("macs", "params")
            if name in known.record
        }
        # Times are those of other layers.
        record = {k: v for k, v in known.record.items() if not k.startswith("latency")} | costs
        cast(Any, dense).vitailor = revise(known, shape=whole, record=record)
    return dense


@torch.no_grad()
def written(model: nn.Module, shape: ViTShape, weights: Sequence[Tensors]) -> nn.Module:
    """A copy of a model at other sizes, with new canonical weights for the blocks that have any; the others are as they
    were, and must be so in `shape`."""
    host, new = host_of(model), copy.deepcopy(model)
    host.resize(new, shape)
    for i, tensors in enumerate(weights):
        if tensors:
            host.write(host.block(new, i), tensors, shape.blocks[i].ranks)
    return new


@torch.no_grad()
def hollow(model: nn.Module, shape: ViTShape) -> nn.Module:
    """A copy of a model at other sizes whose weights are all zero: as fast as a real one."""
    new = written(model, shape, ())
    for parameter in new.parameters():
        parameter.zero_()
    return new


def select(tensors: Tensors, plan: BlockPlan) -> Tensors:
    """The kept part of a block's canonical tensors."""
    return {name: _select(tensor, AXES[name], plan) for name, tensor in tensors.items()}


def _select(tensor: Tensor, axes: tuple[str | None, ...], plan: BlockPlan) -> Tensor:
    for axis, name in enumerate(axes):
        kept = None if name is None else getattr(plan, name)
        if kept is None:
            continue
        index = torch.tensor(kept, device=tensor.device)
        if index.dim() == 1:
            tensor = tensor.index_select(axis, index)
        else:  # one row of dims for each head; heads are the axis before and already selected
            index = index.reshape(index.shape + (1,) * (tensor.dim() - axis - 1))
            index = index.expand(tensor.shape[:axis] + index.shape[1:2] + tensor.shape[axis + 1 :])
            tensor = tensor.gather(axis, index)
    return tensor
