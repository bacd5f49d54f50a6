"""Sizes that the dimensions of a block may take, and shapes with one of them changed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .shape import BlockShape, ViTShape, resized

Dimension = Literal["tokens", "qk", "v", "neurons", "heads"]
DIMENSIONS: tuple[Dimension, ...] = ("tokens", "qk", "v", "neurons", "heads")
#: What a search may cut: the ranks of the MLP's maps, too. Query/key and value dims are those of attention's.
SearchDimension = Literal["tokens", "qk", "v", "neurons", "heads", "ranks"]
FIELDS: dict[Dimension, str] = {
    "tokens": "num_tokens_out",
    "qk": "qk_dim",
    "v": "v_dim",
    "neurons": "mlp_dim",
    "heads": "num_heads",
}


@dataclass(frozen=True)
class Steps:
    """Smallest change of each dimension: sizes are multiples of it, so that kernels stay fast."""

    tokens: int = 1
    qk: int = 8
    v: int = 8
    neurons: int = 16
    heads: int = 1
    ranks: int = 16

    @classmethod
    def for_shape(cls, shape: ViTShape) -> Steps:
        """Multiples of 16, which CPU and GPU kernels like; finer for models with tiny heads or MLPs."""
        head = min(b.qk_dim for b in shape.blocks)
        mlp = min(b.mlp_dim for b in shape.blocks)
        dim = 16 if head >= 64 else max(1, head // 8)
        return cls(
            qk=dim,
            v=dim,
            neurons=16 if mlp >= 256 else max(1, mlp // 16),
            ranks=16 if shape.embed_dim >= 128 else max(1, shape.embed_dim // 16),
        )


def grid(shape: ViTShape, index: int, dimension: Dimension, steps: Steps) -> list[int]:
    """Sizes that a dimension of a block may take, rising, the present one last."""
    full: int = getattr(shape.blocks[index], FIELDS[dimension])
    step: int = getattr(steps, dimension)
    least = min(full, shape.num_prefix_tokens + 1 if dimension == "tokens" else step)
    return [*range(least, full, step), full]


def with_block(shape: ViTShape, index: int, block: BlockShape) -> ViTShape:
    """The shape with another block in the place of one, not validated."""
    blocks = (*shape.blocks[:index], block, *shape.blocks[index + 1 :])
    return shape.model_copy(update={"blocks": blocks})


def with_size(
    shape: ViTShape, index: int, dimension: Dimension, size: int, origin: ViTShape | None = None
) -> ViTShape:
    """The shape with one dimension of one block changed.

    Tokens removed in a block are gone in all later ones too; later blocks go on removing as many.

    Args:
        origin: what the shape was cut from, if it is to grow again; its factors come back.
    """
    blocks = list(shape.blocks)
    if dimension != "tokens":
        before = blocks[index] if origin is None else origin.blocks[index]
        sizes = {FIELDS[dimension]: size}
        return with_block(shape, index, resized(shape.embed_dim, blocks[index], sizes, before))
    floor = shape.num_prefix_tokens + 1
    arriving = blocks[index].num_tokens_in
    for i in range(index, len(blocks)):
        block = blocks[i]
        leaving = size if i == index else arriving - (block.num_tokens_in - block.num_tokens_out)
        leaving = max(min(floor, arriving), min(leaving, arriving))
        blocks[i] = block.model_copy(
            update={
                "num_tokens_in": arriving,
                "num_tokens_out": leaving,
                "fuses": block.fuses and leaving < arriving,
            }
        )
        arriving = leaving
    return shape.model_copy(update={"blocks": tuple(blocks)})
