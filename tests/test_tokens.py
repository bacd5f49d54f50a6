"""Token merging: what is conserved, what it leaves alone, and what it costs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from conftest import build, images
from vitailor import artifact, surgery, tokens
from vitailor import shape as shape_module
from vitailor.errors import PlanError, UnsupportedModelError
from vitailor.hosts import shape_of
from vitailor.layers import Block, BlockStack
from vitailor.plan import BlockPlan, Plan
from vitailor.shape import merge_rounds, similarity_pairs

MATCHINGS = ("attention", "ward", "cosine")
matchings = st.sampled_from(MATCHINGS)


def random(*size: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*size, generator=generator, dtype=torch.float64)


def merged(
    x: Tensor, *num_out: int, prefix: int = 1, matching: str = "ward", metric: Tensor | None = None
) -> tokens.Tokens:
    state = tokens.start(x)
    for n in num_out:
        by = state.x if metric is None else metric
        attention = None
        if matching == "attention" and prefix:
            attention = random(*by.shape[:2], seed=n).softmax(-1)
        state = tokens.merge(state, by, n, prefix, matching, attention)
    return state


@st.composite
def cases(draw: st.DrawFn) -> dict:
    prefix, patches = draw(st.integers(0, 3)), draw(st.integers(1, 20))
    first = draw(st.integers(prefix + 1, prefix + patches))
    second = draw(st.integers(prefix + 1, first))
    x = random(2, prefix + patches, 4, seed=draw(st.integers(0, 99)))
    return {"x": x, "prefix": prefix, "outs": (first, second), "matching": draw(matchings)}


@given(cases())
def test_merging_conserves_and_accounts_for_every_token(case):
    x, prefix, outs = case["x"], case["prefix"], case["outs"]
    state = merged(x, *outs, prefix=prefix, matching=case["matching"])
    n, original = outs[1], x.shape[1]
    assert state.x.shape == (2, n, 4)
    if n == original:
        assert state.size is state.source is None
        return
    # Every original token is in exactly one token, and sizes count them.
    assert state.source.shape == (2, original)
    counts = F.one_hot(state.source, n).sum(1)
    assert (counts > 0).all()
    assert torch.equal(counts.double(), state.size)
    # Features are means of the members, so weighted sums stay.
    means = torch.zeros_like(state.x).scatter_add(
        1, state.source.unsqueeze(-1).expand(-1, -1, 4), x
    ) / state.size.unsqueeze(-1)
    torch.testing.assert_close(state.x, means)
    # Prefix tokens are where and what they were.
    assert torch.equal(state.x[:, :prefix], x[:, :prefix])
    assert torch.equal(state.source[:, :prefix], torch.arange(prefix).expand(2, -1))
    assert (state.size[:, :prefix] == 1).all()
    assert (state.source[:, prefix:] >= prefix).all()


@given(cases())
def test_regather_inverts_unmerge(case):
    state = merged(case["x"], *case["outs"], prefix=case["prefix"], matching=case["matching"])
    spread = tokens.unmerge(state)
    assert spread.shape == case["x"].shape
    again = tokens.regather(state.detached(), spread)
    assert torch.equal(again.x, state.x)
    assert again.size is state.size
    assert again.source is state.source


@st.composite
def selections(draw: st.DrawFn) -> dict:
    prefix, patches = draw(st.integers(0, 3)), draw(st.integers(2, 20))
    first = draw(st.integers(prefix + 1, prefix + patches - 1))
    second = draw(st.integers(prefix + 1, first))
    x = random(2, prefix + patches, 4, seed=draw(st.integers(0, 99)))
    return {"x": x, "prefix": prefix, "outs": (first, second), "sized": draw(st.booleans())}


@given(selections())
def test_selection_keeps_what_gets_attention_and_averages_the_rest(case):
    x, prefix, sized = case["x"], case["prefix"], case["sized"]
    state = tokens.start(x)
    if sized:
        state = tokens.Tokens(x, x.new_ones(x.shape[:2]), None)
    for n in case["outs"]:
        before, score = state, random(2, state.x.shape[1], seed=n).softmax(-1)
        state = tokens.fuse(state, n, prefix, score)
        if n == before.x.shape[1]:
            assert state is before
            continue
        for b in range(2):
            ranked = sorted(range(prefix, before.x.shape[1]), key=lambda i: -float(score[b, i]))
            kept = [*range(prefix), *sorted(ranked[: n - prefix - 1])]
            gone = ranked[n - prefix - 1 :]
            assert len(gone) >= 2
            assert torch.equal(state.x[b, :-1], before.x[b, kept])
            weight = before.size[b, gone] if sized else torch.ones(len(gone)).double()
            mean = (weight.unsqueeze(1) * before.x[b, gone]).sum(0) / weight.sum()
            torch.testing.assert_close(state.x[b, -1], mean)
            if sized:
                assert torch.equal(state.size[b, :-1], before.size[b, kept])
                assert state.size[b, -1] == weight.sum()
    assert (state.size is None) == (not sized)
    if state.source is not None:
        spread = tokens.unmerge(state)
        again = tokens.regather(state.detached(), spread)
        assert torch.equal(again.x, state.x)
        assert torch.equal(spread[:, :prefix], x[:, :prefix])
        if sized:
            assert torch.equal(F.one_hot(state.source, state.x.shape[1]).sum(1), state.size.long())


@pytest.mark.parametrize(("pool", "class_token"), [("token", True), ("avg", False), ("avg", True)])
def test_selected_tokens_are_those_that_what_the_head_reads_looks_at(pool, class_token):
    model = build("vit_tiny_patch16_224", depth=2, global_pool=pool, class_token=class_token)
    shape = shape_of(model)
    first = BlockPlan(num_tokens_out=5, fuses=True)
    small = surgery.apply(model, Plan(blocks=(first, BlockPlan())))
    x = images(model)
    block, embedded = model.blocks[0], model._pos_embed(model.patch_embed(x))
    attn = block.attn
    q, k, _ = attn.qkv(block.norm1(embedded)).unflatten(-1, (3, attn.num_heads, -1)).unbind(2)
    asking = q[:, :1] if pool == "token" else q.mean(1, keepdim=True)
    row = torch.einsum("bqhk,bnhk->bhqn", asking * attn.scale, k).softmax(-1).mean(1)[:, 0]
    state = tokens.fuse(tokens.start(block(embedded)), 5, shape.num_prefix_tokens, row)
    half = embedded + block.attn(block.norm1(embedded))
    expected = tokens.fuse(tokens.start(half), 5, shape.num_prefix_tokens, row)
    expected = expected.replace(expected.x + block.mlp(block.norm2(expected.x)))
    got = small.blocks.step(0, tokens.start(embedded))
    torch.testing.assert_close(got.x, expected.x)
    assert torch.equal(got.source, state.source)
    assert got.size is None


@given(selections())
def test_values_of_places_are_averaged_over_members(case):
    x, prefix = case["x"], case["prefix"]
    value = random(x.shape[1], seed=9)
    state = tokens.start(x)
    assert torch.equal(tokens.of_members(state, value), value.expand(2, -1))
    for n in case["outs"]:
        score = random(2, state.x.shape[1], seed=n).softmax(-1)
        state = tokens.fuse(state, n, prefix, score)
    got = tokens.of_members(state, value)
    for b in range(2):
        for j in range(state.x.shape[1]):
            members = (state.source[b] == j).nonzero().flatten()
            torch.testing.assert_close(got[b, j], value[members].mean())
    with pytest.raises(UnsupportedModelError, match="places of tokens"):
        tokens.of_members(state, value[:-1])


def test_weights_of_places_decide_which_tokens_stay(tmp_path):
    model = build("vit_tiny_patch16_224", depth=3)
    shape = shape_of(model)
    # Places 3 and 5 weigh all in the first block, 3 and the others' mean in the last.
    weights = torch.zeros(3, shape.num_tokens)
    weights[0, [3, 5]] = 1.0
    weights[2, 3] = 1.0
    blocks = (
        BlockPlan(num_tokens_out=4, fuses=True),
        BlockPlan(),
        BlockPlan(num_tokens_out=3, fuses=True),
    )
    rows = tuple(tuple(row.tolist()) for row in weights)
    plan = Plan(blocks=blocks, token_weights=rows)
    assert Plan.from_json(plan.to_json()) == plan
    small = surgery.apply(model, plan)
    assert shape_of(small).weighs_tokens
    state = small.blocks.step(0, tokens.start(model._pos_embed(model.patch_embed(images(model)))))
    assert state.source[:, 3].tolist() == [1, 1]
    assert state.source[:, 5].tolist() == [2, 2]
    assert (state.source.sort(-1).values[:, 3:] == 3).all()
    state = small.blocks.step(2, small.blocks.step(1, state))
    assert (state.source[:, 3] == 1).all()
    assert (state.source[:, 5] == 2).all()
    artifact.save(small, tmp_path / "small")
    again = artifact.load(tmp_path / "small")
    assert torch.equal(again(images(model)), small(images(model)))
    assert torch.equal(again.blocks.block(0).token_weights, weights[0])
    # Cutting it again keeps its weights.
    once_more = surgery.apply(small, Plan(blocks=(BlockPlan(neurons=(0, 1)), *(BlockPlan(),) * 2)))
    assert torch.equal(once_more.blocks.block(2).token_weights, weights[2])
    with pytest.raises(PlanError, match="token_weights"):
        surgery.apply(model, plan.model_copy(update={"token_weights": rows[:2]}))


def test_detached_bookkeeping_holds_no_features():
    state = merged(random(1, 6, 4).requires_grad_(), 4)
    assert state.detached().x.numel() == 0
    assert not state.detached().size.requires_grad


@pytest.mark.parametrize("matching", MATCHINGS)
def test_unmerging_merged_equal_tokens_is_the_identity(matching):
    # Pairs of equal tokens next to each other fall into different halves, in the first round and later.
    patches = random(2, 5, 4).repeat_interleave(2, dim=1)
    x = torch.cat([random(2, 1, 4, seed=1), patches], dim=1)
    state = merged(x, 6, matching=matching)
    assert (state.size[:, 1:] == 2).all()
    torch.testing.assert_close(tokens.unmerge(state), x)


@pytest.mark.parametrize("matching", MATCHINGS)
@pytest.mark.parametrize("patches", [1, 2, 3, 9, 16])
def test_reduction_to_one_patch_token(matching, patches):
    x = random(2, 2 + patches, 4)
    state = merged(x, 3, prefix=2, matching=matching)
    torch.testing.assert_close(state.x[:, 2], x[:, 2:].mean(1))
    with FlopCounterMode(display=False) as counter:
        merged(x, 3, prefix=2, matching=matching)
    assert counter.get_total_flops() == 2 * 2 * 4 * similarity_pairs(patches, patches - 1, matching)


@given(st.integers(1, 24), matchings, st.data())
def test_similarities_are_as_many_as_counted(patches, matching, data):
    left = data.draw(st.integers(1, patches))
    x = random(1, 1 + patches, 6)
    with FlopCounterMode(display=False) as counter:
        merged(x, 1 + left, matching=matching)
    pairs = similarity_pairs(patches, patches - left, matching)
    assert counter.get_total_flops() == 2 * 6 * pairs


@given(cases())
def test_tokens_keep_their_order(case):
    """In one round the second half stays in its order, and so do the tokens that find no partner."""
    x, prefix = case["x"], case["prefix"]
    patches = x.shape[1] - prefix
    one_round = max(1, patches // 4) if case["matching"] == "cosine" else 1
    if patches < 2:
        return
    state = merged(x, x.shape[1] - one_round, prefix=prefix, matching=case["matching"])
    for row, size in zip(state.source, state.size, strict=True):
        assert (row[prefix + 1 :: 2].diff() > 0).all()
        alone = row[size[row] == 1]
        assert (alone.diff() > 0).all()


@given(st.integers(1, 60), matchings, st.data())
def test_rounds_add_up_and_take_at_most_half(patches, matching, data):
    gone = data.draw(st.integers(0, patches - 1))
    rounds, left = merge_rounds(patches, gone, matching), patches
    for merged_now in rounds:
        assert 1 <= merged_now <= left - left // 2
        left -= merged_now
    assert patches - left == gone
    if matching == "cosine" and gone <= (patches + 1) // 2:
        assert len(rounds) == bool(gone)
    if matching != "cosine" and gone <= patches // 8:
        assert len(rounds) <= 4


def test_gentle_rounds_merge_more_alike_tokens_than_one(monkeypatch):
    """What four rounds lose of the variance between tokens is less than what one round loses."""
    x = F.normalize(random(16, 64, 8).cumsum(1), dim=-1)  # neighbours resemble each other
    lost = []
    for rounds in (1, 4):
        monkeypatch.setattr(shape_module, "ROUNDS", rounds)
        monkeypatch.setattr(shape_module, "SHARE", rounds)
        state = merged(x, 32, prefix=0, matching="ward")
        lost.append(float((tokens.unmerge(state) - x).square().sum()))
    assert lost[1] < 0.8 * lost[0]


def test_later_rounds_compare_means():
    """Two merged tokens are compared with a third by their mean, not by a sum that counts sizes twice."""
    x = random(1, 41, 6)
    size = torch.randint(1, 5, (1, 41), generator=torch.Generator().manual_seed(3)).double()
    state = tokens.Tokens(x, size, torch.arange(41)[None])
    found = tokens.merge(state, x, 21, 0, "ward")
    step = state  # the same rounds one at a time, on the means that each left
    for gone in merge_rounds(41, 20, "ward"):
        step = _one_round(step, gone)
    assert torch.equal(found.source, step.source)
    torch.testing.assert_close(found.x, step.x)


def _one_round(state: tokens.Tokens, gone: int) -> tokens.Tokens:
    target = tokens._pair_off(state.x, state.size, gone, 0)
    member = F.one_hot(target, state.x.shape[1] - gone).double().mT  # (B, out, in)
    size = (member @ state.size.unsqueeze(-1)).squeeze(-1)
    x = member @ (state.x * state.size.unsqueeze(-1)) / size.unsqueeze(-1)
    return tokens.Tokens(x, size, target.gather(1, state.source))


def test_the_most_similar_pair_goes_first():
    x = torch.tensor([[[9.0, 9.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.5], [0.1, 1.0]]])
    for matching in MATCHINGS:
        state = merged(x, 4, matching=matching)
        # Patch tokens 1 and 3 against 2 and 4: 1-2 0.0, 1-4 0.1, 3-2 0.45, 3-4 0.54.
        assert state.source.tolist() == [[0, 1, 2, 3, 3]]
        torch.testing.assert_close(state.x[0, 3], (x[0, 3] + x[0, 4]) / 2)


def test_ward_spares_large_groups_and_cosine_does_not():
    """Token 1 is nearest in angle to the large group, token 3 a bit less near to the small one."""
    x = F.normalize(torch.tensor([[[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.3, 1.0]]]), dim=-1)
    size = torch.tensor([[4.0, 4.0, 1.0, 1.0]])
    state = tokens.Tokens(x, size, torch.arange(4)[None])
    cosine = tokens.merge(state, x, 3, 0, "cosine")
    ward = tokens.merge(state, x, 3, 0, "ward")
    assert sorted(cosine.size[0].tolist()) == [1, 1, 8]
    assert sorted(ward.size[0].tolist()) == [1, 1, 8]  # 4 * 4 / 8 * 0.005 < 1 * 1 / 2 * 0.042
    size = torch.tensor([[40.0, 40.0, 1.0, 1.0]])
    state = tokens.Tokens(x, size, torch.arange(4)[None])
    assert sorted(tokens.merge(state, x, 3, 0, "cosine").size[0].tolist()) == [1, 1, 80]
    assert sorted(tokens.merge(state, x, 3, 0, "ward").size[0].tolist()) == [2, 40, 40]


def test_affinity_written_out():
    x, size = random(1, 5, 3), torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0]], dtype=torch.float64)
    cosine = F.cosine_similarity(x[0, ::2, None], x[0, None, 1::2], dim=-1)
    torch.testing.assert_close(tokens.affinity(x, None)[0], cosine)
    a, b = size[0, ::2, None], size[0, None, 1::2]
    ward = -(1 - cosine) * a * b / (a + b)
    torch.testing.assert_close(tokens.affinity(x, size)[0], ward)


def test_shares_add_members_and_attention():
    size, attention = torch.tensor([[1.0, 1.0, 3.0]]), torch.tensor([[0.6, 0.3, 0.1]])
    found = tokens.shares(size, attention, 1)[0, 1:]
    torch.testing.assert_close(found, torch.tensor([0.25 + 0.75, 0.75 + 0.25]))


def test_what_the_class_token_looks_at_is_spared():
    """Two equally alike pairs; the one that is looked at stays apart."""
    x = torch.tensor([[[9.0, 9.0], [1.0, 0.0], [1.0, 0.2], [0.0, 1.0], [0.2, 1.0]]])
    for looked_at, survivors in ((1, [0, 1, 2, 3, 3]), (3, [0, 1, 1, 2, 3])):
        attention = torch.full((1, 5), 0.1)
        attention[0, looked_at] = 0.6
        state = tokens.merge(tokens.start(x), x, 4, 1, "attention", attention)
        assert state.source.tolist() == [survivors]


def test_nothing_merged_needs_no_bias():
    assert tokens.attention_bias(tokens.start(random(1, 3, 2))) is None
    bias = tokens.attention_bias(merged(random(2, 6, 2), 4))
    assert bias.shape == (2, 1, 1, 4)
    assert bias[:, ..., 0].abs().max() == 0


def test_gradients_reach_every_token():
    x = random(1, 9, 4).requires_grad_()
    tokens.unmerge(merged(x, 4)).square().sum().backward()
    assert (x.grad.abs().sum(-1) > 0).all()


# -- in a model ----------------------------------------------------------------------------------


@pytest.mark.parametrize("matching", MATCHINGS)
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit3_small_patch16_224"])
def test_merged_tokens_with_sizes_stand_for_their_duplicates(name, matching):
    """Blocks on merged duplicates compute what the dense blocks compute on the duplicates."""
    model = build(name).double()
    plan = Plan(blocks=(BlockPlan(num_tokens_out=6), BlockPlan()))
    small = surgery.apply(model, plan)
    small.blocks.matching = matching
    x = torch.cat([random(2, 1, 16), random(2, 5, 16, seed=1).repeat_interleave(2, 1)], 1)[:, :10]
    stack = small.blocks
    first, second = stack.block(0), stack.block(1)
    state = tokens.start(x).replace(first.attend(x))
    # Nine patch tokens: four pairs of duplicates and one alone.
    state = tokens.merge(state, first.norm2(state.x), 6, 1, matching)
    assert sorted(state.size[0].tolist()) == [1, 1, 2, 2, 2, 2]
    state = state.replace(first.feed(state.x))
    attended = second.attend(state.x, tokens.attention_bias(state))
    found = tokens.unmerge(state.replace(second.feed(attended)))
    expected = model.blocks(x)
    assert (found - expected).abs().max() <= 1e-10 * expected.abs().max()
    torch.testing.assert_close(stack(x), found)
    # Without the sizes it is another function.
    wrong = tokens.unmerge(state.replace(second.feed(second.attend(state.x))))
    assert (wrong - expected).abs().max() > 1e-3


@given(st.data())
def test_a_stack_leaves_as_many_tokens_as_it_says(data):
    model = build("vit_tiny_patch16_224", depth=3)
    outs, arriving = [], 10
    for _ in range(3):
        arriving = data.draw(st.integers(2, arriving))
        outs.append(arriving)
    small = surgery.apply(model, Plan(blocks=tuple(BlockPlan(num_tokens_out=n) for n in outs)))
    assert [b.num_tokens_out for b in shape_of(small).blocks] == outs
    if not isinstance(small.blocks, BlockStack):
        assert outs == [10] * 3
        return
    state = tokens.start(random(1, 10, 16).float())
    for i, n in enumerate(outs):
        state = small.blocks.step(i, state)
        assert state.x.shape[1] == n == small.blocks.num_out(i, 10 if i == 0 else outs[i - 1])


def test_one_pass_leaves_no_state_behind():
    small = surgery.apply(
        build(), Plan(blocks=(BlockPlan(num_tokens_out=6), BlockPlan(num_tokens_out=3)))
    )
    one, two = images(small, batch=1, seed=5), images(small, batch=3, seed=6)
    first = small(one)
    assert small(two).shape == (3, 5)
    steps = list(small.blocks)
    x = random(2, 10, 16).float()
    expected = small.blocks(x)
    for _ in range(2):  # the steps of one iteration may be run again
        y = x
        for step in steps:
            y = step(y)
        torch.testing.assert_close(y, expected)
    assert torch.equal(small(one), first)


def test_stacks_index_and_slice_like_the_hosts():
    model = build("vit_tiny_patch16_224", depth=3)
    small = surgery.apply(
        model, Plan(blocks=(BlockPlan(num_tokens_out=6), BlockPlan(), BlockPlan()))
    )
    stack = small.blocks
    assert len(stack) == 3
    assert isinstance(stack[-1], Block)
    assert isinstance(stack[:2], BlockStack)
    assert len(stack[:2]) == 2
    assert list(small.state_dict()) == list(model.state_dict())
    assert next(iter(stack)).mlp is stack[0].mlp


@pytest.mark.parametrize(("arriving", "left"), [(10, 6), (19, 11), (2, 2), (1, 1), (37, 21)])
def test_other_sizes_rescale_by_fraction_of_patch_tokens(arriving, left):
    small = surgery.apply(build(), Plan(blocks=(BlockPlan(num_tokens_out=6), BlockPlan())))
    assert small.blocks.num_out(0, arriving) == left
    assert small.blocks.num_out(1, arriving) == arriving


def test_class_attention_is_the_first_row_of_attention():
    model = build("deit3_small_patch16_224").double()
    small = surgery.apply(model, Plan(blocks=(BlockPlan(num_tokens_out=6), BlockPlan())))
    block = small.blocks.block(0)
    x, bias = random(2, 10, 16), random(2, 1, 1, 10)
    y, row = block.attn(x, attn_mask=bias, asks="first")
    torch.testing.assert_close(y, block.attn(x, attn_mask=bias))
    q, k, _ = block.attn.heads(x)
    logits = block.attn.scale * torch.einsum("bhnk,bhmk->bhnm", q, k) + bias
    torch.testing.assert_close(row, logits.softmax(-1)[:, :, 0].mean(1).float())
    assert not row.requires_grad


def test_a_merging_block_keeps_the_projections_of_the_host():
    model = build()
    small = surgery.apply(model, Plan(blocks=(BlockPlan(num_tokens_out=6), BlockPlan())))
    x = random(2, 10, 16).float()
    assert list(small.state_dict()) == list(model.state_dict())
    assert torch.equal(small.blocks.block(0).attn(x), model.blocks[0].attn(x))


def test_tokens_are_compared_by_the_features_of_the_plan():
    model = build().double()
    features = (tuple(range(4)), tuple(range(8, 12)))
    plan = Plan(blocks=(BlockPlan(num_tokens_out=6), BlockPlan()), match_features=features)
    small = surgery.apply(model, plan)
    assert shape_of(small).match_features == 4
    assert [tuple(b.match_features.tolist()) for b in map(small.blocks.block, (0, 1))] == [
        *features
    ]
    x, block = random(2, 10, 16), small.blocks.block(0)
    attended = tokens.start(block.attend(x))
    found = small.blocks.attend(0, tokens.start(x))
    metric = block.norm2(attended.x)
    expected = tokens.merge(attended, metric[..., :4], 6, 1, "ward")
    assert torch.equal(found.source, expected.source)
    assert not torch.equal(
        found.source, tokens.merge(attended, metric[..., 4:8], 6, 1, "ward").source
    )


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_base_patch16_siglip_224"])
def test_weighing_by_attention_needs_a_class_token(name):
    model = build(name).double()
    plans = [
        Plan(blocks=(BlockPlan(num_tokens_out=5), BlockPlan()), matching=matching)
        for matching in ("ward", "attention")
    ]
    ward, attention = (surgery.apply(model, plan) for plan in plans)
    x = images(model, batch=8).double()
    same = torch.equal(ward(x), attention(x))
    assert same is (not shape_of(model).num_prefix_tokens)
    row = 10 * 4 * shape_of(model).embed_dim // 4
    assert shape_of(attention).macs - shape_of(ward).macs == (0 if same else row)


def test_half_precision_pairs_like_single():
    """Weights are shares of many tokens, far below what half precision can tell apart."""
    x = F.normalize(random(1, 401, 16).float().cumsum(1), dim=-1)
    attention = random(1, 401, seed=1).float().softmax(-1)
    for dtype in (torch.float16, torch.bfloat16):
        found = tokens.merge(tokens.start(x.to(dtype)), x, 300, 1, "attention", attention.to(dtype))
        exact = tokens.merge(tokens.start(x), x, 300, 1, "attention", attention)
        assert found.x.dtype == dtype
        assert (found.source == exact.source).float().mean() > 0.5
        assert found.size.sum() == 401
