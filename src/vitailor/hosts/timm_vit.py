"""timm's plain Vision Transformers: ViT, DeiT (distilled or not), DeiT-3, DINOv2, CLIP and SigLIP towers.

A closed world: every module of a model must be one this file accounts for, or the model is refused with
the module's name. Rotary positions, windowed attention, gated MLPs and post-norm blocks are refused.
"""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch
from timm.layers import AttentionPoolLatent, LayerScale, PatchDropout, PatchEmbed
from timm.models import deit, vision_transformer
from torch import Tensor, nn

from .. import layers
from ..errors import PlanError, UnsupportedModelError
from ..shape import ViTShape
from .blocks import ACTIVATIONS, NORMS, BlockHost, key_of, qkv_has_bias, unsupported

CLASSES = {
    "VisionTransformer": vision_transformer.VisionTransformer,
    "VisionTransformerDistilled": deit.VisionTransformerDistilled,
}
#: What `_architecture` stores and `skeleton` takes.
ARGUMENTS = frozenset(
    "img_size patch_size in_chans global_pool num_heads mlp_ratio qkv_bias qk_norm proj_bias init_values "  # noqa: SIM905
    "pos_embed no_embed_class class_token reg_tokens pre_norm final_norm fc_norm pool_include_prefix "
    "dynamic_img_size drop_rate pos_drop_rate proj_drop_rate attn_drop_rate drop_path_rate norm norm_eps "
    "act".split()
)
MODEL_CHILDREN: dict[str, tuple[type[nn.Module], ...]] = {
    "patch_embed": (PatchEmbed,),
    "pos_drop": (nn.Dropout,),
    "patch_drop": (nn.Identity, PatchDropout),
    "norm_pre": (nn.Identity, *NORMS.values()),
    "blocks": (nn.Sequential, layers.BlockStack),
    "norm": (nn.Identity, *NORMS.values()),
    "attn_pool": (AttentionPoolLatent,),
    "fc_norm": (nn.Identity, *NORMS.values()),
    "head_drop": (nn.Dropout,),
    "head": (nn.Linear, nn.Identity),
    "head_dist": (nn.Linear, nn.Identity),
}


class TimmViT(BlockHost):
    """timm's `VisionTransformer` and its distilled variant."""

    name = "timm"

    def owns(self, model: nn.Module) -> bool:
        return type(model).__module__.startswith("timm.")

    # -- describing ------------------------------------------------------------------------------

    def describe(self, model: nn.Module) -> ViTShape:
        host = _supported(model)
        blocks = self.blocks(model)  # first, since the architecture is read off them
        return self.shape(
            model,
            blocks,
            architecture=_architecture(host),
            outer_macs=_outer_macs(host),
            pools_prefix=host.global_pool == "token" and host.attn_pool is None,
        )

    def num_tokens(self, model: nn.Module) -> int:
        host = cast(Any, model)
        return cast(int, host.patch_embed.num_patches + host.num_prefix_tokens)

    def require_static_size(self, model: nn.Module) -> None:
        host = cast(Any, model)
        if host.dynamic_img_size or not isinstance(host.patch_drop, nn.Identity):
            raise UnsupportedModelError(
                "Token merging needs a fixed number of tokens, but the model was built with "
                "dynamic_img_size or patch dropout.",
                "Build it without these, or compress without the token dimension.",
            )

    # -- building --------------------------------------------------------------------------------

    def skeleton(self, shape: ViTShape) -> nn.Module:
        kind, kwargs = shape.architecture.get("class"), dict(shape.architecture.get("kwargs", {}))
        if kind not in CLASSES:
            raise PlanError(f"Unknown timm class '{kind}'.", f"Known: {', '.join(CLASSES)}.")
        unknown = kwargs.keys() - ARGUMENTS
        if unknown:  # "device", say, would allocate what is only to be described
            raise PlanError(f"Unknown argument '{min(unknown)}' of {kind}.", "Upgrade vitailor.")
        norm, act = kwargs.pop("norm", None), kwargs.pop("act", None)
        if norm not in NORMS or act not in ACTIVATIONS:
            raise PlanError(f"Unknown norm '{norm}' or activation '{act}'.", "Upgrade vitailor.")
        eps = kwargs.pop("norm_eps", 1e-6)
        try:
            with torch.device("meta"):
                model: nn.Module = CLASSES[kind](
                    **kwargs,
                    depth=shape.depth,
                    embed_dim=shape.embed_dim,
                    num_classes=shape.num_classes,
                    norm_layer=partial(NORMS[norm], eps=eps),
                    act_layer=ACTIVATIONS[act],
                )
        except (TypeError, ValueError, AssertionError, RuntimeError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise PlanError(
                f"timm cannot build {kind} from the stored arguments: {reason}",
                "The artifact is damaged or from a newer version.",
            ) from error
        self.resize(model, shape)
        return model

    # -- running ---------------------------------------------------------------------------------

    def embed(self, model: nn.Module, images: Tensor) -> Tensor:
        host = cast(Any, model)
        x = host._pos_embed(host.patch_embed(images))
        return cast(Tensor, host.norm_pre(host.patch_drop(x)))

    def finish(self, model: nn.Module, x: Tensor) -> Tensor:
        host = cast(Any, model)
        return cast(Tensor, host.forward_head(host.norm(x)))

    def shift_outputs(self, model: nn.Module, shift: Tensor) -> None:
        for name in ("head", "head_dist"):  # their logits are averaged
            head = getattr(model, name, None)
            if isinstance(head, nn.Linear) and head.bias is not None:
                head.bias.data += shift.to(head.bias)


# -- what is supported ---------------------------------------------------------------------------


def _supported(model: nn.Module) -> Any:
    """The model, if every part of it is accounted for."""
    if type(model) not in CLASSES.values():
        raise unsupported(
            "the model", model, f"only timm's {' and '.join(CLASSES)} are", "Choose such a model."
        )
    for name, child in model.named_children():
        if not isinstance(child, MODEL_CHILDREN.get(name, ())):
            raise unsupported(f"'{name}'", child, "it is not part of a plain ViT")
    host = cast(Any, model)
    if not isinstance(host.patch_embed.norm, nn.Identity):
        raise unsupported("'patch_embed.norm'", host.patch_embed.norm, "patch norms are not")
    pool = host.attn_pool
    if pool is not None and (pool.pos_embed is not None or not isinstance(pool.q, nn.Linear)):
        raise unsupported("'attn_pool'", pool, "only plain latent attention pooling is")
    if type(host.patch_embed) is not PatchEmbed:
        raise unsupported("'patch_embed'", host.patch_embed, "only the plain patch embedding is")
    return host


# -- costs outside the blocks --------------------------------------------------------------------


def _outer_macs(model: Any) -> int:
    embed = model.patch_embed
    dim, patches = model.embed_dim, embed.num_patches
    macs = embed.proj.weight.numel() * patches
    for name in ("head", "head_dist"):
        head = getattr(model, name, None)
        macs += head.weight.numel() if isinstance(head, nn.Linear) else 0
    pool = model.attn_pool
    if pool is not None:
        seen = patches + (model.num_prefix_tokens if model.pool_include_prefix else 0)
        latents = pool.latent_len
        macs += latents * (pool.q.weight.numel() + pool.proj.weight.numel())
        macs += seen * pool.kv.weight.numel() + 2 * latents * seen * dim
        macs += latents * (pool.mlp.fc1.weight.numel() + pool.mlp.fc2.weight.numel())
    return int(macs)


# -- architecture as data ------------------------------------------------------------------------


def _architecture(model: Any) -> dict[str, Any]:
    """Class and keyword arguments from which `skeleton` rebuilds everything but the blocks' sizes."""
    block, pool, embed = model.blocks[0], model.attn_pool, model.patch_embed
    # Heads of the dense model, told by the softmax scale, which surgery keeps.
    heads = round(model.embed_dim * block.attn.scale**2)
    ratio = pool.mlp.fc1.out_features / model.embed_dim if pool is not None else 1.0
    positions = model.pos_embed
    last = model.blocks[len(model.blocks) - 1]
    norm = block.norm1
    kwargs = {
        "img_size": list(embed.img_size),
        "patch_size": list(embed.patch_size),
        "in_chans": embed.proj.in_channels,
        "global_pool": model.global_pool,
        "num_heads": heads,
        "mlp_ratio": ratio,
        "qkv_bias": qkv_has_bias(block.attn),
        "qk_norm": not isinstance(block.attn.q_norm, nn.Identity),
        "proj_bias": block.attn.proj.bias is not None,
        "init_values": 1e-5 if isinstance(block.ls1, LayerScale) else None,
        "pos_embed": "none" if positions is None else "learn",
        "no_embed_class": bool(model.no_embed_class),
        "class_token": bool(model.has_class_token),
        "reg_tokens": int(model.num_reg_tokens),
        "pre_norm": not isinstance(model.norm_pre, nn.Identity),
        "final_norm": not (
            isinstance(model.norm, nn.Identity) and isinstance(model.fc_norm, nn.Identity)
        ),
        "fc_norm": not isinstance(model.fc_norm, nn.Identity),
        "pool_include_prefix": bool(model.pool_include_prefix),
        "dynamic_img_size": bool(model.dynamic_img_size),
        "drop_rate": model.head_drop.p,
        "pos_drop_rate": model.pos_drop.p,
        "proj_drop_rate": block.attn.proj_drop.p,
        "attn_drop_rate": block.attn.attn_drop.p,
        "drop_path_rate": float(getattr(last.drop_path1, "drop_prob", 0.0) or 0.0),
        "norm": key_of(NORMS, norm, "blocks.0.norm1"),
        "norm_eps": norm.eps,
        "act": key_of(ACTIVATIONS, block.mlp.act, "blocks.0.mlp.act"),
    }
    return {"class": type(model).__name__, "kwargs": kwargs}
