"""What a Vision Transformer is made of, in numbers: per-block sizes and the closed-form cost.

Nothing here imports torch. A `ViTShape` together with tensors defines a compressed model completely.

Cost conventions
    MACs are multiply-adds of matrix products (linear layers, convolutions, attention products, token
    similarity) for one image at the model's reference input size; FLOPs = 2 MACs. Norms, activations,
    softmax, gathers and sums are not counted, as in `torch.utils.flop_counter`.

Symbols
    D embed_dim, N tokens, H heads, K query/key dim per head, V value dim per head, F MLP hidden dim.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from .errors import PlanError

FORMAT_VERSION = 1
Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
#: Rule by which tokens are paired for merging. "cosine": highest cosine similarity, as in ToMe. "ward":
#: least added variance, which weighs tokens by how many each stands for. "attention": the same, weighed
#: by how much the first prefix token, mostly the class token, attends to a token too; like "ward" where the head
#: reads no prefix token. See `tokens.affinity`.
Matching = Literal["attention", "ward", "cosine"]
T = TypeVar("T", bound="Facts")
#: Gentle merging takes about so many rounds, or merges at most one in so many sources in a round.
ROUNDS, SHARE = 4, 4


class Facts(BaseModel):
    """Immutable, strictly typed record that refuses unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Parse JSON text.

        Raises:
            PlanError: naming the first bad field and why it is bad.
        """
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise PlanError(describe_validation_error(cls.__name__, error)) from None

    def to_json(self) -> str:
        return self.model_dump_json(indent=1)


def describe_validation_error(what: str, error: ValidationError) -> str:
    """First problem of a pydantic error as one line that names the field."""
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"]) or "(whole)"
    value = repr(first.get("input"))
    value = value if len(value) <= 60 else value[:57] + "..."
    return f"{what}: field '{field}': {first['msg'].removeprefix('Value error, ')} (got {value})."


class Ranks(Facts):
    """Rank of each factored linear map of a block; None means dense."""

    q: Positive | None = None
    k: Positive | None = None
    v: Positive | None = None
    out: Positive | None = None
    fc1: Positive | None = None
    fc2: Positive | None = None

    @property
    def factors_qkv(self) -> bool:
        """Whether q, k and v are separate layers instead of one fused `qkv`."""
        return any(rank is not None for rank in (self.q, self.k, self.v))


DENSE = Ranks()


class BlockShape(Facts):
    """Sizes of one transformer block.

    Attributes:
        num_heads, qk_dim, v_dim: heads, and query/key and value dim of each head.
        mlp_dim: hidden units of the MLP.
        num_tokens_in: tokens (prefix included) entering the block and its attention.
        num_tokens_out: tokens leaving the attention half, seen by the MLP and the next block.
        fuses: tokens that go become one token (`tokens.fuse`), instead of being merged in pairs.
        attn_features, mlp_features: how many normalised input features the qkv and fc1 projections
            read; None means all of them, without a gather.
        ranks: ranks of factored projections.
    """

    num_heads: Positive
    qk_dim: Positive
    v_dim: Positive
    mlp_dim: Positive
    num_tokens_in: Positive
    num_tokens_out: Positive
    fuses: bool = False
    attn_features: Positive | None = None
    mlp_features: Positive | None = None
    ranks: Ranks = DENSE

    @model_validator(mode="after")
    def _tokens_never_grow(self) -> Self:
        if self.num_tokens_out > self.num_tokens_in:
            raise ValueError(
                f"num_tokens_out {self.num_tokens_out} exceeds num_tokens_in {self.num_tokens_in}"
            )
        return self

    @property
    def sdpa_dim(self) -> int:
        """Head dim that scaled-dot-product attention runs at.

        Fused kernels need equal query/key and value dims, so the smaller is zero-padded to the larger
        (`layers.Attention`); the padded dim is what really runs and what is counted.
        """
        return max(self.qk_dim, self.v_dim)


class ViTShape(Facts):
    """A whole model: what the host library needs to build its skeleton, and each block's sizes.

    Attributes:
        host: library that owns the skeleton, e.g. "timm".
        architecture: class to build and its keyword arguments, understood by that host alone.
        name: name of the model as users know it; informative.
        embed_dim: width D of the residual stream.
        num_prefix_tokens: class, distillation and register tokens; never merged or dropped.
        num_tokens: tokens entering the first block, prefix included.
        num_classes: outputs of the head; 0 for none.
        outer_params, outer_macs: cost of everything outside the blocks.
        block_params: parameters of a block's norms and layer scales, which no plan changes.
        qkv_bias, out_bias, mlp_bias: which projections have a bias.
        pools_prefix: the head reads prefix tokens alone, so what the last block makes of the others is lost.
        qk_norm: parameters of the query and of the key norm per head dim (0, 1 or 2); a model with
            normalised queries and keys keeps its qk_dim.
        matching: rule by which tokens are paired for merging (`tokens.merge`).
        match_features: by how many features tokens are compared for merging; None means all.
        weighs_tokens: tokens that are not fused are chosen by attention times a weight of their place.
    """

    host: str
    architecture: dict[str, Any]
    name: str = ""
    embed_dim: Positive
    num_prefix_tokens: NonNegative
    num_tokens: Positive
    num_classes: NonNegative
    outer_params: NonNegative
    outer_macs: NonNegative
    block_params: NonNegative
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    pools_prefix: bool = False
    qk_norm: NonNegative = 0
    matching: Matching = "ward"
    match_features: Positive | None = None
    weighs_tokens: bool = False
    blocks: tuple[BlockShape, ...]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not self.blocks:
            raise ValueError("blocks is empty")
        if (self.match_features or 0) > self.embed_dim:
            raise ValueError(f"match_features exceeds embed_dim {self.embed_dim}")
        tokens = self.num_tokens
        for i, block in enumerate(self.blocks):
            if block.num_tokens_in != tokens:
                raise ValueError(
                    f"blocks.{i}.num_tokens_in is {block.num_tokens_in}, but {tokens} tokens arrive"
                )
            floor = self.num_prefix_tokens + (1 if tokens > self.num_prefix_tokens else 0)
            if block.num_tokens_out < floor:
                raise ValueError(
                    f"blocks.{i}.num_tokens_out is {block.num_tokens_out}, below the {floor} "
                    "that prefix tokens and one patch token need"
                )
            for field in ("attn_features", "mlp_features"):
                if (getattr(block, field) or 0) > self.embed_dim:
                    raise ValueError(f"blocks.{i}.{field} exceeds embed_dim {self.embed_dim}")
            for field, limit in rank_limits(self.embed_dim, block).items():
                if (getattr(block.ranks, field) or 0) > limit:
                    raise ValueError(f"blocks.{i}.ranks.{field} exceeds the full rank {limit}")
            tokens = block.num_tokens_out
        return self

    @property
    def depth(self) -> int:
        return len(self.blocks)

    @property
    def merges_tokens(self) -> bool:
        return any(b.num_tokens_out < b.num_tokens_in for b in self.blocks)

    def linears(self) -> list[dict[str, tuple[int, int]]]:
        """Input and output size of each projection of each block, by name."""
        return [self.linears_of(block) for block in self.blocks]

    def linears_of(self, b: BlockShape) -> dict[str, tuple[int, int]]:
        """Input and output size of each projection of a block, by name."""
        return {name: sizes[:2] for name, sizes in _linears(self.embed_dim, b).items()}

    @property
    def macs(self) -> int:
        """Multiply-adds of the whole model for one image."""
        return self.outer_macs + sum(self.block_macs(i) for i in range(self.depth))

    @property
    def params(self) -> int:
        """Parameters of the whole model; equals `sum(p.numel())`."""
        return self.outer_params + sum(self.block_param_count(i) for i in range(self.depth))

    def block_macs(self, index: int) -> int:
        """Multiply-adds of block `index`: projections, attention products, MLP, token similarity."""
        b = self.blocks[index]
        n, m = b.num_tokens_in, b.num_tokens_out
        per_token, per_pair = self.attention_macs(b)
        merging = self.merging_macs(n, m, b.num_heads * b.qk_dim, b.fuses)
        return n * per_token + n * n * per_pair + m * self.mlp_macs(b) + merging

    def merging_macs(self, before: int, after: int, queries: int, fuses: bool = False) -> int:
        """MACs of going from `before` to `after` tokens in a block with that many query features."""
        if after == before:
            return 0
        if fuses:
            return before * queries  # one row of attention, computed once more
        pairs = similarity_pairs(before - self.num_prefix_tokens, before - after, self.matching)
        row = before * queries if self.matching == "attention" and self.pools_prefix else 0
        return pairs * (self.match_features or self.embed_dim) + row

    def attention_macs(self, b: BlockShape) -> tuple[int, int]:
        """MACs of a block's attention half for each token, and for each pair of tokens."""
        linears = _linears(self.embed_dim, b)
        per_token = sum(_linear_macs(*linears[name]) for name in ("q", "k", "v", "out"))
        return per_token, 2 * b.num_heads * b.sdpa_dim

    def mlp_macs(self, b: BlockShape) -> int:
        """MACs of a block's MLP for each token."""
        linears = _linears(self.embed_dim, b)
        return _linear_macs(*linears["fc1"]) + _linear_macs(*linears["fc2"])

    def block_param_count(self, index: int) -> int:
        """Parameters of block `index`."""
        b = self.blocks[index]
        return self.block_params + self.attention_params(b) + self.mlp_params(b)

    def attention_params(self, b: BlockShape) -> int:
        """Parameters of a block's attention projections and query and key norms."""
        total, _ = self.attention_macs(b)
        total += b.num_heads * (2 * b.qk_dim + b.v_dim) if self.qkv_bias else 0
        total += self.embed_dim if self.out_bias else 0
        return total + 2 * self.qk_norm * b.qk_dim

    def mlp_params(self, b: BlockShape) -> int:
        """Parameters of a block's MLP."""
        return self.mlp_macs(b) + (b.mlp_dim + self.embed_dim if self.mlp_bias else 0)

    def with_blocks(self, blocks: tuple[BlockShape, ...]) -> ViTShape:
        """The same model with other block sizes, validated."""
        return revise(self, blocks=blocks)


def revise(facts: T, **changes: Any) -> T:
    """A validated copy with some fields changed.

    Raises:
        PlanError: when the changed record is inconsistent.
    """
    fields = {name: getattr(facts, name) for name in type(facts).model_fields} | changes
    try:
        return type(facts)(**fields)
    except ValidationError as error:
        raise PlanError(describe_validation_error(type(facts).__name__, error)) from None


def merge_rounds(num_patches: int, num_merged: int, matching: Matching) -> list[int]:
    """How many tokens each round of merging removes (see `tokens.merge`).

    ToMe's rule takes one round, more only to remove over half. The others go gently, in about `ROUNDS`, so
    that each round merges only what is very alike: at most one in `SHARE` of the sources, or what so many
    equal rounds need.
    """
    most = num_merged
    if matching != "cosine":
        most = max(-(-num_merged // ROUNDS), -(-((num_patches + 1) // 2) // SHARE))
    rounds = []
    while num_merged > 0:
        rounds.append(min(num_merged, most, (num_patches + 1) // 2))
        num_patches, num_merged = num_patches - rounds[-1], num_merged - rounds[-1]
    return rounds


@cache
def similarity_pairs(num_patches: int, num_merged: int, matching: Matching) -> int:
    """Similarities computed to merge `num_merged` of `num_patches` tokens: in each round, every token of
    one half is compared with every token of the other."""
    pairs = 0
    for merged in merge_rounds(num_patches, num_merged, matching):
        pairs += ((num_patches + 1) // 2) * (num_patches // 2)
        num_patches -= merged
    return pairs


def _linears(embed_dim: int, b: BlockShape) -> dict[str, tuple[int, int, int | None]]:
    """Input size, output size and rank of each projection."""
    attn_in = b.attn_features or embed_dim
    qk, v = b.num_heads * b.qk_dim, b.num_heads * b.v_dim
    return {
        "q": (attn_in, qk, b.ranks.q),
        "k": (attn_in, qk, b.ranks.k),
        "v": (attn_in, v, b.ranks.v),
        "out": (v, embed_dim, b.ranks.out),
        "fc1": (b.mlp_features or embed_dim, b.mlp_dim, b.ranks.fc1),
        "fc2": (b.mlp_dim, embed_dim, b.ranks.fc2),
    }


def _linear_macs(fan_in: int, fan_out: int, rank: int | None) -> int:
    return fan_in * fan_out if rank is None else rank * (fan_in + fan_out)


def resized(
    embed_dim: int, block: BlockShape, sizes: Mapping[str, int], origin: BlockShape | None = None
) -> BlockShape:
    """The block with other sizes, not validated, and with those of the original's factors that still save something.

    Args:
        sizes: by field of the block.
        origin: the block whose factors these are, where `block` has been cut from it already.
    """
    after = block.model_copy(update=sizes)
    origin = origin or block
    if origin.ranks == DENSE:
        return after
    return after.model_copy(update={"ranks": paying_ranks(embed_dim, origin, after)})


def paying_ranks(embed_dim: int, before: BlockShape, after: BlockShape) -> Ranks:
    """The factors of a block that stay when it is cut: where a projection has become so small that one layer costs
    no more than two, they are multiplied out."""
    sizes = {name: (i, o) for name, (i, o, _) in _linears(embed_dim, after).items()}
    kept = {}
    for name, (fan_in, fan_out, rank) in _linears(embed_dim, before).items():
        i, o = sizes[name]
        if rank is not None and ((i, o) == (fan_in, fan_out) or rank * (i + o) < i * o):
            kept[name] = rank
    return Ranks(**kept)


def rank_limits(embed_dim: int, b: BlockShape) -> dict[str, int]:
    """Full rank of each projection."""
    return {name: min(i, o) for name, (i, o, _) in _linears(embed_dim, b).items()}
