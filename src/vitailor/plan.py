"""A `Plan` says how to get from one model to a smaller one: what is kept, in which order, at what rank.

A plan is relative to a given model and holds indices, not ratios, so that it is exact, can be replayed
and says what was removed. Nothing here imports torch.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Self

from pydantic import Field, model_validator

from .errors import PlanError
from .shape import (
    DENSE,
    FORMAT_VERSION,
    BlockShape,
    Facts,
    Matching,
    Positive,
    Ranks,
    ViTShape,
    paying_ranks,
    revise,
)

Indices = tuple[Annotated[int, Field(ge=0)], ...]
Share = Annotated[float, Field(ge=0, le=1)]


class BlockPlan(Facts):
    """What is kept in one block. None means everything, untouched.

    Attributes:
        heads: kept heads.
        qk_dims, v_dims: for each kept head, its kept query/key and value dims; every head keeps as many.
        neurons: kept hidden units of the MLP.
        attn_features, mlp_features: normalised input features that qkv and fc1 still read.
        num_tokens_out: tokens left after the attention half, prefix included.
        fuses: tokens that go become one (`tokens.fuse`), instead of being merged in pairs.
        ranks: ranks at which projections are factored.
    """

    heads: Indices | None = None
    qk_dims: tuple[Indices, ...] | None = None
    v_dims: tuple[Indices, ...] | None = None
    neurons: Indices | None = None
    attn_features: Indices | None = None
    mlp_features: Indices | None = None
    num_tokens_out: Positive | None = None
    fuses: bool = False
    ranks: Ranks = DENSE

    @model_validator(mode="after")
    def _well_formed(self) -> Self:
        for name in ("heads", "neurons", "attn_features", "mlp_features"):
            _check_indices(name, getattr(self, name))
        for name in ("qk_dims", "v_dims"):
            per_head = getattr(self, name)
            if per_head is None:
                continue
            if len({len(dims) for dims in per_head}) != 1:
                raise ValueError(f"{name} must keep equally many dims in each of at least one head")
            for dims in per_head:
                _check_indices(name, dims)
        return self

    @property
    def touches_attention(self) -> bool:
        """Whether the attention module's own sizes change."""
        kept = (self.heads, self.qk_dims, self.v_dims, self.attn_features)
        return any(k is not None for k in kept) or (
            self.ranks.factors_qkv or self.ranks.out is not None
        )

    @property
    def touches_mlp(self) -> bool:
        kept = (self.neurons, self.mlp_features, self.ranks.fc1, self.ranks.fc2)
        return any(k is not None for k in kept)

    def result(
        self, block: BlockShape, num_tokens_in: int, embed_dim: int, where: str
    ) -> BlockShape:
        """Sizes of `block` after this plan, when `num_tokens_in` tokens of `embed_dim` features arrive.

        Raises:
            PlanError: naming the field that does not fit the block.
        """
        heads = _count(self.heads, block.num_heads, f"{where}.heads")
        for name, limit in (("qk_dims", block.qk_dim), ("v_dims", block.v_dim)):
            per_head = getattr(self, name)
            if per_head is not None and len(per_head) != heads:
                raise PlanError(
                    f"{where}.{name} lists {len(per_head)} heads, but {heads} are kept.",
                    "List one tuple of dims for each kept head.",
                )
            for dims in per_head or ():
                _count(dims, limit, f"{where}.{name}")
        tokens_out, fuses = num_tokens_in, self.fuses
        if self.num_tokens_out is not None:
            tokens_out = self.num_tokens_out
            if tokens_out > num_tokens_in:
                raise PlanError(
                    f"{where}.num_tokens_out is {tokens_out}, but only {num_tokens_in} tokens arrive.",
                    "Token counts can only fall from block to block.",
                )
        elif block.num_tokens_out < block.num_tokens_in:
            # The model already merges here: keep its target as far as that is possible.
            tokens_out, fuses = min(block.num_tokens_out, num_tokens_in), block.fuses
        attn_in = block.attn_features
        if self.attn_features is not None:
            attn_in = _count(self.attn_features, attn_in or embed_dim, f"{where}.attn_features")
        mlp_in = block.mlp_features
        if self.mlp_features is not None:
            mlp_in = _count(self.mlp_features, mlp_in or embed_dim, f"{where}.mlp_features")
        after = BlockShape(
            num_heads=heads,
            qk_dim=len(self.qk_dims[0]) if self.qk_dims else block.qk_dim,
            v_dim=len(self.v_dims[0]) if self.v_dims else block.v_dim,
            mlp_dim=_count(self.neurons, block.mlp_dim, f"{where}.neurons"),
            num_tokens_in=num_tokens_in,
            num_tokens_out=tokens_out,
            fuses=fuses and tokens_out < num_tokens_in,
            attn_features=attn_in,
            mlp_features=mlp_in,
        )
        own = {n: r for n, r in paying_ranks(embed_dim, block, after) if r is not None}
        asked = {n: r for n, r in self.ranks if r is not None}
        return revise(after, ranks=Ranks(**own | asked))


class Plan(Facts):
    """One `BlockPlan` for each block, and the version of this format.

    `matching` is the rule by which tokens are paired for merging, `match_features` lists for each block
    the features by which they are compared, equally many; `token_weights` for each block a weight of every
    place in the model's tokens, for selection (`tokens.fuse`). None leaves the model's.
    """

    version: int = FORMAT_VERSION
    matching: Matching | None = None
    match_features: tuple[Indices, ...] | None = None
    token_weights: tuple[tuple[Share, ...], ...] | None = None
    blocks: tuple[BlockPlan, ...]

    @model_validator(mode="after")
    def _known_version(self) -> Self:
        if not 1 <= self.version <= FORMAT_VERSION:
            raise ValueError(
                f"version {self.version} is not one of 1 to {FORMAT_VERSION}; upgrade vitailor"
            )
        return self

    @model_validator(mode="after")
    def _features_for_every_block(self) -> Self:
        if self.match_features is None:
            return self
        counts = {len(features) for features in self.match_features}
        if len(self.match_features) != len(self.blocks) or len(counts) != 1:
            raise ValueError("match_features must list equally many features for each block")
        for features in self.match_features:
            _check_indices("match_features", features)
        return self

    @classmethod
    def identity(cls, shape: ViTShape) -> Plan:
        return cls(blocks=(BlockPlan(),) * shape.depth)

    def result(self, shape: ViTShape) -> ViTShape:
        """Shape of the model that this plan makes from a model of `shape`.

        Raises:
            PlanError: when the plan does not fit, naming block and field.
        """
        if len(self.blocks) != shape.depth:
            raise PlanError(
                f"The plan has {len(self.blocks)} blocks, the model has {shape.depth}.",
                "Use the plan with the model it was made for.",
            )
        tokens, blocks = shape.num_tokens, []
        for i, (plan, block) in enumerate(zip(self.blocks, shape.blocks, strict=True)):
            after = plan.result(block, tokens, shape.embed_dim, f"blocks.{i}")
            blocks.append(after)
            tokens = after.num_tokens_out
        if shape.qk_norm and any(p.qk_dims is not None for p in self.blocks):
            raise PlanError(
                "The model normalises queries and keys, so qk_dims cannot change.",
                "Leave qk_dims out; remove whole heads instead.",
            )
        if self.token_weights is not None:
            sizes = {len(weights) for weights in self.token_weights}
            if len(self.token_weights) != shape.depth or sizes != {shape.num_tokens}:
                raise PlanError(
                    f"token_weights are not {shape.depth} rows of {shape.num_tokens} places.",
                    "Use the plan with the model it was made for.",
                )
        compared = shape.match_features
        for i, features in enumerate(self.match_features or ()):
            compared = _count(features, shape.embed_dim, f"match_features.{i}")
        return revise(
            shape,
            blocks=tuple(blocks),
            matching=self.matching or shape.matching,
            match_features=compared,
            weighs_tokens=shape.weighs_tokens or self.token_weights is not None,
        )


def _check_indices(name: str, indices: Indices | None) -> None:
    if indices is None:
        return
    if not indices:
        raise ValueError(f"{name} keeps nothing; at least one must stay")
    if any(b <= a for a, b in pairwise(indices)):
        raise ValueError(f"{name} must be strictly increasing")


def _count(indices: Indices | None, limit: int, where: str) -> int:
    if indices is None:
        return limit
    if indices[-1] >= limit:
        raise PlanError(
            f"{where} names unit {indices[-1]}, but the model has {limit} (0 to {limit - 1}).",
            "Use the plan with the model it was made for.",
        )
    return len(indices)
