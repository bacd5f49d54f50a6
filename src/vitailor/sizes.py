"""Sizes that the dimensions of a block may take, and shapes with one of them changed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .shape import BlockShape, Ranks, ViTShape, resized

Dimension = Literal["tokens", "qk", "v", "neurons", "heads"]
DIMENSIONS: tuple[Dimension, ...] = ("tokens", "qk", "v", "neurons", "heads")
#: What a search may cut: the ranks of the MLP's maps, too. Query/key and value dims are those of attention's.
SearchDimension = Literal["tokens", "qk", "v", "neurons", "heads", "ranks"]
#: The projections that a search may factor.
FACTORED = ("fc1", "fc2")
#: They are factored only where that saves at least this share of their cost: two layers take a time of their own.
SAVED = 0.2
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


def break_even(shape: ViTShape, b: BlockShape, name: str) -> float:
    """The rank at which two factors of a block's projection cost as much as one layer."""
    fan_in, fan_out = shape.linears_of(b)[name]
    return fan_in * fan_out / (fan_in + fan_out)


def with_rank(shape: ViTShape, index: int, name: str, rank: int | None) -> ViTShape:
    """The shape with a projection of one block at a rank; None for one layer."""
    blocks = list(shape.blocks)
    ranks = Ranks(**{**dict(blocks[index].ranks), name: rank})
    blocks[index] = blocks[index].model_copy(update={"ranks": ranks})
    return shape.model_copy(update={"blocks": tuple(blocks)})


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
        blocks[index] = resized(shape.embed_dim, blocks[index], sizes, before)
        return shape.model_copy(update={"blocks": tuple(blocks)})
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
