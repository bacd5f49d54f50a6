"""The dense sweep: its moments are those of what the projections really read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conftest import build, images
from vitailor.calibrate import BlockMoments, Moments, dense_sweep
from vitailor.criteria import variance, with_match_features
from vitailor.errors import DataError
from vitailor.plan import BlockPlan, Plan
from vitailor.surgery import apply

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("vit_tiny_patch16_224", {}),
    "distilled": ("deit_tiny_distilled_patch16_224", {}),
    "layer scale": ("deit3_small_patch16_224", {}),
    "no biases": ("vit_tiny_patch16_224", {"qkv_bias": False, "proj_bias": False}),
}


def model_of(kind: str) -> nn.Module:
    name, overrides = KINDS[kind]
    return build(name, **overrides).double()


@torch.no_grad()
def written_out(model: nn.Module, x: Tensor) -> list[dict[str, Tensor]]:
    """Queries, keys, mixed values and hidden activations of every block, from the formulas."""
    found = []
    x = model.norm_pre(model._pos_embed(model.patch_embed(x)))
    for block in model.blocks:
        attn = block.attn
        qkv = attn.qkv(block.norm1(x)).unflatten(-1, (3, attn.num_heads, attn.head_dim))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = ((q @ k.transpose(-2, -1) * attn.head_dim**-0.5).softmax(-1) @ v).transpose(1, 2)
        x = x + block.ls1(attn.proj(mixed.flatten(2)))
        hidden = block.mlp.act(block.mlp.fc1(block.norm2(x)))
        x = x + block.ls2(block.mlp.fc2(hidden))
        found.append({"q": q, "k": k, "mixed": mixed.flatten(2), "hidden": hidden})
    return found


def assert_same(found: list[BlockMoments], expected: list[BlockMoments]) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.query, b.query)
        torch.testing.assert_close(a.key, b.key)
        for x, y in ((a.mixed, b.mixed), (a.hidden, b.hidden)):
            assert x.count == y.count
            torch.testing.assert_close(x.total, y.total)
            torch.testing.assert_close(x.second, y.second)


@pytest.mark.parametrize("kind", KINDS)
def test_moments_are_those_of_the_activations(kind):
    model = model_of(kind)
    x = images(model, batch=3)
    for block, seen in zip(dense_sweep(model, [x]), written_out(model, x), strict=True):
        q, k = seen["q"], seen["k"]
        tokens = q.shape[0] * q.shape[2]
        centred = k - k.mean(2, keepdim=True)
        query = torch.einsum("bhnk,bhnl->hkl", q, q) / tokens
        torch.testing.assert_close(block.query, query)
        key = torch.einsum("bhnk,bhnl->hkl", centred, centred) / tokens
        torch.testing.assert_close(block.key, key)
        for moments, x_BNn in ((block.mixed, seen["mixed"]), (block.hidden, seen["hidden"])):
            flat = x_BNn.flatten(0, 1)
            assert moments.count == len(flat)
            torch.testing.assert_close(moments.mean, flat.mean(0))
            torch.testing.assert_close(moments.covariance, flat.T.cov(correction=0))


def test_batches_of_any_size_and_with_labels_are_the_same(vit):
    vit = vit.double()
    x = images(vit, batch=6)
    whole = dense_sweep(vit, [x])
    assert_same(dense_sweep(vit, list(x.split(1))), whole)
    assert_same(dense_sweep(vit, list(x.split(4))), whole)
    assert_same(dense_sweep(vit, [(x, torch.zeros(6))]), whole)


def test_keys_are_centred_within_each_image(vit):
    """Not over all images: what all keys of an image share cancels in its softmax."""
    vit = vit.double()
    x = images(vit, batch=4)
    (first, *_) = written_out(vit, x)
    flat = first["k"].transpose(0, 1).flatten(1, 2)
    over_all = torch.stack([head.T.cov(correction=0) for head in flat])
    found = dense_sweep(vit, [x])[0].key
    assert (found - over_all).abs().max() > 1e-3 * over_all.abs().max()
    with torch.no_grad():  # any key bias
        vit.blocks[0].attn.qkv.bias[16:32] += 3.0
    torch.testing.assert_close(dense_sweep(vit, [x])[0].key, found)


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_as_before(vit, training):
    vit.train(training)
    before = {name: tensor.clone() for name, tensor in vit.state_dict().items()}
    dense_sweep(vit, [images(vit)])
    assert hooks(vit) == 0
    assert vit.training is training
    assert all(torch.equal(tensor, before[name]) for name, tensor in vit.state_dict().items())


def test_hooks_are_gone_after_a_failure_too(vit):
    with pytest.raises(AssertionError, match="match model"):
        dense_sweep(vit, [images(vit), torch.zeros(1, 3, 5, 5)])
    assert hooks(vit) == 0


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_no_images(vit):
    with pytest.raises(DataError, match="no calibration images"):
        dense_sweep(vit, [])


def test_weighted_vectors_count_as_often_as_their_weight():
    x = torch.randn(2, 5, 3, dtype=torch.float64)
    weight = torch.randint(1, 4, (2, 5))
    weighted, repeated = Moments.zero(3, x), Moments.zero(3, x)
    weighted.add(x, weight)
    repeated.add(x.flatten(0, 1).repeat_interleave(weight.flatten(), dim=0))
    assert weighted.count == repeated.count
    torch.testing.assert_close(weighted.mean, repeated.mean)
    torch.testing.assert_close(weighted.covariance, repeated.covariance)


@torch.no_grad()
def test_what_the_mlp_reads_and_which_features_vary():
    model = model_of("plain")
    x, seen = images(model, 6).double(), []
    model.blocks[1].norm2.register_forward_hook(lambda _m, _a, out: seen.append(out.flatten(0, 1)))
    found = dense_sweep(model, [x])[1]
    read = seen[0]
    torch.testing.assert_close(found.mlp_input.mean, read.mean(0))
    torch.testing.assert_close(found.mlp_input.covariance, torch.cov(read.T, correction=0))
    order = with_match_features(variance(found).order(), found).match_features
    assert (read.var(0)[order].diff() <= 1e-12).all()


@torch.no_grad()
def test_a_model_that_merges_by_class_attention_is_calibrated_too():
    model = model_of("plain")
    plan = Plan(blocks=(BlockPlan(num_tokens_out=6), BlockPlan()), matching="attention")
    small, x = apply(model, plan), images(model, 6).double()
    found, dense = dense_sweep(small, [x])[0], dense_sweep(model, [x])[0]
    torch.testing.assert_close(found.query, dense.query)
    torch.testing.assert_close(found.key, dense.key)
    assert found.hidden.count == 6 * 6
