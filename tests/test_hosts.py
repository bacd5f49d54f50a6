"""The contract of a host library, over the family of timm's plain Vision Transformers and T2T-ViT."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import timm
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from conftest import build, build_t2t, images
from vitailor import surgery, tokens
from vitailor.errors import PlanError, UnsupportedModelError
from vitailor.hosts import host_named, host_of, shape_of
from vitailor.layers import BlockStack
from vitailor.plan import BlockPlan, Plan
from vitailor.shape import Ranks, ViTShape, revise

FAMILY = {
    "deit_tiny_patch16_224": {},
    "deit_small_distilled_patch16_224": {},
    "deit3_small_patch16_224": {},
    "vit_small_patch16_224": {},
    "vit_small_patch14_dinov2": {},
    "vit_small_patch14_reg4_dinov2": {},
    "vit_base_patch16_clip_224": {},
    "vit_base_patch16_siglip_224": {},
    "vit_medium_patch16_gap_256": {},
    "vit_small_patch16_224-qk_norm": {"qk_norm": True},
    "vit_small_patch16_224-no_biases": {"qkv_bias": False, "proj_bias": False},
}
T2T = "t2t_vit_7"  # has less of an interface than timm's
PREFIX = {"deit_small_distilled_patch16_224": 2, "vit_small_patch14_reg4_dinov2": 5}
WITHOUT_PREFIX = ("vit_base_patch16_siglip_224", "vit_medium_patch16_gap_256")


@pytest.fixture(params=[*FAMILY, T2T])
def name(request):
    return request.param


@pytest.fixture(params=FAMILY)
def timm_name(request):
    return request.param


def make(name: str, **overrides) -> nn.Module:
    if name == T2T:
        return build_t2t(**overrides)
    return build(name.partition("-")[0], **FAMILY.get(name, {}), **overrides)


def cuts(model: nn.Module, *, merge: bool = True) -> Plan:
    """A plan that touches everything that can be touched."""
    shape = shape_of(model)
    prefix, tokens = shape.num_prefix_tokens, shape.num_tokens
    dims = None if shape.qk_norm else ((0, 2, 3, 5, 7), (1, 2, 3, 4, 6))
    return Plan(
        blocks=(
            BlockPlan(
                qk_dims=dims,
                v_dims=((0, 1, 2), (5, 6, 7)),
                neurons=tuple(range(0, 64, 3)),
                attn_features=tuple(range(1, 15)),
                num_tokens_out=prefix + 7 if merge else None,
                ranks=Ranks(fc2=6),
            ),
            BlockPlan(
                heads=(1,),
                mlp_features=tuple(range(0, 16, 2)),
                num_tokens_out=prefix + 2 if merge and tokens > prefix + 2 else None,
                ranks=Ranks(q=3, out=4),
            ),
        )
    )


def compressed(name: str, *, merge: bool = True) -> nn.Module:
    return copy.deepcopy(_compressed(name, merge))


@cache
def _compressed(name: str, merge: bool) -> nn.Module:
    model = make(name)
    return surgery.apply(model, cuts(model, merge=merge))


def counted_macs(model: nn.Module) -> int:
    """Multiply-adds of one forward pass of one image, as torch counts them."""
    for p in model.parameters():
        p.requires_grad_(False)  # with no_grad instead, torch counts attention pooling twice
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(images(model, batch=1))
    flops = counter.get_total_flops()
    assert flops % 2 == 0
    return flops // 2


def params(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


# -- describing ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dense", "cut", "cut and merged"])
def test_cost_is_what_is_counted(name, kind):
    model = make(name) if kind == "dense" else compressed(name, merge=kind == "cut and merged")
    shape = shape_of(model)
    assert shape.params == params(model)
    assert shape.macs == counted_macs(model)


@pytest.mark.parametrize(
    ("name", "giga_macs", "params"),
    [
        ("deit_tiny_patch16_224", 1.2537, 5_717_416),
        ("deit_small_patch16_224", 4.599, 22_050_664),
        ("deit_base_patch16_224", 17.564, 86_567_656),
        ("vit_large_patch16_224", 61.555, 304_326_632),
    ],
)
def test_published_costs(name, giga_macs, params):
    with torch.device("meta"):
        shape = shape_of(timm.create_model(name))
    assert shape.macs / 1e9 == pytest.approx(giga_macs, abs=5e-4 if giga_macs > 2 else 5e-5)
    assert shape.params == params
    assert shape.name == name


def test_prefix_tokens_are_counted(name):
    expected = PREFIX.get(name, 0 if name in WITHOUT_PREFIX else 1)
    assert shape_of(make(name)).num_prefix_tokens == expected


def test_shape_of_a_compressed_model_is_the_plans_result(name):
    model = make(name)
    plan = cuts(model)
    assert shape_of(surgery.apply(model, plan)) == plan.result(shape_of(model))


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("vit_small_patch16_dinov3", "Eva"),
        ("eva02_tiny_patch14_224", "Eva"),
        ("swin_tiny_patch4_window7_224", "Swin"),
        ("vit_base_patch16_rpn_224", "ResPostBlock"),
        ("vit_giant_patch14_dinov2", "mlp"),
        ("vit_small_r26_s32_224", "patch_embed"),
        ("vit_tiny_r_s16_p8_224", "patch_embed"),
        ("vit_relpos_small_patch16_224", "VisionTransformerRelPos"),
        ("resnet18", "ResNet"),
    ],
)
def test_what_cannot_be_accounted_for_is_refused_by_name(name, what):
    with torch.device("meta"):
        model = timm.create_model(name)
    with pytest.raises(UnsupportedModelError, match=what):
        shape_of(model)


def test_models_of_no_known_library_are_refused():
    with pytest.raises(UnsupportedModelError, match=r"torch\.nn\.\S*Linear"):
        shape_of(nn.Linear(1, 1))


@pytest.mark.parametrize(
    ("where", "module", "what"),
    [
        ("extra", nn.Linear(2, 2), "'extra'"),
        ("blocks.1.adapter", nn.Linear(2, 2), r"'blocks\.1\.adapter'"),
        ("blocks.0.norm1", nn.BatchNorm1d(16), r"'blocks\.0\.norm1'"),
        ("blocks.0.ls1", nn.Linear(16, 16), r"'blocks\.0\.ls1'"),
        ("blocks.0.attn", nn.Linear(16, 16), r"'blocks\.0\.attn'"),
        ("blocks.0.mlp.norm", nn.LayerNorm(64), r"'blocks\.0\.mlp'"),
        ("blocks.0.mlp.act", nn.Tanh(), r"act"),
        ("blocks.0.attn.norm", nn.LayerNorm(16), r"'blocks\.0\.attn'"),
        ("patch_embed.norm", nn.LayerNorm(16), "'patch_embed.norm'"),
        ("head", nn.Sequential(nn.Linear(16, 5)), "'head'"),
    ],
)
def test_changed_modules_are_refused_by_name(vit, where, module, what):
    parent, _, child = where.rpartition(".")
    vit.get_submodule(parent).add_module(child, module)
    with pytest.raises(UnsupportedModelError, match=what):
        shape_of(vit)


def test_an_unknown_host_is_refused():
    with pytest.raises(PlanError, match="Unknown host library 'jax'"):
        host_named("jax")


# -- building ------------------------------------------------------------------------------------


def test_identity_plan_is_bit_equal(name):
    model = make(name)
    same = surgery.apply(model, Plan.identity(shape_of(model)))
    assert type(same) is type(model)
    assert torch.equal(same(images(model)), model(images(model)))


@pytest.mark.parametrize("kind", ["dense", "cut", "cut and merged"])
def test_skeleton_from_json_with_the_state_dict_is_bit_equal(name, kind):
    model = make(name) if kind == "dense" else compressed(name, merge=kind == "cut and merged")
    shape = ViTShape.from_json(shape_of(model).to_json())
    skeleton = host_named(shape.host).skeleton(shape)
    assert all(t.is_meta for t in skeleton.state_dict().values())
    skeleton.load_state_dict(model.state_dict(), assign=True)
    assert type(skeleton) is type(model)
    assert torch.equal(skeleton.eval()(images(model)), model(images(model)))
    assert revise(shape_of(skeleton), name=shape.name) == shape


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"class": "Sequential"}, "Unknown timm class"),
        ({"norm": "BatchNorm"}, "Unknown norm"),
        ({"act": "os.system"}, "Unknown norm"),
        ({"device": "cpu"}, "Unknown argument 'device'"),
        ({"block_fn": "x"}, "Unknown argument 'block_fn'"),
        ({"global_pool": "nonsense"}, "timm cannot build"),
        ({"num_heads": 3}, "timm cannot build"),
    ],
)
def test_skeleton_refuses_what_it_never_wrote(vit, change, message):
    shape = shape_of(vit)
    architecture = copy.deepcopy(shape.architecture)
    (architecture if "class" in change else architecture["kwargs"]).update(change)
    with pytest.raises(PlanError, match=message):
        host_named("timm").skeleton(revise(shape, architecture=architecture))


def test_every_stored_argument_is_taken_back(name):
    shape = shape_of(make(name))
    assert shape_of(host_named(shape.host).skeleton(shape)).architecture == shape.architecture


def test_dropout_survives():
    model = build(
        drop_rate=0.1, pos_drop_rate=0.2, proj_drop_rate=0.3, attn_drop_rate=0.4, drop_path_rate=0.5
    )
    skeleton = host_named("timm").skeleton(shape_of(surgery.apply(model, cuts(model))))
    for path, p in (
        ("head_drop", 0.1),
        ("pos_drop", 0.2),
        ("blocks.0.attn.proj_drop", 0.3),
        ("blocks.1.attn.attn_drop", 0.4),
    ):
        assert skeleton.get_submodule(path).p == p
    assert skeleton.get_submodule("blocks.1.drop_path2").drop_prob == 0.5


def test_merging_needs_a_fixed_size():
    model = build(dynamic_img_size=True)
    with pytest.raises(UnsupportedModelError, match="fixed number of tokens"):
        surgery.apply(model, cuts(model))
    assert shape_of(surgery.apply(model, cuts(model, merge=False))).params > 0


# -- running -------------------------------------------------------------------------------------


def test_embed_blocks_finish_make_the_model(name):
    model = compressed(name, merge=False)
    host, x = host_of(model), images(model)
    y = host.embed(model, x)
    for i in range(2):
        block = host.block(model, i)
        y = block.feed(block.attend(y))
    torch.testing.assert_close(host.finish(model, y), model(x))


@pytest.mark.parametrize("merge", [False, True])
def test_features_and_head_make_the_model(name, merge):
    model = compressed(name, merge=merge)
    x = images(model)
    features = model.forward_features(x)
    assert features.shape == (2, shape_of(model).num_tokens, 16)
    assert torch.equal(model.forward_head(features), model(x))
    assert model.forward_head(features, pre_logits=True).shape == (2, 16)


@pytest.mark.parametrize("merge", [False, True])
def test_forward_intermediates(timm_name, merge):
    model = compressed(timm_name, merge=merge)
    x = images(model)
    whole = model.forward_features(x)
    # The blocks' outputs without the host's loop, patches as maps.
    y = host_of(model).embed(model, x)
    if merge:
        ends = [model.blocks[: k + 1](y) for k in range(2)]
    else:
        ends = [model.blocks[0](y), model.blocks(y)]
    maps = [e[:, model.num_prefix_tokens :].transpose(1, 2).unflatten(2, (3, 3)) for e in ends]
    for indices, expected in ((None, maps), (1, maps[1:]), ([0], maps[:1]), ([0, 1], maps)):
        for stop_early in (False, True):
            final, found = model.forward_intermediates(x, indices=indices, stop_early=stop_early)
            assert len(found) == len(expected)
            for f, e in zip(found, expected, strict=True):
                torch.testing.assert_close(f, e)
            if not (stop_early and indices == [0]):
                torch.testing.assert_close(final, whole)


@pytest.mark.parametrize("merge", [False, True])
def test_forward_intermediates_norm_and_prefix(timm_name, merge):
    model = compressed(timm_name, merge=merge)
    x = images(model)
    prefix = model.num_prefix_tokens
    plain = model.forward_intermediates(
        x, output_fmt="NLC", intermediates_only=True, return_prefix_tokens=bool(prefix)
    )
    normed = model.forward_intermediates(
        x, output_fmt="NLC", intermediates_only=True, norm=True, return_prefix_tokens=bool(prefix)
    )
    for p, n in zip(plain, normed, strict=True):
        p, n = (torch.cat(t[::-1], 1) if isinstance(t, tuple) else t for t in (p, n))
        assert p.shape == (2, prefix + 9, 16)
        torch.testing.assert_close(model.norm(p), n)
    torch.testing.assert_close(n, model.forward_features(x))


@pytest.mark.parametrize("merge", [False, True])
def test_prune_intermediate_layers(merge):
    model = compressed("deit_tiny_patch16_224", merge=merge)
    expected = model.forward_intermediates(images(model), indices=[0], intermediates_only=True)
    model.prune_intermediate_layers([0])
    found = model.forward_intermediates(images(model), indices=[0], intermediates_only=True)
    assert len(model.blocks) == 1
    torch.testing.assert_close(found, expected)


def test_attention_masks_and_merging_do_not_go_together():
    model = compressed("deit_tiny_patch16_224", merge=True)
    with pytest.raises(UnsupportedModelError, match="Attention masks"):
        model.forward_intermediates(images(model), is_causal=True)


@pytest.mark.parametrize("merge", [False, True])
def test_reset_classifier(name, merge):
    model = compressed(name, merge=merge)
    before = model.forward_features(images(model))
    model.reset_classifier(7)
    assert model(images(model)).shape == (2, 7)
    assert torch.equal(model.forward_features(images(model)), before)
    assert shape_of(model).num_classes == 7
    assert shape_of(model).params == params(model)
    model.reset_classifier(0)
    assert shape_of(model).params == params(model)
    assert shape_of(model).macs == counted_macs(model)


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(images(model)).square().sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("merge", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(name, merge):
    model = compressed(name, merge=merge)
    plain = gradients(model)
    model.set_grad_checkpointing(True)
    repeated = gradients(model)
    assert plain.keys() == repeated.keys()
    assert {n for n, _ in model.named_parameters() if n.startswith("blocks.")} <= plain.keys()
    for key, value in plain.items():
        torch.testing.assert_close(repeated[key], value, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("merge", [False, True])
def test_training_mode_reaches_every_module(name, merge):
    model = compressed(name, merge=merge)
    x = images(model)
    before = model(x)
    model.train()
    assert all(m.training for m in model.modules())
    model.eval()
    assert not any(m.training for m in model.modules())
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("merge", [False, True])
def test_deepcopy_is_independent(merge):
    model = compressed("deit_tiny_patch16_224", merge=merge)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    assert model(images(model)).abs().sum() > 0
    assert shape_of(twin) == shape_of(model)


@pytest.mark.parametrize("merge", [False, True])
def test_another_input_size(timm_name, merge):
    model = compressed(timm_name, merge=merge)
    model.set_input_size(img_size=(40, 32))
    shape = shape_of(model)
    assert shape.num_tokens == 20 + shape.num_prefix_tokens
    assert model(images(model)).shape == (2, 5)
    assert shape.params == params(model)
    assert shape.macs == counted_macs(model)
    if merge:  # 7 of 9, then 2 of 7 patch tokens, as fractions
        assert [b.num_tokens_out - shape.num_prefix_tokens for b in shape.blocks] == [16, 5]
    # What is described is what runs: rebuilt from it, the model is the same.
    skeleton = host_named("timm").skeleton(shape)
    skeleton.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(skeleton.eval()(images(model)), model(images(model)))


# -- prefix tokens -------------------------------------------------------------------------------


def test_prefix_tokens_are_never_merged(name):
    model = compressed(name, merge=True)
    prefix = model.num_prefix_tokens
    stack = model.blocks
    assert isinstance(stack, BlockStack)
    state = tokens.start(host_of(model).embed(model, images(model)))
    for i, left in enumerate((7, 2)):
        state = stack.step(i, state)
        assert state.x.shape[1] == prefix + left
        assert torch.equal(state.size[:, :prefix], torch.ones(2, prefix))
        assert torch.equal(state.source[:, :prefix], torch.arange(prefix).expand(2, -1))
        assert (state.source[:, prefix:] >= prefix).all()
        assert (state.size.sum(1) == prefix + 9).all()


def test_spread_out_prefix_features_are_the_merged_models_own(name):
    """Where merging cannot matter, in front of the first merge, prefix positions are the dense model's."""
    dense = make(name)
    plan = Plan(blocks=(BlockPlan(), BlockPlan(num_tokens_out=dense.num_prefix_tokens + 1)))
    merged = surgery.apply(dense, plan)
    x, prefix = images(dense), dense.num_prefix_tokens
    # Prefix tokens of the last block attend before anything is merged there.
    torch.testing.assert_close(
        merged.forward_features(x)[:, :prefix], dense.forward_features(x)[:, :prefix]
    )
    patches = merged.forward_features(x)[:, prefix:]
    torch.testing.assert_close(patches, patches[:, :1].expand_as(patches))
