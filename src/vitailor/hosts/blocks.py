"""Blocks that are timm's plain pre-norm ones, or ours in their place: what all hosts with such blocks share.

A closed world: every module of a block must be one this file accounts for, or it is refused by name.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, TypeVar, cast

import timm.layers
import torch
from timm.layers import LayerScale, Mlp
from timm.models import vision_transformer
from torch import Tensor, nn

from .. import layers
from ..errors import UnsupportedModelError
from ..linalg import balanced
from ..shape import BlockShape, Ranks, ViTShape
from . import Tensors

NORMS: dict[str, Any] = {"timm.LayerNorm": timm.layers.LayerNorm, "torch.LayerNorm": nn.LayerNorm}
ACTIVATIONS: dict[str, Any] = {
    "GELU": nn.GELU,
    "GELUTanh": timm.layers.GELUTanh,
    "QuickGELU": timm.layers.QuickGELU,
    "SiLU": nn.SiLU,
    "ReLU": nn.ReLU,
}
M = TypeVar("M", bound=nn.Module)
#: `up` and `down` of a projection; None for those nearest to its weight.
Factors = tuple[Tensor | None, Tensor | None]
BLOCK_CHILDREN = ("norm1", "attn", "ls1", "drop_path1", "norm2", "mlp", "ls2", "drop_path2")


class BlockHost(ABC):
    """The part of a host that is about blocks, for models that keep them in `blocks`."""

    name: str

    @abstractmethod
    def num_tokens(self, model: nn.Module) -> int:
        """Tokens entering the first block, prefix included."""

    @abstractmethod
    def require_static_size(self, model: nn.Module) -> None:
        """Refuse a model whose number of tokens may change from one image to the next."""

    def blocks(self, model: nn.Module) -> tuple[BlockShape, ...]:
        """Sizes of the blocks, every part of which is accounted for."""
        host = cast(Any, model)
        blocks: list[BlockShape] = []
        tokens = self.num_tokens(model)
        stack = host.blocks if isinstance(host.blocks, layers.BlockStack) else None
        for i in range(len(host.blocks)):
            left = tokens if stack is None else stack.num_out(i, tokens)
            block = _block_shape(f"blocks.{i}", host.blocks[i], tokens, left)
            blocks.append(block)
            tokens = block.num_tokens_out
        return tuple(blocks)

    def shape(
        self,
        model: nn.Module,
        blocks: tuple[BlockShape, ...],
        *,
        architecture: dict[str, Any],
        outer_macs: int,
        pools_prefix: bool,
    ) -> ViTShape:
        """Shape of a model of which everything is accounted for."""
        host = cast(Any, model)
        stack = host.blocks if isinstance(host.blocks, layers.BlockStack) else None
        head = host.blocks[0]
        outer = sum(p.numel() for n, p in model.named_parameters() if not n.startswith("blocks."))
        attn, mlp = head.attn, head.mlp
        return ViTShape(
            host=self.name,
            architecture=architecture,
            name=str((getattr(host, "pretrained_cfg", None) or {}).get("architecture", "")),
            embed_dim=host.embed_dim,
            num_prefix_tokens=host.num_prefix_tokens,
            num_tokens=self.num_tokens(model),
            num_classes=_num_classes(host),
            outer_params=outer,
            outer_macs=outer_macs,
            block_params=_fixed_params(head),
            qkv_bias=qkv_has_bias(attn),
            out_bias=attn.proj.bias is not None,
            mlp_bias=mlp.fc1.bias is not None,
            pools_prefix=pools_prefix,
            qk_norm=_norm_params_per_dim(attn),
            matching="ward" if stack is None else stack.matching,
            match_features=None if stack is None else stack.match_features,
            weighs_tokens=stack is not None and stack.weighs_tokens,
            blocks=blocks,
        )

    # -- sizes -----------------------------------------------------------------------------------

    def resize(self, model: nn.Module, shape: ViTShape) -> None:
        host = cast(Any, model)
        for i, want in enumerate(shape.blocks):
            self.resize_block(host.blocks[i], shape, want)
        merges = any(b.num_tokens_out < b.num_tokens_in for b in shape.blocks)
        if merges and not isinstance(host.blocks, layers.BlockStack):
            self.require_static_size(model)
            host.blocks = layers.BlockStack(
                [
                    layers.Block(
                        dict(b.named_children()),
                        s.num_tokens_in,
                        s.num_tokens_out,
                        fuses=s.fuses,
                    )
                    for b, s in zip(host.blocks, shape.blocks, strict=True)
                ],
                shape.num_prefix_tokens,
                shape.matching,
                shape.pools_prefix,
            )
        elif merges:
            host.blocks.matching = shape.matching
        for i in range(shape.depth if merges else 0):
            host.blocks[i].compare_by(shape.match_features)
            host.blocks[i].weigh(shape.num_tokens if shape.weighs_tokens else None)

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

    def block(self, model: nn.Module, index: int) -> layers.Block:
        block = cast(Any, model).blocks[index]
        if isinstance(block, layers.Block):
            return block
        tokens = self.num_tokens(model)
        return layers.Block(dict(block.named_children()), tokens, tokens)

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

        def factors(name: str) -> Factors:
            return tensors.get(f"{name}.up"), tensors.get(f"{name}.down")

        if getattr(attn, "qkv", None) is not None:
            bias = torch.cat([biases[n] for n in "qkv"]) if biases else None
            weight = torch.cat([flat[n] for n in "qkv"])
            _fill(attn.qkv, weight, bias, features=attn_features)
        else:
            for n in "qkv":
                _fill(getattr(attn, n), flat[n], biases.get(n), factors(n), attn_features)
        _fill(attn.proj, tensors["out.weight"].flatten(1), tensors.get("out.bias"), factors("out"))
        _fill(
            mlp.fc1,
            tensors["fc1.weight"],
            tensors.get("fc1.bias"),
            factors("fc1"),
            mlp_features,
        )
        _fill(mlp.fc2, tensors["fc2.weight"], tensors.get("fc2.bias"), factors("fc2"))


# -- what is supported ---------------------------------------------------------------------------


def unsupported(where: str, module: nn.Module, why: str, fix: str = "") -> UnsupportedModelError:
    kind = f"{type(module).__module__}.{type(module).__name__}"
    fix = fix or "Choose a plain ViT (ViT, DeiT, DeiT-3, DINOv2, CLIP or SigLIP)."
    return UnsupportedModelError(f"Cannot account for {where} ({kind}): {why} supported.", fix)


def _block_shape(
    where: str, block: nn.Module, num_tokens_in: int, num_tokens_out: int
) -> BlockShape:
    if type(block) not in (vision_transformer.Block, layers.Block):
        raise unsupported(f"'{where}'", block, "only pre-norm blocks are")
    part = cast(Any, block)
    for name, child in block.named_children():
        if name not in BLOCK_CHILDREN:
            raise unsupported(f"'{where}.{name}'", child, "it is not part of a plain block")
    for name in ("norm1", "norm2"):
        if type(getattr(part, name)) not in NORMS.values():
            raise unsupported(f"'{where}.{name}'", getattr(part, name), "only LayerNorm is")
    for name in ("ls1", "ls2"):
        if not isinstance(getattr(part, name), nn.Identity | LayerScale):
            raise unsupported(f"'{where}.{name}'", getattr(part, name), "only LayerScale is")
    attn, mlp = part.attn, part.mlp
    kinds = type(attn), type(mlp)
    if kinds[0] is vision_transformer.Attention:
        if attn.gate is not None or not isinstance(attn.norm, nn.Identity):
            raise unsupported(f"'{where}.attn'", attn, "gated or normed attention outputs are not")
    elif kinds[0] is not layers.Attention:
        raise unsupported(f"'{where}.attn'", attn, "only plain self-attention is")
    if kinds[1] is not Mlp or not isinstance(mlp.norm, nn.Identity):
        raise unsupported(f"'{where}.mlp'", mlp, "only a plain two-layer MLP is")
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


def key_of(table: dict[str, Any], module: nn.Module, where: str) -> str:
    for name, kind in table.items():
        if type(module) is kind:
            return name
    raise unsupported(f"'{where}'", module, f"only {', '.join(table)} are")


# -- sizes of a block ----------------------------------------------------------------------------


def _fused(attn: Any) -> bool:
    return getattr(attn, "qkv", None) is not None


def _head_sizes(attn: Any) -> tuple[int, int, int]:
    if isinstance(attn, layers.Attention):
        return attn.num_heads, attn.qk_dim, attn.v_dim
    return attn.num_heads, attn.head_dim, attn.head_dim


def qkv_has_bias(attn: Any) -> bool:
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


def _num_classes(host: Any) -> int:
    """What the head tells, which may have been put in another's place."""
    return host.head.out_features if isinstance(host.head, nn.Linear) else 0


def _fixed_params(block: Any) -> int:
    parts = (block.norm1, block.norm2, block.ls1, block.ls2)
    return sum(p.numel() for part in parts for p in part.parameters())


def _norm_params_per_dim(attn: Any) -> int:
    total = sum(p.numel() for p in attn.q_norm.parameters())
    return int(total // _head_sizes(attn)[1])


# -- modules of new sizes ------------------------------------------------------------------------


def _new_attention(old: Any, shape: ViTShape, want: BlockShape) -> layers.Attention:
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
    new = _materialise(new, old.proj)
    new.q_norm, new.k_norm = old.q_norm, old.k_norm
    return new.train(old.training)


def _as_ours(old: Any, shape: ViTShape, want: BlockShape) -> layers.Attention:
    """The same attention with the same projections, in the class that merging can ask for its weights."""
    new = _new_attention(old, shape, want)
    new.qkv, new.proj = old.qkv, old.proj
    return new


def _resize_mlp(mlp: Any, shape: ViTShape, want: BlockShape) -> None:
    gathered = want.mlp_features is not None
    fan_in = want.mlp_features or shape.embed_dim
    bias, ranks = shape.mlp_bias, want.ranks
    with torch.device("meta"):
        fc1 = layers.linear(fan_in, want.mlp_dim, bias=bias, rank=ranks.fc1, gathered=gathered)
        fc2 = layers.linear(want.mlp_dim, shape.embed_dim, bias=bias, rank=ranks.fc2)
    mlp.fc1 = _materialise(fc1, mlp.fc1).train(mlp.training)
    mlp.fc2 = _materialise(fc2, mlp.fc2).train(mlp.training)


def _materialise(module: M, like: nn.Module) -> M:
    """Uninitialised storage of the device and dtype of another module, and frozen if that is; building on meta leaves
    the RNG alone."""
    first = next(like.parameters())
    trained = any(p.requires_grad for p in like.parameters())
    return module.to_empty(device=first.device).to(first.dtype).requires_grad_(trained)


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
    factors: Factors = (None, None),
    features: Tensor | None = None,
) -> None:
    if isinstance(projection, layers.LowRankLinear):
        up, down = factors
        if up is None or down is None:
            left, values, right = torch.linalg.svd(weight.double(), full_matrices=False)
            rank = projection.rank
            up, down = balanced(left[:, :rank], values[:rank, None] * right[:rank])
        projection.up.weight.copy_(up)
        projection.down.weight.copy_(down)
    else:
        projection.weight.copy_(weight)
    if bias is not None and projection.bias is not None:
        projection.bias.copy_(bias)
    index = _features(projection)
    if index is not None and features is not None:
        index.copy_(features)
