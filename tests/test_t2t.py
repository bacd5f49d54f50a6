"""T2T-ViT: the published architecture, its names and sizes, its weights from files, and its compression."""

from __future__ import annotations

import math
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import vitailor as vt
from conftest import build_t2t, images, randomise
from vitailor import t2t
from vitailor.errors import PlanError, UnsupportedModelError, UsageError, WeightsError
from vitailor.hosts import host_named, shape_of
from vitailor.models import open_model
from vitailor.preprocessing import resolve_preprocessing
from vitailor.shape import revise

BOTH = ("weight", "bias")


def published_names(depth: int) -> set[str]:
    """Names in the released checkpoints."""
    names = {"cls_token", "pos_embed"}

    def add(where: str, parameters: tuple[str, ...]) -> None:
        names.update(f"{where}.{p}" for p in parameters)

    for layer in ("attention1", "attention2"):
        names.add(f"tokens_to_token.{layer}.w")
        for part in ("kqv", "proj", "norm1", "norm2", "mlp.0", "mlp.2"):
            add(f"tokens_to_token.{layer}.{part}", BOTH)
    add("tokens_to_token.project", BOTH)
    for i in range(depth):
        add(f"blocks.{i}.attn.qkv", ("weight",))
        for part in ("norm1", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"):
            add(f"blocks.{i}.{part}", BOTH)
    add("norm", BOTH)
    add("head", BOTH)
    return names


# -- the published architecture ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "depth", "millions", "giga_macs"),
    [
        ("t2t_vit_7", 7, 4.3, 1.147),  # published: 4.3, 1.1
        ("t2t_vit_14", 14, 21.5, 4.783),  # published: 21.5, 4.8
        ("t2t_vit_19", 19, 39.2, 8.480),  # published: 39.2, 8.5
    ],
)
def test_published_sizes_and_names(name, depth, millions, giga_macs):
    with torch.device("meta"):
        model = t2t.create(name)
    shape = shape_of(model)
    assert model.state_dict().keys() == published_names(depth)
    assert round(shape.params / 1e6, 1) == millions
    assert shape.macs / 1e9 == pytest.approx(giga_macs, abs=5e-4)
    assert shape.params == sum(p.numel() for p in model.parameters())
    assert (shape.name, shape.host) == (name, "t2t")
    assert (shape.num_tokens, shape.num_prefix_tokens, shape.num_classes) == (197, 1, 1000)
    assert {(b.qk_dim, b.v_dim) for b in shape.blocks} == {(64, 64)}


def test_sizes_of_the_stage():
    state = t2t.create("t2t_vit_7").state_dict()
    sizes = {
        "pos_embed": (1, 197, 256),
        "tokens_to_token.attention1.w": (32, 64),
        "tokens_to_token.attention1.kqv.weight": (192, 147),
        "tokens_to_token.attention2.kqv.weight": (192, 576),
        "tokens_to_token.attention2.mlp.2.weight": (64, 64),
        "tokens_to_token.project.weight": (256, 576),
        "blocks.0.mlp.fc1.weight": (512, 256),
    }
    assert {name: tuple(state[name].shape) for name in sizes} == sizes


def test_what_is_not_trained():
    model = t2t.create("t2t_vit_7")
    still = {n for n, p in model.named_parameters() if not p.requires_grad}
    layers = ("attention1", "attention2")
    assert still == {"pos_embed", *(f"tokens_to_token.{layer}.w" for layer in layers)}


def test_random_directions_are_orthogonal_and_long():
    w = t2t.TokenPerformer(147, 0.0).w.detach()
    torch.testing.assert_close(w @ w.T, 32 * torch.eye(32), atol=1e-4, rtol=0)


def test_positions():
    found = t2t.sinusoids(5, 6)
    for n in range(5):
        for d in range(6):
            angle = n / 10000 ** (2 * (d // 2) / 6)
            expected = math.cos(angle) if d % 2 else math.sin(angle)
            assert float(found[n, d]) == pytest.approx(expected, abs=1e-6)


def test_preprocessing():
    found = resolve_preprocessing(t2t.create("t2t_vit_7"))
    assert found.input_size == (3, 224, 224)
    assert (found.crop_pct, found.interpolation) == (0.9, "bicubic")
    assert found.mean == (0.485, 0.456, 0.406)
    assert found.std == (0.229, 0.224, 0.225)
    assert resolve_preprocessing(build_t2t(img_size=(32, 48))).input_size == (3, 32, 48)


# -- the stage, by formulas ----------------------------------------------------------------------


def slow_performer(layer: t2t.TokenPerformer, x_NI: Tensor) -> Tensor:
    """One image through a Performer layer, token by token."""
    k, q, v = (layer.kqv(layer.norm1(x_NI))[:, i * 64 : (i + 1) * 64] for i in range(3))
    w, m = layer.w, 32

    def phi(x: Tensor) -> Tensor:
        return torch.stack([torch.exp(w[j] @ x - x @ x / 2) for j in range(m)]) / math.sqrt(m)

    keys = [phi(x) for x in k]
    rows = []
    for n in range(len(x_NI)):
        query = phi(q[n])
        weights = torch.stack([query @ key for key in keys])
        mixed = sum(weight * value for weight, value in zip(weights, v, strict=True))
        rows.append(v[n] + layer.proj(mixed / (weights.sum() + 1e-8)))
    x = torch.stack(rows)
    fc1, act, fc2, _ = layer.mlp
    return x + fc2(act(fc1(layer.norm2(x))))


def slow_split(map_CHW: Tensor, kernel: int, stride: int, padding: int) -> Tensor:
    """Neighbourhoods of a map as rows, channel by channel."""
    padded = nn.functional.pad(map_CHW, (padding,) * 4)
    _, height, width = map_CHW.shape
    rows = []
    for top in range(0, height + 2 * padding - kernel + 1, stride):
        for left in range(0, width + 2 * padding - kernel + 1, stride):
            rows.append(padded[:, top : top + kernel, left : left + kernel].flatten())
    return torch.stack(rows)


@pytest.mark.parametrize("size", [(32, 32), (32, 48)])
def test_the_stage_is_its_formulas(size):
    model = build_t2t(img_size=size).double()
    stage, x = model.tokens_to_token, images(model)
    with torch.no_grad():
        for image, found in zip(x, stage(x), strict=True):
            height, width = (s // 4 for s in size)
            y = slow_performer(stage.attention1, slow_split(image, 7, 4, 2))
            y = slow_split(y.T.reshape(64, height, width), 3, 2, 1)
            y = slow_performer(stage.attention2, y)
            y = slow_split(y.T.reshape(64, height // 2, width // 2), 3, 2, 1)
            torch.testing.assert_close(found, stage.project(y), rtol=1e-10, atol=1e-10)


def test_performers_mix_tokens():
    """Else the test above would not see their attention."""
    layer = build_t2t().tokens_to_token.attention1
    x = torch.randn(1, 9, 147, generator=torch.Generator().manual_seed(0))
    other = x.clone()
    other[:, 1:] = other[:, 1:].flip(2)
    assert (layer(x)[:, 0] - layer(other)[:, 0]).abs().max() > 1e-2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_in_range(dtype):
    layer = build_t2t().tokens_to_token.attention1
    with torch.no_grad():
        layer.kqv.weight.mul_(2.5)  # exponentials that float16 does not hold
    x = torch.randn(2, 400, 147, generator=torch.Generator().manual_seed(0))
    expected = layer(x)
    with torch.autocast("cpu", dtype):
        autocast = layer(x)
    for found in (autocast, layer.to(dtype)(x.to(dtype))):
        assert found.dtype == dtype
        assert found.isfinite().all()
        assert (found.float() - expected).abs().mean() < 0.1 * expected.abs().mean()


def test_dropout_is_for_training():
    model = build_t2t(token_drop_rate=0.5)
    x = images(model)
    assert torch.equal(model(x), model(x))
    model.train()
    assert not torch.equal(model.tokens_to_token(x), model.tokens_to_token(x))


def test_any_batch_size_can_be_traced():
    model = build_t2t()
    batch = torch.export.Dim("batch", min=1, max=8)
    traced = torch.export.export(model, (images(model),), dynamic_shapes=({0: batch},)).module()
    x = images(model, batch=5)
    torch.testing.assert_close(traced(x), model(x))


# -- building ------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 8, 24, (32, 40), 225])
def test_sizes_must_be_multiples_of_the_stride(size):
    with pytest.raises(UsageError, match=r"cannot be built .* multiples of 16"):
        t2t.T2TViT(img_size=size)


def test_images_of_another_size_are_refused():
    with pytest.raises(UsageError, match="takes images of 48 x 48 pixels, not of 32 x 48"):
        build_t2t()(torch.zeros(1, 3, 32, 48))


def test_unknown_arguments_are_errors():
    with pytest.raises(TypeError, match="img_sise"):
        t2t.create("t2t_vit_7", img_sise=32)


def test_building_a_skeleton_leaves_the_random_state_alone():
    shape, before = shape_of(build_t2t()), torch.get_rng_state()
    host_named("t2t").skeleton(shape)
    shape_of(build_t2t())
    assert torch.equal(torch.get_rng_state(), before)


def test_arguments_survive():
    arguments: dict[str, Any] = {
        "img_size": (32, 64),
        "in_chans": 1,
        "qkv_bias": True,
        "drop_rate": 0.1,
        "attn_drop_rate": 0.2,
        "drop_path_rate": 0.3,
        "token_drop_rate": 0.4,
    }
    model = build_t2t(**arguments)
    shape = shape_of(model)
    twin = host_named("t2t").skeleton(shape)
    assert repr(twin) == repr(model)
    assert shape_of(twin) == shape
    found = shape.architecture["kwargs"]
    assert found == arguments | {"img_size": [32, 64], "num_heads": 2}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"class": "T2TBERT"}, "Unknown T2T-ViT class 'T2TBERT'"),
        ({"kwargs": {"device": "cpu"}}, "Unknown argument 'device'"),
        ({"kwargs": {"img_size": 30}}, "cannot be built from the stored arguments: .*30 x 30"),
        ({"kwargs": {"num_heads": 3}}, "cannot be built"),
        ({"kwargs": {"drop_rate": 2.0}}, "cannot be built"),
    ],
)
def test_skeletons_refuse_what_was_never_written(change, message):
    shape = shape_of(build_t2t())
    architecture = shape.architecture | {
        name: shape.architecture[name] | value if name == "kwargs" else value
        for name, value in change.items()
    }
    with pytest.raises(PlanError, match=message):
        host_named("t2t").skeleton(revise(shape, architecture=architecture))


@pytest.mark.parametrize(
    ("where", "module"),
    [
        ("extra", nn.Linear(2, 2)),
        ("norm", nn.LayerNorm(16, eps=1e-6)),
        ("head", nn.Sequential()),
        ("tokens_to_token", nn.Linear(2, 2)),
        ("tokens_to_token.soft_split1", nn.Unfold(3, stride=2)),
        ("tokens_to_token.attention1", nn.Linear(2, 2)),
        ("tokens_to_token.attention1.kqv", nn.Linear(147, 192, bias=False)),
        ("tokens_to_token.attention2.extra", nn.Identity()),
        ("tokens_to_token.attention2.mlp.1", nn.ReLU()),
        ("blocks.0.attn", nn.Linear(2, 2)),
        ("blocks.1.norm2", nn.LayerNorm(16, eps=1e-6)),
        ("blocks.1.mlp.act", nn.ReLU()),
        ("blocks.0.attn.q_norm", nn.LayerNorm(8)),
    ],
)
def test_changed_modules_are_refused_by_name(where, module):
    model = build_t2t()
    parent, _, child = where.rpartition(".")
    model.get_submodule(parent).add_module(child, module)
    with pytest.raises(UnsupportedModelError, match=f"'{where}'"):
        shape_of(model)


def test_subclasses_are_refused():
    class Mine(t2t.T2TViT):
        pass

    with torch.device("meta"), pytest.raises(UnsupportedModelError, match="Mine"):
        shape_of(Mine(depth=1))


# -- opening -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", t2t.VARIANTS)
def test_pretrained_weights_are_to_be_given(name):
    with pytest.raises(WeightsError, match=f"pretrained weights of {name}") as caught:
        open_model(name)
    assert f"--weights FILE or {name}=FILE" in caught.value.fix


def test_random_weights():
    before = torch.get_rng_state()
    model: Any = open_model("t2t_vit_7", pretrained=False, num_classes=3).model
    assert torch.equal(torch.get_rng_state(), before)
    assert type(model) is t2t.T2TViT
    assert (model.num_classes, model.head.out_features, model.training) == (3, 3, False)


@pytest.mark.parametrize("key", ["state_dict_ema", "state_dict"])
def test_released_checkpoints(tmp_path, key):
    """Wrapped and with other things beside them, as the training script leaves them."""
    model = randomise(t2t.create("t2t_vit_7", num_classes=7)).eval()
    state = model.state_dict()
    file = tmp_path / "t2t.pth.tar"
    beside = {"epoch": 300, "arch": "t2t_vit_7", "args": Namespace(model="t2t_vit_7", lr=5e-4)}
    torch.save(beside | {key: {f"module.{n}": t for n, t in state.items()}}, file)
    opened: Any = open_model(f"t2t_vit_7={file}").model
    assert opened.state_dict().keys() == published_names(7)
    assert all(torch.equal(t, state[n]) for n, t in opened.state_dict().items())
    x = images(model, batch=1)
    with torch.inference_mode():
        assert torch.equal(opened(x), model(x))
    with pytest.raises(WeightsError, match="does not fit t2t_vit_14"):
        open_model("t2t_vit_14", weights=file)


# -- compressing ---------------------------------------------------------------------------------

FEW: dict[str, Any] = {"harm_images": 8, "tune_images": 8}


def photos(count: int, size: int = 64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(4, 3, size, size, generator=generator) for _ in range(count // 4)]


def same(model: nn.Module, path: Path) -> bool:
    x = images(model)
    with torch.inference_mode():
        return torch.equal(vt.load(path)(x), model(x))


@pytest.fixture(scope="module")
def dense() -> nn.Module:
    """Of which the blocks are most of the cost."""
    return build_t2t(img_size=64, embed_dim=192, num_heads=3, mlp_ratio=2.0, depth=4)


@pytest.mark.parametrize("budget", [{"macs": 0.7}, {"params": 0.6}])
def test_closed_form(dense, tmp_path, budget):
    before = {n: t.clone() for n, t in dense.state_dict().items()}
    small = vt.compress(dense, vt.ClosedForm(**FEW), vt.Budget(**budget), data=photos(16))
    assert all(torch.equal(t, before[n]) for n, t in dense.state_dict().items())
    assert type(small) is t2t.T2TViT
    was, now = shape_of(dense), shape_of(small)
    kind, share = next(iter(budget.items()))
    assert getattr(now, kind) <= share * getattr(was, kind)
    assert now.outer_macs == was.outer_macs
    vt.save(small, tmp_path / "small")
    assert same(small, tmp_path / "small")
    small.requires_grad_(False)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        small(images(small, batch=1))
    assert 2 * now.macs == counter.get_total_flops()


@pytest.mark.parametrize(
    "method",
    [
        vt.ClosedForm(criterion="taylor", compensation=False, allocation="uniform"),
        vt.LowRank(),
        vt.TokenMerge(),
    ],
    ids=lambda method: method.name,
)
def test_other_methods(dense, tmp_path, method):
    small = vt.compress(dense, method, vt.Budget(macs=0.8), data=photos(8))
    assert shape_of(small).macs <= 0.8 * shape_of(dense).macs
    vt.save(small, tmp_path / "small")
    assert same(small, tmp_path / "small")


def test_compressed_models_learn(dense):
    """From the dense model; what is not trained stays as it is."""
    small: Any = vt.compress(dense, vt.TokenMerge(), vt.Budget(macs=0.8), data=photos(8))
    still = {"pos_embed", *(f"tokens_to_token.{layer}.w" for layer in ("attention1", "attention2"))}
    config = vt.TrainConfig(epochs=1, batch_size=4)
    trained: Any = vt.train(small, photos(8), config, teacher=dense)
    for name, values in small.named_parameters():
        assert torch.equal(trained.get_parameter(name), values) == (name in still), name
