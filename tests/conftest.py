"""Tiny models and guards that all tests share."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

# Before torch reads them. Tests are many and small: threads would only wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import timm
import torch
from hypothesis import settings
from torch import Tensor, nn

from vitailor.shape import BlockShape, ViTShape
from vitailor.t2t import T2TViT

torch.set_num_threads(1)
# The same examples everywhere, and none too slow for a busy machine.
settings.register_profile("vitailor", deadline=None, derandomize=True, max_examples=25)
settings.load_profile("vitailor")

#: Arguments that make any model of the family tiny: 9 patch tokens, two blocks of two heads.
TINY = {
    "img_size": 24,
    "patch_size": 8,
    "depth": 2,
    "embed_dim": 16,
    "num_heads": 2,
    "num_classes": 5,
}


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random values everywhere, so that outputs depend on every parameter.

    timm starts class tokens and positions near zero, biases at zero and layer scales at 1e-5.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if (
                p.dim() >= 2
                and not name.endswith("token")
                and "embed" not in name
                and "latent" not in name
            ):
                noise = noise * p.flatten(1).shape[1] ** -0.5
            else:
                noise = 0.5 * noise + ("norm" in name and name.endswith("weight"))
            p.copy_(noise)
    return model


def build(name: str = "vit_tiny_patch16_224", *, seed: int = 0, **overrides: object) -> nn.Module:
    """A tiny model of timm's `name` with random weights, in evaluation mode; a new one every time."""
    return copy.deepcopy(_built(name, seed, tuple(overrides.items())))


@cache
def _built(name: str, seed: int, overrides: tuple[tuple[str, object], ...]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        model = timm.create_model(name, pretrained=False, **(TINY | dict(overrides)))
    return randomise(model, seed).eval()


def layer_scaled() -> tuple[nn.Module, nn.Module]:
    """A model with layer scale, and the same function with it folded into the weights."""
    model = build(init_values=1.0, embed_dim=32)
    gain, folded = torch.linspace(0.01, 3, 32), copy.deepcopy(model)
    with torch.no_grad():
        for scaled, plain in zip(model.blocks, folded.blocks, strict=True):
            for ls, layer, other in (
                (scaled.ls1, plain.attn.proj, plain.ls1),
                (scaled.ls2, plain.mlp.fc2, plain.ls2),
            ):
                ls.gamma.copy_(gain)
                layer.weight *= gain.unsqueeze(1)
                layer.bias *= gain
                other.gamma.fill_(1)
    return model, folded


def build_t2t(*, seed: int = 0, **overrides: Any) -> nn.Module:
    """The same of T2T-ViT: 9 patch tokens, two blocks of two heads."""
    with torch.random.fork_rng(devices=[]):
        arguments = {name: value for name, value in TINY.items() if name != "patch_size"}
        model = T2TViT(**(arguments | {"img_size": 48, "mlp_ratio": 4.0} | overrides))
    randomise(model, seed)
    stage = model.tokens_to_token
    with torch.no_grad():
        for layer in (stage.attention1, stage.attention2):
            layer.w.mul_(32**0.5)
            for p in layer.kqv.parameters():
                p.mul_(0.25)  # long keys and queries attend to nothing
    return model.eval()


def images(model: nn.Module, batch: int = 2, seed: int = 1) -> Tensor:
    """Random input of the model's size and dtype."""
    generator = torch.Generator().manual_seed(seed)
    size = getattr(model, "image_size", None) or model.patch_embed.img_size
    dtype = next(model.parameters()).dtype
    return torch.randn(batch, 3, *size, generator=generator, dtype=torch.float64).to(dtype)


def block(**changes: object) -> BlockShape:
    """Sizes of the blocks of `TINY`."""
    fields: dict[str, object] = {
        "num_heads": 2,
        "qk_dim": 8,
        "v_dim": 8,
        "mlp_dim": 64,
        "num_tokens_in": 10,
        "num_tokens_out": 10,
    }
    return BlockShape(**(fields | changes))


def shape(*blocks: BlockShape, **changes: object) -> ViTShape:
    """A shape with round figures around its blocks."""
    fields: dict[str, object] = {
        "host": "timm",
        "architecture": {"class": "VisionTransformer", "kwargs": {}},
        "embed_dim": 16,
        "num_prefix_tokens": 1,
        "num_tokens": 10,
        "num_classes": 5,
        "outer_params": 100,
        "outer_macs": 1000,
        "block_params": 64,
        "qkv_bias": True,
        "out_bias": True,
        "mlp_bias": True,
        "blocks": blocks or (block(), block()),
    }
    return ViTShape(**(fields | changes))


@pytest.fixture
def vit() -> nn.Module:
    """A tiny plain ViT."""
    return build()


@pytest.fixture
def make_vit() -> Callable[..., nn.Module]:
    return build


@pytest.fixture(autouse=True)
def seed() -> int:
    """The same random state at the start of every test, whatever ran before."""
    torch.manual_seed(1234)
    return 1234


def _flags() -> dict[str, object]:
    return {
        "threads": torch.get_num_threads(),
        "interop threads": torch.get_num_interop_threads(),
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "anomaly mode": torch.is_anomaly_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "matmul precision": torch.get_float32_matmul_precision(),
        "cudnn benchmark": torch.backends.cudnn.benchmark,
        "cudnn deterministic": torch.backends.cudnn.deterministic,
        "flash attention": torch.backends.cuda.flash_sdp_enabled(),
        "efficient attention": torch.backends.cuda.mem_efficient_sdp_enabled(),
        "math attention": torch.backends.cuda.math_sdp_enabled(),
        "timm fused attention": timm.layers.use_fused_attn(),
    }


@pytest.fixture(autouse=True)
def global_flags_stay() -> Iterator[None]:
    """No test, and so nothing that it calls, changes a global flag of torch."""
    before = _flags()
    yield
    after = _flags()
    assert after == before
