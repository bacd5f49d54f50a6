"""Random plans for a shape."""

from __future__ import annotations

from random import Random

from hypothesis import strategies as st

from vitailor.plan import BlockPlan, Plan
from vitailor.shape import BlockShape, Ranks, ViTShape


def subsets(n: int, size: int | None = None) -> st.SearchStrategy[tuple[int, ...]]:
    """Strictly increasing indices below n, at least one."""
    low, high = (1, n) if size is None else (size, size)
    chosen = st.lists(st.integers(0, n - 1), min_size=low, max_size=high, unique=True)
    return chosen.map(lambda kept: tuple(sorted(kept)))


@st.composite
def per_head(draw: st.DrawFn, heads: int, dims: int) -> tuple[tuple[int, ...], ...]:
    """Equally many dims for each head."""
    size = draw(st.integers(1, dims))
    return tuple(draw(subsets(dims, size)) for _ in range(heads))


def places(shape: ViTShape) -> st.SearchStrategy[tuple[tuple[float, ...], ...]]:
    """Weights of the places of tokens for each block."""

    def rows(seed: int) -> tuple[tuple[float, ...], ...]:
        draw = Random(seed).random
        return tuple(tuple(draw() for _ in range(shape.num_tokens)) for _ in range(shape.depth))

    return st.integers(0, 99).map(rows)


def maybe(strategy):
    return st.none() | strategy


@st.composite
def block_plans(
    draw: st.DrawFn, shape: ViTShape, block: BlockShape, arriving: int, tokens: bool, ranks: bool
) -> BlockPlan:
    heads = draw(maybe(subsets(block.num_heads)))
    kept = block.num_heads if heads is None else len(heads)
    qk_dims = None if shape.qk_norm else draw(maybe(per_head(kept, block.qk_dim)))
    plan = BlockPlan(
        heads=heads,
        qk_dims=qk_dims,
        v_dims=draw(maybe(per_head(kept, block.v_dim))),
        neurons=draw(maybe(subsets(block.mlp_dim))),
        attn_features=draw(maybe(subsets(block.attn_features or shape.embed_dim))),
        mlp_features=draw(maybe(subsets(block.mlp_features or shape.embed_dim))),
        num_tokens_out=draw(maybe(st.integers(shape.num_prefix_tokens + 1, arriving)))
        if tokens
        else None,
        # Selection asks the heads that are left, which no mask imitates.
        fuses=tokens and heads is None and draw(st.booleans()),
    )
    if not ranks:
        return plan
    after = plan.result(block, arriving, shape.embed_dim, "block")
    d, v = shape.embed_dim, after.num_heads * after.v_dim
    qk, attn = after.num_heads * after.qk_dim, after.attn_features or d
    limits = {"q": min(attn, qk), "k": min(attn, qk), "v": min(attn, v), "out": min(v, d)}
    limits["fc1"] = min(after.mlp_features or d, after.mlp_dim)
    limits["fc2"] = min(after.mlp_dim, d)
    chosen = {name: draw(maybe(st.integers(1, limit))) for name, limit in limits.items()}
    return plan.model_copy(update={"ranks": Ranks(**chosen)})


@st.composite
def plans(draw: st.DrawFn, shape: ViTShape, *, tokens: bool = True, ranks: bool = False) -> Plan:
    """Any plan that fits a model of `shape`."""
    blocks, arriving = [], shape.num_tokens
    for block in shape.blocks:
        plan = draw(block_plans(shape, block, arriving, tokens, ranks))
        blocks.append(plan)
        arriving = plan.result(block, arriving, shape.embed_dim, "block").num_tokens_out
    if arriving == shape.num_tokens:  # nothing is merged
        return Plan(blocks=tuple(blocks))
    rules = ["ward", "cosine"]
    if all(plan.heads is None for plan in blocks):
        rules.append("attention")  # weighs by the heads that are left, which no mask imitates
    return Plan(
        blocks=tuple(blocks),
        matching=draw(maybe(st.sampled_from(rules))),
        match_features=draw(maybe(per_head(shape.depth, shape.embed_dim))),
        token_weights=draw(maybe(places(shape))),
    )
