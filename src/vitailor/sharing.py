"""Weight sharing: one model trained so that it works at many sizes.

After "Multi-Dimensional Model Compression of Vision Transformer" (arXiv 2201.00043): min_W E [loss at the sizes
of a policy], over policies that meet the budget. Weights are shared by all sizes: a size takes part with the first
units of its block's order, the others count as zero. Candidates of a search can then be judged by weights that
are used to being cut.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from typing import cast

from torch import Tensor, nn

from .criteria import Order
from .hosts import host_of
from .layers import Block
from .orders import plan_for
from .shape import ViTShape, revise
from .sizes import with_size
from .surgery import apply

#: Projections that read what is masked: heads' outputs and hidden units.
MASKED = ("attn.proj", "mlp.fc2")


class Masked(nn.Module):
    """A projection some of whose inputs count as zero, by the buffer `mask` (in,) of zeros and ones."""

    mask: Tensor

    def __init__(self, projection: nn.Module, size: int) -> None:
        super().__init__()
        self.projection = projection
        like = next(projection.parameters())
        self.register_buffer("mask", like.new_ones(size), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.projection(x * self.mask))


def share(
    model: nn.Module, rule: ViTShape, orders: Sequence[Order], places: Collection[int] = ()
) -> nn.Module:
    """A copy of the model that `resize` gives any sizes.

    Args:
        model: any supported model; left as it is.
        rule: its shape, with the rule by which tokens go.
        orders: of the units of each block.
        places: blocks, counted from 0, after whose attention tokens may go.
    """
    dense = host_of(model).describe(model)
    # One token fewer at each place, so that every part that `resize` then sets is there.
    fewer = rule
    for i in sorted(places):
        fewer = with_size(fewer, i, "tokens", fewer.blocks[i].num_tokens_in - 1)
    fields = ("num_tokens_in", "num_tokens_out", "fuses")
    blocks = tuple(
        own.model_copy(update={name: getattr(other, name) for name in fields})
        for own, other in zip(dense.blocks, fewer.blocks, strict=True)
    )
    names = ("matching", "match_features", "weighs_tokens")
    target = revise(dense, blocks=blocks, **{name: getattr(rule, name) for name in names})
    shared = apply(model, plan_for(dense, target, orders))
    for i in range(dense.depth):
        block = host_of(model).block(shared, i)
        for name in MASKED:
            parent, _, leaf = name.rpartition(".")
            projection = block.get_submodule(name)
            size = orders[i].v_dims.numel() if name == "attn.proj" else len(orders[i].neurons)
            setattr(block.get_submodule(parent), leaf, Masked(projection, size))
    return shared


def resize(shared: nn.Module, shape: ViTShape, orders: Sequence[Order]) -> None:
    """Let a shared model compute what it would at these sizes of heads, hidden units and tokens, in place.

    Where tokens go by attention, the heads that are masked still have their say in which.
    """
    host = host_of(shared)
    for i, (want, order) in enumerate(zip(shape.blocks, orders, strict=True)):
        block = host.block(shared, i)
        heads = _masked(block, "attn.proj").view(order.v_dims.shape)
        heads.zero_()[order.heads[: want.num_heads]] = 1
        _masked(block, "mlp.fc2").zero_()[order.neurons[: want.mlp_dim]] = 1
        block.num_tokens_in, block.num_tokens_out = want.num_tokens_in, want.num_tokens_out
        block.fuses = want.fuses


def unshare(shared: nn.Module, model: nn.Module) -> nn.Module:
    """A copy of the model that was shared, with the weights as they are now."""
    weights = {
        name.replace(f".{leaf}.projection.", f".{leaf}."): value
        for name, value in shared.state_dict().items()
        for leaf in ("fc2" if ".fc2." in name else "proj",)
    }
    plain = copy.deepcopy(model)
    known = plain.state_dict()  # without what only merging in training needed
    plain.load_state_dict({name: weights[name] for name in known})
    return plain


def _masked(block: Block, name: str) -> Tensor:
    return cast(Masked, block.get_submodule(name)).mask
