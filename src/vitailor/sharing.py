"""Weight sharing: one model trained so that it works at many sizes.

After "Multi-Dimensional Model Compression of Vision Transformer" (arXiv 2201.00043): min_W E [loss at the sizes
of a policy], over policies that meet the budget. Weights are shared by all sizes: a size takes part with the first
units of its block's order, the others count as zero. Candidates of a search can then be judged by weights that
are used to being cut.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import cast

from torch import Tensor, nn

from .criteria import Order
from .hosts import host_of
from .layers import Block
from .orders import plan_for
from .shape import ViTShape, revise
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


def share(model: nn.Module, example: ViTShape, orders: Sequence[Order]) -> nn.Module:
    """A copy of the model that `resize` gives any sizes; computes the same as long as no token goes.

    Args:
        model: any supported model; left as it is.
        example: sizes that it is to take; where tokens go, and by which rule, is as here.
        orders: of the units of each block.
    """
    dense = host_of(model).describe(model)
    fields = ("num_tokens_in", "num_tokens_out", "fuses")
    blocks = tuple(
        own.model_copy(update={name: getattr(other, name) for name in fields})
        for own, other in zip(dense.blocks, example.blocks, strict=True)
    )
    names = ("matching", "match_features", "weighs_tokens")
    rule = {name: getattr(example, name) for name in names}
    target = revise(dense, blocks=blocks, **rule)
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
    """Let a shared model compute what it would at these sizes of heads, hidden units and tokens, in place."""
    host = host_of(shared)
    for i, (want, order) in enumerate(zip(shape.blocks, orders, strict=True)):
        block = host.block(shared, i)
        heads = _masked(block, "attn.proj").view(order.v_dims.shape)
        heads.zero_()[order.heads[: want.num_heads]] = 1
        _masked(block, "mlp.fc2").zero_()[order.neurons[: want.mlp_dim]] = 1
        block.num_tokens_in, block.num_tokens_out = want.num_tokens_in, want.num_tokens_out


def unshare(shared: nn.Module, model: nn.Module) -> nn.Module:
    """A copy of the model that was shared, with the weights as they are now."""
    weights = {
        name.replace(f".{leaf}.projection.", f".{leaf}."): value
        for name, value in shared.state_dict().items()
        if not name.endswith((".match_features", ".token_weights"))
        for leaf in ("fc2" if ".fc2." in name else "proj",)
    }
    plain = copy.deepcopy(model)
    plain.load_state_dict(weights)
    return plain


def _masked(block: Block, name: str) -> Tensor:
    return cast(Masked, block.get_submodule(name)).mask
