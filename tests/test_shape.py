"""Closed-form costs, validation and JSON of shapes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import block, shape
from vitailor.errors import PlanError
from vitailor.shape import Ranks, ViTShape, revise, similarity_pairs


def published(dim: int, depth: int, heads: int) -> ViTShape:
    """A ViT with patches of 16 pixels at 224 pixels and 1,000 classes, from its published sizes."""
    n, k = 197, dim // heads
    one = block(
        num_heads=heads, qk_dim=k, v_dim=k, mlp_dim=4 * dim, num_tokens_in=n, num_tokens_out=n
    )
    patch = 3 * 16 * 16 * dim
    return shape(
        *(one,) * depth,
        embed_dim=dim,
        num_tokens=n,
        num_classes=1000,
        # patch embedding, class token, positions, final norm, head
        outer_params=patch + dim + dim + n * dim + 2 * dim + 1000 * dim + 1000,
        outer_macs=196 * patch + 1000 * dim,
        block_params=4 * dim,
    )


@pytest.mark.parametrize(
    ("dim", "depth", "heads", "giga_macs", "params"),
    [
        (192, 12, 3, 1.254, 5_717_416),
        (384, 12, 6, 4.599, 22_050_664),
        (768, 12, 12, 17.564, 86_567_656),
        (1024, 24, 16, 61.555, 304_326_632),
    ],
    ids=["tiny", "small", "base", "large"],
)
def test_published_costs(dim, depth, heads, giga_macs, params):
    dense = published(dim, depth, heads)
    assert dense.macs / 1e9 == pytest.approx(giga_macs, abs=5e-4)
    assert dense.params == params


def test_cost_of_one_block_written_out():
    one = block(
        num_heads=3,
        qk_dim=4,
        v_dim=6,
        mlp_dim=20,
        num_tokens_out=7,
        attn_features=11,
        mlp_features=9,
        ranks=Ranks(q=2, out=5, fc2=3),
    )
    found = shape(one)
    n, m, d = 10, 7, 16
    linears = n * (2 * (11 + 12) + 11 * 12 + 11 * 18 + 5 * (18 + d))
    attention = 2 * n * n * 3 * 6  # queries and keys are padded to the value dim
    mlp = m * (9 * 20 + 3 * (20 + d))
    # 9 patch tokens in halves of 5 and 4, then 7 in halves of 4 and 3, by two and by one
    similarity = (5 * 4 + 4 * 3) * d
    assert found.block_macs(0) == linears + attention + mlp + similarity
    assert found.macs == 1000 + found.block_macs(0)
    weights = 2 * (11 + 12) + 11 * 12 + 11 * 18 + 5 * (18 + d) + 9 * 20 + 3 * (20 + d)
    biases = 3 * (4 + 4 + 6) + d + 20 + d
    assert found.block_param_count(0) == 64 + weights + biases
    assert found.params == 100 + found.block_param_count(0)


def test_biases_and_norms_that_are_absent_cost_nothing():
    with_all = shape(block(), qk_norm=2)
    without = shape(block(), qkv_bias=False, out_bias=False, mlp_bias=False)
    biases = 2 * (8 + 8 + 8) + 16 + 64 + 16
    assert with_all.params - without.params == biases + 2 * 2 * 8
    assert with_all.macs == without.macs


def test_attention_runs_at_the_larger_of_the_head_dims():
    assert block(qk_dim=4, v_dim=8).sdpa_dim == block(qk_dim=8, v_dim=4).sdpa_dim == 8


@pytest.mark.parametrize(
    ("patches", "merged", "at_once", "gently"),
    [
        (9, 0, 0, 0),
        (9, 1, 20, 20),
        (9, 5, 20, 20 + 4 * 3 + 3 * 2),
        (9, 6, 20 + 4, 20 + 4 * 3 + 3 * 2),
        (9, 8, 20 + 4 + 1, 20 + 4 * 3 + 3 * 2 + 2 * 1),
        (1, 0, 0, 0),
        (2, 1, 1, 1),
    ],
)
def test_similarity_pairs(patches, merged, at_once, gently):
    assert similarity_pairs(patches, merged, "cosine") == at_once
    assert similarity_pairs(patches, merged, "ward") == gently
    assert similarity_pairs(patches, merged, "attention") == gently


@given(st.data())
def test_cost_is_monotone_in_every_size(data):
    sizes = {
        "num_heads": data.draw(st.integers(1, 4)),
        "qk_dim": data.draw(st.integers(1, 8)),
        "v_dim": data.draw(st.integers(1, 8)),
        "mlp_dim": data.draw(st.integers(1, 64)),
        "attn_features": data.draw(st.integers(1, 16)),
        "mlp_features": data.draw(st.integers(1, 16)),
    }
    small = shape(block(**sizes))
    for name, limit in (("attn_features", 16), ("mlp_features", 16), *((n, 99) for n in sizes)):
        if sizes[name] < limit and not (name.endswith("features") and sizes[name] == 16):
            larger = shape(block(**sizes | {name: sizes[name] + 1}))
            assert larger.params > small.params
            assert larger.macs > small.macs


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: shape(embed_dim=0), "embed_dim"),
        (lambda: shape(embed_dim=16.0), "embed_dim"),
        (lambda: shape(num_tokens="10"), "num_tokens"),
        (lambda: shape(host=7), "host"),
        (lambda: shape(colour="red"), "colour"),
        (lambda: shape(matching="best"), "matching"),
        (lambda: shape(qkv_bias=1), "qkv_bias"),
        (lambda: shape(num_tokens=11), "blocks.0.num_tokens_in"),
        (lambda: shape(block(num_tokens_out=7), block()), "blocks.1.num_tokens_in"),
        (lambda: shape(block(num_tokens_out=1)), "blocks.0.num_tokens_out"),
        (lambda: shape(block(num_tokens_out=2), num_prefix_tokens=2), "blocks.0.num_tokens_out"),
        (lambda: shape(block(attn_features=17)), "blocks.0.attn_features"),
        (lambda: shape(block(), block(mlp_features=17)), "blocks.1.mlp_features"),
        (lambda: shape(block(ranks=Ranks(fc1=17))), "blocks.0.ranks.fc1"),
        (lambda: shape(block(num_heads=1, ranks=Ranks(q=9))), "blocks.0.ranks.q"),
        (lambda: shape(blocks=()), "blocks"),
        (lambda: block(num_heads=0), "num_heads"),
        (lambda: block(num_tokens_out=11), "num_tokens_out"),
        (lambda: Ranks(q=0), "q"),
    ],
)
def test_validation_names_the_bad_field(make, field):
    with pytest.raises(ValueError, match=field.replace(".", r"\.")):
        make()


def test_a_model_of_prefix_tokens_alone_is_allowed():
    one = block(num_tokens_in=1, num_tokens_out=1)
    assert shape(one, num_tokens=1, num_prefix_tokens=1).depth == 1


def test_json_round_trip():
    one = shape(
        block(num_tokens_out=6, attn_features=3, ranks=Ranks(v=2, fc1=4)),
        block(num_tokens_in=6, num_tokens_out=6),
        matching="cosine",
        qk_norm=1,
    )
    assert ViTShape.from_json(one.to_json()) == one


@pytest.mark.parametrize(
    ("old", "new", "field"),
    [
        ('"embed_dim": 16', '"embed_dim": -16', "embed_dim"),
        ('"embed_dim": 16', '"embed_dim": "16"', "embed_dim"),
        ('"embed_dim": 16', '"embed_dim": 16, "x": 1', "x"),
        ('"mlp_dim": 64', '"mlp_dim": null', "blocks.0.mlp_dim"),
        ('"num_heads": 2,', "", "blocks.0.num_heads"),
        ("{", "[", "whole"),
    ],
)
def test_json_errors_name_the_field(old, new, field):
    text = shape().to_json()
    assert old in text
    with pytest.raises(PlanError, match=f"ViTShape: field '.*{field}"):
        ViTShape.from_json(text.replace(old, new, 1))


def test_long_values_are_cut_in_messages():
    with pytest.raises(PlanError) as caught:
        ViTShape.from_json(shape().to_json().replace('"timm"', f"[{'1,' * 500}1]"))
    assert len(str(caught.value)) < 200


def test_shapes_are_immutable_and_revised_by_validated_copies():
    one = shape()
    with pytest.raises(ValueError, match="frozen"):
        one.embed_dim = 8
    assert revise(one, name="x").name == "x"
    assert one.name == ""
    with pytest.raises(PlanError, match="embed_dim"):
        revise(one, embed_dim=0)
    with pytest.raises(PlanError, match="blocks is empty"):
        one.with_blocks(())
