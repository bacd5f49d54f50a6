"""timm's plain Vision Transformers: ViT, DeiT (distilled or not), DeiT-3, DINOv2, CLIP and SigLIP towers.

A closed world: every module of a model must be one this file accounts for, or the model is refused with
the module's name. Rotary positions, windowed attention, gated MLPs and post-norm blocks are refused.
"""

from __future__ import annotations

from functools import partial
from typing import Any, TypeVar, cast

import timm.layers
import torch
from timm.layers import AttentionPoolLatent, LayerScale, Mlp, PatchDropout, PatchEmbed
from timm.models import deit, vision_transformer
from torch import Tensor, nn

from .. import layers
from ..errors import PlanError, UnsupportedModelError
from ..shape import BlockShape, Ranks, ViTShape
from . import Tensors

CLASSES = {
    "VisionTransformer": vision_transformer.VisionTransformer,
    "VisionTransformerDistilled": deit.VisionTransformerDistilled,
}
NORMS: dict[str, Any] = {"timm.LayerNorm": timm.layers.LayerNorm, "torch.LayerNorm": nn.LayerNorm}
ACTIVATIONS: dict[str, Any] = {
    "GELU": nn.GELU,
    "GELUTanh": timm.layers.GELUTanh,
    "QuickGELU": timm.layers.QuickGELU,
    "SiLU": nn.SiLU,
    "ReLU": nn.ReLU,
}
M = TypeVar("M", bound=nn.Module)
#: What `_architecture` stores and `skeleton` takes.
ARGUMENTS = frozenset(
    "img_size patch_size in_chans global_pool num_heads mlp_ratio qkv_bias qk_norm proj_bias init_values "  # noqa: SIM905
    "pos_embed no_embed_class class_token reg_tokens pre_norm final_norm fc_norm pool_include_prefix "
    "dynamic_img_size drop_rate pos_drop_rate proj_drop_rate attn_drop_rate drop_path_rate norm norm_eps "
    "act".split()
)
BLOCK_CHILDREN = ("norm1", "attn", "ls1", "drop_path1", "norm2", "mlp", "ls2", "drop_path2")
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


class TimmViT:
    """timm's `VisionTransformer` and its distilled variant."""

    name = "timm"

    def owns(self, model: nn.Module) -> bool:
        return type(model).__module__.startswith("timm.")

    # -- describing ------------------------------------------------------------------------------

    def describe(self, model: nn.Module) -> ViTShape:
        host = _supported(model)
        blocks: list[BlockShape] = []
        tokens = first = _num_tokens(host)
        stack = host.blocks if isinstance(host.blocks, layers.BlockStack) else None
        for i in range(len(host.blocks)):
            left = tokens if stack is None else stack.num_out(i, tokens)
            block = _block_shape(f"blocks.{i}", host.blocks[i], tokens, left)
            blocks.append(block)
            tokens = block.num_tokens_out
        head = host.blocks[0]
        outer = sum(p.numel() for n, p in model.named_parameters() if not n.startswith("blocks."))
        attn, mlp = head.attn, head.mlp
        return ViTShape(
            host=self.name,
            architecture=_architecture(host),
            name=str((getattr(host, "pretrained_cfg", None) or {}).get("architecture", "")),
            embed_dim=host.embed_dim,
            num_prefix_tokens=host.num_prefix_tokens,
            num_tokens=first,
            num_classes=host.num_classes,
            outer_params=outer,
            outer_macs=_outer_macs(host),
            block_params=_fixed_params(head),
            qkv_bias=_qkv_has_bias(attn),
            out_bias=attn.proj.bias is not None,
            mlp_bias=mlp.fc1.bias is not None,
            qk_norm=_norm_params_per_dim(attn),
            matching="ward" if stack is None else stack.matching,
            match_features=None if stack is None else stack.match_features,
            blocks=tuple(blocks),
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

    def resize(self, model: nn.Module, shape: ViTShape) -> None:
        host = cast(Any, model)
        for i, want in enumerate(shape.blocks):
            self.resize_block(host.blocks[i], shape, want)
        merges = any(b.num_tokens_out < b.num_tokens_in for b in shape.blocks)
        if merges and not isinstance(host.blocks, layers.BlockStack):
            _require_static_size(host)
            host.blocks = layers.BlockStack(
                [
                    layers.Block(
                        dict(b.named_children()),
                        s.num_tokens_in,
                        s.num_tokens_out,
                        shape.match_features,
                        s.fuses,
                    )
                    for b, s in zip(host.blocks, shape.blocks, strict=True)
                ],
                shape.num_prefix_tokens,
                shape.matching,
            )
        elif merges:
            host.blocks.matching = shape.matching
            for i in range(shape.depth):
                host.blocks[i].compare_by(shape.match_features)

    def resize_block(self, block: layers.Block, shape: ViTShape, want: BlockShape) -> None:
        part = cast(Any, block)
        have = _block_shape("block", block, want.num_tokens_in, want.num_tokens_out)
        if _attention_sizes(have) != _attention_sizes(want):
            part.attn = _new_attention(part.attn, shape, want)
        elif want.num_tokens_out < want.num_tokens_in and type(part.attn) is not layers.Attention:
            part.attn = _as_ours(part.attn, shape, want)
        if _mlp_sizes(have) != _mlp_sizes(want):
            _resize_mlp(part.mlp, shape, want)
        if isinstance(block, layers.Block):
            block.num_tokens_in, block.num_tokens_out = want.num_tokens_in, want.num_tokens_out
            block.fuses = want.fuses

    # -- weights ---------------------------------------------------------------------------------

    def read(self, block: layers.Block) -> Tensors:
        attn, mlp = cast(Any, block.attn), cast(Any, block.mlp)
        tensors: Tensors = {}
        sizes = _head_sizes(attn)
        heads = sizes[0]
        if getattr(attn, "qkv", None) is not None:
            weight, bias = _dense(attn.qkv)
            split = (heads * sizes[1], heads * sizes[1], heads * sizes[2])
            parts = list(zip("qkv", weight.split(split), strict=True))
            biases = dict(zip("qkv", bias.split(split), strict=True)) if bias is not None else {}
            features = getattr(attn.qkv, "features", None)
        else:
            both = {name: _dense(getattr(attn, name)) for name in "qkv"}
            parts = [(name, both[name][0]) for name in "qkv"]
            biases = {n: b for n, (_, b) in both.items() if b is not None}
            features = _features(attn.q)
        for name, weight in parts:
            tensors[f"{name}.weight"] = weight.unflatten(0, (heads, -1))
            if name in biases:
                tensors[f"{name}.bias"] = biases[name].unflatten(0, (heads, -1))
        out, out_bias = _dense(attn.proj)
        tensors["out.weight"] = out.unflatten(1, (heads, -1))
        fc1, fc1_bias = _dense(mlp.fc1)
        fc2, fc2_bias = _dense(mlp.fc2)
        tensors |= {"fc1.weight": fc1, "fc2.weight": fc2}
        for name, maybe in (("out.bias", out_bias), ("fc1.bias", fc1_bias), ("fc2.bias", fc2_bias)):
            if maybe is not None:
                tensors[name] = maybe
        for name, index_D in (("attn_features", features), ("mlp_features", _features(mlp.fc1))):
            if index_D is not None:
                tensors[name] = index_D
        return tensors

    def write(self, block: layers.Block, tensors: Tensors, ranks: Ranks) -> None:
        attn, mlp = cast(Any, block.attn), cast(Any, block.mlp)
        flat = {
            "q": tensors["q.weight"].flatten(0, 1),
            "k": tensors["k.weight"].flatten(0, 1),
            "v": tensors["v.weight"].flatten(0, 1),
        }
        biases = {n: tensors[f"{n}.bias"].flatten() for n in "qkv" if f"{n}.bias" in tensors}
        attn_features, mlp_features = tensors.get("attn_features"), tensors.get("mlp_features")
        if getattr(attn, "qkv", None) is not None:
            bias = torch.cat([biases[n] for n in "qkv"]) if biases else None
            _fill(attn.qkv, torch.cat([flat[n] for n in "qkv"]), bias, attn_features)
        else:
            for n in "qkv":
                _fill(getattr(attn, n), flat[n], biases.get(n), attn_features)
        _fill(attn.proj, tensors["out.weight"].flatten(1), tensors.get("out.bias"))
        _fill(mlp.fc1, tensors["fc1.weight"], tensors.get("fc1.bias"), mlp_features)
        _fill(mlp.fc2, tensors["fc2.weight"], tensors.get("fc2.bias"))

    # -- running ---------------------------------------------------------------------------------

    def block(self, model: nn.Module, index: int) -> layers.Block:
        block = cast(Any, model).blocks[index]
        if isinstance(block, layers.Block):
            return block
        tokens = _num_tokens(cast(Any, model))
        return layers.Block(dict(block.named_children()), tokens, tokens)

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
        raise _unsupported(
            "the model", model, f"only timm's {' and '.join(CLASSES)} are", "Choose such a model."
        )
    for name, child in model.named_children():
        if not isinstance(child, MODEL_CHILDREN.get(name, ())):
            raise _unsupported(f"'{name}'", child, "it is not part of a plain ViT")
    host = cast(Any, model)
    if not isinstance(host.patch_embed.norm, nn.Identity):
        raise _unsupported("'patch_embed.norm'", host.patch_embed.norm, "patch norms are not")
    pool = host.attn_pool
    if pool is not None and (pool.pos_embed is not None or not isinstance(pool.q, nn.Linear)):
        raise _unsupported("'attn_pool'", pool, "only plain latent attention pooling is")
    if type(host.patch_embed) is not PatchEmbed:
        raise _unsupported("'patch_embed'", host.patch_embed, "only the plain patch embedding is")
    return host


def _unsupported(where: str, module: nn.Module, why: str, fix: str = "") -> UnsupportedModelError:
    kind = f"{type(module).__module__}.{type(module).__name__}"
    fix = fix or "Choose a plain ViT (ViT, DeiT, DeiT-3, DINOv2, CLIP or SigLIP)."
    return UnsupportedModelError(f"Cannot account for {where} ({kind}): {why} supported.", fix)


def _require_static_size(model: Any) -> None:
    if model.dynamic_img_size or not isinstance(model.patch_drop, nn.Identity):
        raise UnsupportedModelError(
            "Token merging needs a fixed number of tokens, but the model was built with "
            "dynamic_img_size or patch dropout.",
            "Build it without these, or compress without the token dimension.",
        )


def _block_shape(
    where: str, block: nn.Module, num_tokens_in: int, num_tokens_out: int
) -> BlockShape:
    if type(block) not in (vision_transformer.Block, layers.Block):
        raise _unsupported(f"'{where}'", block, "only pre-norm blocks are")
    part = cast(Any, block)
    for name, child in block.named_children():
        if name not in BLOCK_CHILDREN:
            raise _unsupported(f"'{where}.{name}'", child, "it is not part of a plain block")
    for name in ("norm1", "norm2"):
        if type(getattr(part, name)) not in NORMS.values():
            raise _unsupported(f"'{where}.{name}'", getattr(part, name), "only LayerNorm is")
    for name in ("ls1", "ls2"):
        if not isinstance(getattr(part, name), nn.Identity | LayerScale):
            raise _unsupported(f"'{where}.{name}'", getattr(part, name), "only LayerScale is")
    attn, mlp = part.attn, part.mlp
    kinds = type(attn), type(mlp)
    if kinds[0] is vision_transformer.Attention:
        if attn.gate is not None or not isinstance(attn.norm, nn.Identity):
            raise _unsupported(f"'{where}.attn'", attn, "gated or normed attention outputs are not")
    elif kinds[0] is not layers.Attention:
        raise _unsupported(f"'{where}.attn'", attn, "only plain self-attention is")
    if kinds[1] is not Mlp or not isinstance(mlp.norm, nn.Identity):
        raise _unsupported(f"'{where}.mlp'", mlp, "only a plain two-layer MLP is")
    heads, qk, v = _head_sizes(attn)
    return BlockShape(
        num_heads=heads,
        qk_dim=qk,
        v_dim=v,
        mlp_dim=mlp.fc1.out_features,
        num_tokens_in=num_tokens_in,
        num_tokens_out=num_tokens_out,
        fuses=isinstance(block, layers.Block) and block.fuses and num_tokens_out < num_tokens_in,
        attn_features=_width(_features(attn.qkv if _fused(attn) else attn.q)),
        mlp_features=_width(_features(mlp.fc1)),
        ranks=Ranks(
            q=None if _fused(attn) else _rank(attn.q),
            k=None if _fused(attn) else _rank(attn.k),
            v=None if _fused(attn) else _rank(attn.v),
            out=_rank(attn.proj),
            fc1=_rank(mlp.fc1),
            fc2=_rank(mlp.fc2),
        ),
    )


def _num_tokens(model: Any) -> int:
    return cast(int, model.patch_embed.num_patches + model.num_prefix_tokens)


def _fused(attn: Any) -> bool:
    return getattr(attn, "qkv", None) is not None


def _head_sizes(attn: Any) -> tuple[int, int, int]:
    if isinstance(attn, layers.Attention):
        return attn.num_heads, attn.qk_dim, attn.v_dim
    return attn.num_heads, attn.head_dim, attn.head_dim


def _qkv_has_bias(attn: Any) -> bool:
    return (attn.qkv if _fused(attn) else attn.q).bias is not None


def _rank(projection: layers.Projection) -> int | None:
    return projection.rank if isinstance(projection, layers.LowRankLinear) else None


def _features(projection: layers.Projection) -> Tensor | None:
    first = projection.down if isinstance(projection, layers.LowRankLinear) else projection
    return first.features if isinstance(first, layers.GatheredLinear) else None


def _width(features: Tensor | None) -> int | None:
    return None if features is None else len(features)


def _attention_sizes(b: BlockShape) -> tuple[Any, ...]:
    ranks = (b.ranks.q, b.ranks.k, b.ranks.v, b.ranks.out)
    return (b.num_heads, b.qk_dim, b.v_dim, b.attn_features, ranks)


def _mlp_sizes(b: BlockShape) -> tuple[Any, ...]:
    return (b.mlp_dim, b.mlp_features, b.ranks.fc1, b.ranks.fc2)


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


def _fixed_params(block: Any) -> int:
    parts = (block.norm1, block.norm2, block.ls1, block.ls2)
    return sum(p.numel() for part in parts for p in part.parameters())


def _norm_params_per_dim(attn: Any) -> int:
    total = sum(p.numel() for p in attn.q_norm.parameters())
    return int(total // _head_sizes(attn)[1])


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
        "qkv_bias": _qkv_has_bias(block.attn),
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
        "norm": _key_of(NORMS, norm, "blocks.0.norm1"),
        "norm_eps": norm.eps,
        "act": _key_of(ACTIVATIONS, block.mlp.act, "blocks.0.mlp.act"),
    }
    return {"class": type(model).__name__, "kwargs": kwargs}


def _key_of(table: dict[str, Any], module: nn.Module, where: str) -> str:
    for name, kind in table.items():
        if type(module) is kind:
            return name
    raise _unsupported(f"'{where}'", module, f"only {', '.join(table)} are")


# -- modules of new sizes ------------------------------------------------------------------------


def _new_attention(old: Any, shape: ViTShape, want: BlockShape) -> layers.Attention:
    weight = _dense(old.proj)[0]
    with torch.device("meta"):
        new = layers.Attention(
            shape.embed_dim,
            num_heads=want.num_heads,
            qk_dim=want.qk_dim,
            v_dim=want.v_dim,
            scale=old.scale,
            qkv_bias=shape.qkv_bias,
            out_bias=shape.out_bias,
            in_features=want.attn_features,
            ranks=want.ranks,
            attn_drop=old.attn_drop.p,
            proj_drop=old.proj_drop.p,
        )
    new = _materialise(new, weight)
    new.q_norm, new.k_norm = old.q_norm, old.k_norm
    return new.train(old.training)


def _as_ours(old: Any, shape: ViTShape, want: BlockShape) -> layers.Attention:
    """The same attention with the same projections, in the class that merging can ask for its weights."""
    new = _new_attention(old, shape, want)
    new.qkv, new.proj = old.qkv, old.proj
    return new


def _resize_mlp(mlp: Any, shape: ViTShape, want: BlockShape) -> None:
    weight = _dense(mlp.fc2)[0]
    gathered = want.mlp_features is not None
    fan_in = want.mlp_features or shape.embed_dim
    bias, ranks = shape.mlp_bias, want.ranks
    with torch.device("meta"):
        fc1 = layers.linear(fan_in, want.mlp_dim, bias=bias, rank=ranks.fc1, gathered=gathered)
        fc2 = layers.linear(want.mlp_dim, shape.embed_dim, bias=bias, rank=ranks.fc2)
    mlp.fc1 = _materialise(fc1, weight).train(mlp.training)
    mlp.fc2 = _materialise(fc2, weight).train(mlp.training)


def _materialise(module: M, like: Tensor) -> M:
    """Uninitialised storage of `like`'s device and dtype; building on meta leaves the RNG alone."""
    return module.to_empty(device=like.device).to(like.dtype)


def _dense(projection: layers.Projection) -> tuple[Tensor, Tensor | None]:
    """Weight (factors multiplied out) and bias, detached."""
    bias = projection.bias.detach() if projection.bias is not None else None
    if isinstance(projection, layers.LowRankLinear):
        return (projection.up.weight @ projection.down.weight).detach(), bias
    return projection.weight.detach(), bias


@torch.no_grad()
def _fill(
    projection: layers.Projection,
    weight: Tensor,
    bias: Tensor | None,
    features: Tensor | None = None,
) -> None:
    if isinstance(projection, layers.LowRankLinear):
        left, values, right = torch.linalg.svd(weight.double(), full_matrices=False)
        root, rank = values.sqrt(), projection.rank
        projection.up.weight.copy_(left[:, :rank] * root[:rank])
        projection.down.weight.copy_(root[:rank, None] * right[:rank])
    else:
        projection.weight.copy_(weight)
    if bias is not None and projection.bias is not None:
        projection.bias.copy_(bias)
    index = _features(projection)
    if index is not None and features is not None:
        index.copy_(features)
