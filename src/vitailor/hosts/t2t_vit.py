"""Tokens-to-Token ViT, in our own implementation (`vitailor.t2t`). The tokens-to-token stage stays dense.

A closed world: every module outside the blocks must be the one that the stored arguments build again.
"""

from __future__ import annotations

from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn

from .. import layers
from ..errors import PlanError, UsageError
from ..shape import ViTShape
from ..t2t import T2TViT, TokenPerformer, TokensToToken
from .blocks import BlockHost, qkv_has_bias, unsupported

#: What `_architecture` stores and `skeleton` takes.
ARGUMENTS = frozenset(
    (
        "img_size",
        "in_chans",
        "num_heads",
        "qkv_bias",
        "drop_rate",
        "attn_drop_rate",
        "drop_path_rate",
        "token_drop_rate",
    )
)
MODEL_CHILDREN: dict[str, tuple[type[nn.Module], ...]] = {
    "tokens_to_token": (TokensToToken,),
    "pos_drop": (nn.Dropout,),
    "blocks": (nn.Sequential, layers.BlockStack),
    "norm": (nn.LayerNorm,),
    "head": (nn.Linear, nn.Identity),
}
FIX = "Choose a model that vitailor.t2t builds."


class T2T(BlockHost):
    """Our `T2TViT`."""

    name = "t2t"

    def owns(self, model: nn.Module) -> bool:
        return isinstance(model, T2TViT)

    # -- describing ------------------------------------------------------------------------------

    def describe(self, model: nn.Module) -> ViTShape:
        host = _supported(model)
        blocks = self.blocks(model)
        for i in range(len(blocks)):
            _check_block(f"blocks.{i}", host.blocks[i])
        return self.shape(
            model,
            blocks,
            architecture=_architecture(host),
            outer_macs=_outer_macs(host),
            pools_prefix=True,
        )

    def num_tokens(self, model: nn.Module) -> int:
        host = cast(T2TViT, model)
        return host.num_patches + host.num_prefix_tokens

    def require_static_size(self, model: nn.Module) -> None:
        """It always is: positions are for one number of tokens."""

    # -- building --------------------------------------------------------------------------------

    def skeleton(self, shape: ViTShape) -> nn.Module:
        kind, kwargs = shape.architecture.get("class"), shape.architecture.get("kwargs", {})
        if kind != T2TViT.__name__:
            raise PlanError(f"Unknown T2T-ViT class '{kind}'.", f"Known: {T2TViT.__name__}.")
        unknown = kwargs.keys() - ARGUMENTS
        if unknown:
            raise PlanError(f"Unknown argument '{min(unknown)}' of {kind}.", "Upgrade vitailor.")
        try:
            with torch.device("meta"):
                model = T2TViT(
                    **kwargs,
                    depth=shape.depth,
                    embed_dim=shape.embed_dim,
                    num_classes=shape.num_classes,
                    mlp_ratio=1.0,  # the blocks get their sizes below
                )
        except (TypeError, ValueError, AssertionError, RuntimeError, UsageError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise PlanError(
                f"{kind} cannot be built from the stored arguments: {reason}",
                "The artifact is damaged or from a newer version.",
            ) from error
        self.resize(model, shape)
        return model

    # -- running ---------------------------------------------------------------------------------

    def embed(self, model: nn.Module, images: Tensor) -> Tensor:
        return cast(T2TViT, model).embed(images)

    def finish(self, model: nn.Module, x: Tensor) -> Tensor:
        host = cast(T2TViT, model)
        return host.forward_head(host.norm(x))

    def shift_outputs(self, model: nn.Module, shift: Tensor) -> None:
        head = cast(T2TViT, model).head
        if isinstance(head, nn.Linear) and head.bias is not None:
            head.bias.data += shift.to(head.bias)


# -- what is supported ---------------------------------------------------------------------------


def _supported(model: nn.Module) -> Any:
    """The model, if every part of it outside the blocks is accounted for."""
    if type(model) is not T2TViT:
        raise unsupported("the model", model, "only plain T2TViT is", FIX)
    for name, child in model.named_children():
        if not isinstance(child, MODEL_CHILDREN.get(name, ())):
            raise unsupported(f"'{name}'", child, "it is not part of a T2T-ViT", FIX)
    _check_norm("norm", model.norm)
    stage, drop = model.tokens_to_token, model.token_drop_rate
    expected = _stage(model.in_chans, model.embed_dim, drop)
    for name, module in stage.named_modules():
        if expected.get(name) != _signature(module):
            raise unsupported(
                f"'tokens_to_token.{name}'", module, "only the stage as it is published is", FIX
            )
    if len(expected) > sum(1 for _ in stage.named_modules()):
        raise unsupported("'tokens_to_token'", stage, "only the whole stage is", FIX)
    return model


@cache
def _stage(in_chans: int, embed_dim: int, drop: float) -> dict[str, tuple[Any, ...]]:
    with torch.device("meta"):
        stage = TokensToToken(in_chans, embed_dim, drop)
    return {name: _signature(module) for name, module in stage.named_modules()}


def _signature(module: nn.Module) -> tuple[Any, ...]:
    """What tells one module from another but for its values and children."""
    own = {name: tuple(p.shape) for name, p in module.named_parameters(recurse=False)}
    return type(module), module.extra_repr(), own


def _check_block(where: str, block: Any) -> None:
    """Refuse what timm's blocks may be, but not those of T2T-ViT."""
    for name in ("norm1", "norm2"):
        _check_norm(f"{where}.{name}", getattr(block, name))
    plain = {"ls1": nn.Identity, "ls2": nn.Identity, "attn.q_norm": nn.Identity, "mlp.act": nn.GELU}
    for name, kind in plain.items():
        module = block.get_submodule(name)
        if type(module) is not kind:
            raise unsupported(f"'{where}.{name}'", module, f"only {kind.__name__} is", FIX)


def _check_norm(where: str, norm: nn.Module) -> None:
    if type(norm) is not nn.LayerNorm or norm.eps != 1e-5:
        raise unsupported(f"'{where}'", norm, "only LayerNorm with eps 1e-5 is", FIX)


# -- costs outside the blocks --------------------------------------------------------------------


def _outer_macs(model: T2TViT) -> int:
    stage, patches = model.tokens_to_token, model.num_patches
    # The first split leaves 16 times, the second 4 times as many tokens as the last.
    macs = 16 * patches * _performer_macs(stage.attention1)
    macs += 4 * patches * _performer_macs(stage.attention2)
    macs += patches * stage.project.weight.numel()
    return macs + (model.head.weight.numel() if isinstance(model.head, nn.Linear) else 0)


def _performer_macs(layer: TokenPerformer) -> int:
    """MACs for each token; linear in their number."""
    linears = sum(m.weight.numel() for m in layer.modules() if isinstance(m, nn.Linear))
    # Random features of keys and queries, keys by values, queries by both; and queries by summed keys.
    return linears + 4 * layer.w.numel() + layer.w.shape[0]


# -- architecture as data ------------------------------------------------------------------------


def _architecture(model: Any) -> dict[str, Any]:
    """Class and keyword arguments from which `skeleton` rebuilds everything but the blocks' sizes."""
    attn, last = model.blocks[0].attn, model.blocks[len(model.blocks) - 1]
    kwargs = {
        "img_size": list(model.image_size),
        "in_chans": model.in_chans,
        # Heads of the dense model, told by the softmax scale, which surgery keeps.
        "num_heads": round(model.embed_dim * attn.scale**2),
        "qkv_bias": qkv_has_bias(attn),
        "drop_rate": model.pos_drop.p,
        "attn_drop_rate": attn.attn_drop.p,
        "drop_path_rate": float(getattr(last.drop_path1, "drop_prob", 0.0) or 0.0),
        "token_drop_rate": model.token_drop_rate,
    }
    return {"class": type(model).__name__, "kwargs": kwargs}
