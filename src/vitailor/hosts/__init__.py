"""The only place that knows the attribute names of host libraries. One file for each library.

A host describes a model as a `ViTShape` (refusing, by name, whatever it cannot account for), builds the
skeleton that a shape names, gives modules new sizes, and reads and writes a block's weights in one
canonical form, the same for all hosts:

    q.weight, k.weight (H, K, D')   v.weight (H, V, D')    out.weight (D, H, V)
    fc1.weight (F, D")              fc2.weight (D, F)      and the biases, where there are any
    attn_features (D',), mlp_features (D",)                where projections read through an index
    NAME.up, NAME.down     to be written: factors of a projection, instead of the nearest ones to its weight

so that algorithms never see a host.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from torch import Tensor, nn

from ..errors import PlanError, UnsupportedModelError
from ..shape import BlockShape, Ranks, ViTShape

if TYPE_CHECKING:
    from ..layers import Block

Tensors = dict[str, Tensor]


class Host(Protocol):
    """What a host library's file provides."""

    name: str

    def owns(self, model: nn.Module) -> bool:
        """Whether the model is one of this library's."""

    def describe(self, model: nn.Module) -> ViTShape:
        """Shape of the model; raises `UnsupportedModelError` naming what cannot be accounted for."""

    def require_static_size(self, model: nn.Module) -> None:
        """Refuse a model whose number of tokens may change from one image to the next."""

    def skeleton(self, shape: ViTShape) -> nn.Module:
        """A model of the given shape on the meta device, without weights."""

    def resize(self, model: nn.Module, shape: ViTShape) -> None:
        """Give the model's blocks the sizes of `shape`, in place; resized layers are uninitialised."""

    def block(self, model: nn.Module, index: int) -> Block:
        """A view of a block whose halves can be run apart; shares the model's modules."""

    def resize_block(self, block: Block, shape: ViTShape, want: BlockShape) -> None:
        """Give one block the sizes `want`, in place; resized layers are uninitialised."""

    def read(self, block: Block) -> Tensors:
        """Weights of a block in canonical form, factored layers multiplied out (detached views)."""

    def write(self, block: Block, tensors: Tensors, ranks: Ranks) -> None:
        """Copy canonical weights into a block, factoring where it has ranks."""

    def embed(self, model: nn.Module, images: Tensor) -> Tensor:
        """Tokens entering the first block, (B, N, D)."""

    def finish(self, model: nn.Module, x: Tensor) -> Tensor:
        """Outputs of the model from the last block's tokens (B, N, D)."""

    def shift_outputs(self, model: nn.Module, shift: Tensor) -> None:
        """Add (num_classes,) to the logits, in place, in the biases of the heads; without any, nothing."""


def all_hosts() -> tuple[Host, ...]:
    from .t2t_vit import T2T
    from .timm_vit import TimmViT

    return (TimmViT(), T2T())


def host_of(model: nn.Module) -> Host:
    """The host that owns a model.

    Raises:
        UnsupportedModelError: when none does.
    """
    for host in all_hosts():
        if host.owns(model):
            return host
    raise UnsupportedModelError(
        f"{type(model).__module__}.{type(model).__name__} is not a model vitailor knows.",
        "Supported: timm's VisionTransformer family (ViT, DeiT, DeiT-3, DINOv2, CLIP, SigLIP) and "
        "vitailor.t2t's T2T-ViT.",
    )


def host_named(name: str) -> Host:
    for host in all_hosts():
        if host.name == name:
            return host
    raise PlanError(f"Unknown host library '{name}'.", "A newer vitailor may know it: upgrade.")


def shape_of(model: nn.Module) -> ViTShape:
    """Per-block sizes and closed-form cost of a model.

    Raises:
        UnsupportedModelError: naming the module that cannot be accounted for.
    """
    return host_of(model).describe(model)
