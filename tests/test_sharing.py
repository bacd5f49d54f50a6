"""Weight sharing: the shared model computes what the cut model of the same sizes does."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conftest import build, images
from vitailor import sharing, surgery
from vitailor.criteria import magnitude
from vitailor.hosts import host_of, shape_of
from vitailor.orders import plan_for
from vitailor.shape import ViTShape, revise
from vitailor.sizes import with_size

MODEL = build(depth=3, num_heads=4).double()
DENSE = shape_of(MODEL)
X = images(MODEL)
ORDERS = [magnitude(host_of(MODEL).read(block)).order() for block in MODEL.blocks]


@st.composite
def sizes(draw: st.DrawFn, tokens: bool, fuses: bool) -> ViTShape:
    """Any sizes of heads and neurons, and of tokens after the second block."""
    shape = DENSE
    for i in range(shape.depth):
        if not (
            fuses and i == 1
        ):  # the row of attention is over the heads left, which no mask imitates
            shape = with_size(shape, i, "heads", draw(st.integers(1, 4)))
        shape = with_size(shape, i, "neurons", draw(st.integers(1, DENSE.blocks[i].mlp_dim)))
    if not tokens:
        return shape
    shape = with_size(shape, 1, "tokens", draw(st.integers(2, DENSE.num_tokens)))
    cuts = shape.blocks[1].num_tokens_out < DENSE.num_tokens
    second = shape.blocks[1].model_copy(update={"fuses": fuses and cuts})
    return shape.with_blocks((shape.blocks[0], second, shape.blocks[2]))


@pytest.mark.parametrize(("tokens", "rule"), [(False, "ward"), (True, "fuse"), (True, "cosine")])
@given(st.data())
def test_a_shared_model_of_some_sizes_is_the_model_cut_to_these(tokens, rule, data):
    before, wanted = (data.draw(sizes(tokens, rule == "fuse")) for _ in range(2))
    if rule != "fuse":
        wanted = revise(wanted, matching=rule)
    shared = sharing.share(MODEL, revise(DENSE, matching=wanted.matching), ORDERS, [1] * tokens)
    sharing.resize(shared, before, ORDERS)
    sharing.resize(shared, wanted, ORDERS)
    plan = plan_for(DENSE, wanted, ORDERS)
    with torch.inference_mode():
        torch.testing.assert_close(shared(X), surgery.apply(MODEL, plan)(X), rtol=1e-10, atol=1e-10)


def test_sharing_returns_the_weights():
    shared = sharing.share(MODEL, DENSE, ORDERS, [1])
    back = sharing.unshare(shared, MODEL)
    state = MODEL.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in back.state_dict().items())
    assert type(back) is type(MODEL)
    with torch.no_grad():
        for parameter in shared.parameters():
            parameter.add_(1.0)
    changed = sharing.unshare(shared, MODEL).state_dict()
    for name, parameter in MODEL.named_parameters():
        assert torch.equal(changed[name], parameter + 1), name


def test_what_a_size_leaves_out_is_not_trained():
    shared = sharing.share(MODEL, DENSE, ORDERS)
    wanted = with_size(with_size(DENSE, 0, "neurons", 5), 1, "heads", 2)
    sharing.resize(shared, wanted, ORDERS)
    shared(X).square().sum().backward()
    kept = ORDERS[0].neurons[:5]
    moved = shared.blocks[0].mlp.fc1.weight.grad.abs().sum(1) > 0
    assert moved.nonzero().flatten().tolist() == sorted(kept.tolist())
    gone = set(range(4)) - set(ORDERS[1].heads[:2].tolist())
    read = shared.blocks[1].attn.proj.projection.weight.grad.unflatten(1, (4, -1))
    assert all(not read[:, head].any() for head in gone)
    assert read.any()
