"""Tokens-to-Token ViT (arXiv 2101.11986), with the parameter names of the released checkpoints.

Three overlapping soft splits, with Performer layers in between, turn the image into tokens; plain pre-norm
blocks follow. Only the blocks are compressed, so they are timm's, whose parameters have the same names.

Shape suffixes: B batch, C channels, H, W sides of a map of tokens, N tokens, D embed_dim, I features of a
split, E features of a Performer, M its random features.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from timm.models import checkpoint_seq
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from .errors import UsageError

#: Pixels of the image to a token of the backbone; the splits take a quarter, a half and a half.
STRIDE = 16
#: Features of the Performers, and how many random features they use for each.
TOKEN_DIM, KERNEL_RATIO = 64, 0.5
#: What the denominator of linear attention is kept above zero by.
EPSILON = 1e-8
VARIANTS: dict[str, dict[str, Any]] = {
    "t2t_vit_7": {"embed_dim": 256, "depth": 7, "num_heads": 4, "mlp_ratio": 2.0},
    "t2t_vit_14": {"embed_dim": 384, "depth": 14, "num_heads": 6, "mlp_ratio": 3.0},
    "t2t_vit_19": {"embed_dim": 448, "depth": 19, "num_heads": 7, "mlp_ratio": 3.0},
}


class TokenPerformer(nn.Module):
    """Attention in linear time by positive random features, and an MLP.

    Both are residual around their own output: the input, of another width, takes no part in the sum.

    Args:
        in_features: I.
        drop: dropout probability.

    The parameter `w` (M, E) holds the directions of the random features. It is stored but never trained.
    """

    def __init__(self, in_features: int, drop: float) -> None:
        super().__init__()
        dim, num_random = TOKEN_DIM, int(TOKEN_DIM * KERNEL_RATIO)
        self.kqv = nn.Linear(in_features, 3 * dim)
        self.dp = nn.Dropout(drop)
        self.proj = nn.Linear(dim, dim)
        self.norm1 = nn.LayerNorm(in_features)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(
            nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim), nn.Dropout(drop)
        )
        w_ME = nn.init.orthogonal_(torch.empty(num_random, dim)) * num_random**0.5
        self.w = nn.Parameter(w_ME, requires_grad=False)

    def features(self, x_BNE: Tensor) -> Tensor:
        """Positive random features (B, N, M) of the softmax kernel."""
        w_ME = self.w.to(x_BNE.dtype)
        logits_BNM = x_BNE @ w_ME.T - x_BNE.square().sum(-1, keepdim=True) / 2
        features_BNM: Tensor = logits_BNM.exp() / len(w_ME) ** 0.5
        return features_BNM

    def attend(self, x_BNI: Tensor) -> Tensor:
        k, q, v_BNE = self.kqv(self.norm1(x_BNI)).chunk(3, dim=-1)
        # Sums of exponentials over thousands of tokens leave the range of half precision.
        wide = torch.promote_types(v_BNE.dtype, torch.float32)
        with _without_autocast(v_BNE.device.type):
            k_BNM, q_BNM = self.features(k.to(wide)), self.features(q.to(wide))
            mixed_BME = k_BNM.transpose(1, 2) @ v_BNE.to(wide)
            total_BN1 = q_BNM @ k_BNM.sum(1).unsqueeze(2)
            y_BNE = (q_BNM @ mixed_BME) / (total_BN1 + EPSILON)
        out: Tensor = v_BNE + self.dp(self.proj(y_BNE.to(v_BNE.dtype)))
        return out

    def forward(self, x_BNI: Tensor) -> Tensor:
        x_BNE = self.attend(x_BNI)
        out: Tensor = x_BNE + self.mlp(self.norm2(x_BNE))
        return out


class TokensToToken(nn.Module):
    """Image (B, C, H, W) to tokens (B, N, D), one for each `STRIDE` x `STRIDE` pixels."""

    def __init__(self, in_chans: int, embed_dim: int, drop: float) -> None:
        super().__init__()
        self.soft_split0 = nn.Unfold(kernel_size=7, stride=4, padding=2)
        self.soft_split1 = nn.Unfold(kernel_size=3, stride=2, padding=1)
        self.soft_split2 = nn.Unfold(kernel_size=3, stride=2, padding=1)
        self.attention1 = TokenPerformer(in_chans * 7 * 7, drop)
        self.attention2 = TokenPerformer(TOKEN_DIM * 3 * 3, drop)
        self.project = nn.Linear(TOKEN_DIM * 3 * 3, embed_dim)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        height, width = x_BCHW.shape[-2] // 4, x_BCHW.shape[-1] // 4
        x_BNE = self.attention1(self.soft_split0(x_BCHW).transpose(1, 2))
        x_BEHW = x_BNE.transpose(1, 2).unflatten(2, (height, width))
        x_BNE = self.attention2(self.soft_split1(x_BEHW).transpose(1, 2))
        x_BEHW = x_BNE.transpose(1, 2).unflatten(2, (height // 2, width // 2))
        tokens_BND: Tensor = self.project(self.soft_split2(x_BEHW).transpose(1, 2))
        return tokens_BND


class T2TViT(nn.Module):
    """Tokens-to-Token ViT with Performers.

    Args:
        img_size: height and width in pixels, or one side; multiples of `STRIDE`.
        in_chans: channels of the image.
        num_classes: outputs of the head; 0 for none.
        embed_dim, depth, num_heads, mlp_ratio: of the backbone.
        qkv_bias: whether its queries, keys and values have a bias.
        drop_rate: dropout after the positions, the attention and in the MLPs of the backbone.
        attn_drop_rate: dropout of its attention.
        drop_path_rate: stochastic depth of its last block, rising from 0 in the first.
        token_drop_rate: dropout of the Performers.

    Raises:
        UsageError: when `img_size` is no multiple of `STRIDE`.
    """

    num_prefix_tokens = 1

    def __init__(
        self,
        img_size: int | Sequence[int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 384,
        depth: int = 14,
        num_heads: int = 6,
        mlp_ratio: float = 3.0,
        qkv_bias: bool = False,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        token_drop_rate: float = 0.1,
    ) -> None:
        super().__init__()
        height, width = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        if min(height, width) < STRIDE or height % STRIDE or width % STRIDE:
            raise UsageError(
                f"T2T-ViT cannot be built for images of {height} x {width} pixels.",
                f"Choose multiples of {STRIDE}.",
            )
        self.image_size = (height, width)
        self.in_chans, self.num_classes, self.embed_dim = in_chans, num_classes, embed_dim
        self.num_patches = (height // STRIDE) * (width // STRIDE)
        self.token_drop_rate = token_drop_rate
        self.grad_checkpointing = False
        self.pretrained_cfg: dict[str, Any] = {
            "input_size": (in_chans, height, width),
            "crop_pct": 0.9,
            "interpolation": "bicubic",
            "mean": (0.485, 0.456, 0.406),
            "std": (0.229, 0.224, 0.225),
        }
        self.tokens_to_token = TokensToToken(in_chans, embed_dim, token_drop_rate)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        positions_ND = sinusoids(self.num_patches + 1, embed_dim)
        self.pos_embed = nn.Parameter(positions_ND.unsqueeze(0), requires_grad=False)
        self.pos_drop = nn.Dropout(drop_rate)
        self.blocks = nn.Sequential(
            *(
                Block(
                    embed_dim,
                    num_heads,
                    mlp_ratio,
                    qkv_bias=qkv_bias,
                    proj_drop=drop_rate,
                    attn_drop=attn_drop_rate,
                    drop_path=drop_path_rate * i / max(1, depth - 1),
                    norm_layer=nn.LayerNorm,
                )
                for i in range(depth)
            )
        )
        self.norm = nn.LayerNorm(embed_dim)
        self.head: nn.Module = nn.Identity()
        if num_classes:
            self.head = nn.Linear(embed_dim, num_classes)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        self.apply(_start)

    def no_weight_decay(self) -> set[str]:
        return {"cls_token"}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    def reset_classifier(self, num_classes: int) -> None:
        """Put a new head in place of the old one, or with 0 none."""
        self.num_classes = num_classes
        like = self.norm.weight
        head = nn.Linear(self.embed_dim, num_classes) if num_classes else nn.Identity()
        _start(head)
        self.head = head.to(like.device, like.dtype).train(self.training)

    def embed(self, x_BCHW: Tensor) -> Tensor:
        """Tokens entering the first block, (B, N, D).

        Raises:
            UsageError: when the images are of another size than the model was built for.
        """
        if tuple(x_BCHW.shape[-2:]) != self.image_size:
            found, wanted = ("{} x {}".format(*s) for s in (x_BCHW.shape[-2:], self.image_size))
            raise UsageError(
                f"The model takes images of {wanted} pixels, not of {found}.",
                "Resize them, or build the model with another img_size.",
            )
        patches_BND = self.tokens_to_token(x_BCHW)
        x_BND = torch.cat((self.cls_token.expand(patches_BND.shape[0], -1, -1), patches_BND), dim=1)
        out: Tensor = self.pos_drop(x_BND + self.pos_embed)
        return out

    def forward_features(self, x_BCHW: Tensor) -> Tensor:
        """Normalised features (B, N, D), that of the class token first."""
        x_BND = self.embed(x_BCHW)
        if self.grad_checkpointing:
            x_BND = checkpoint_seq(self.blocks, x_BND)
        else:
            x_BND = self.blocks(x_BND)
        out: Tensor = self.norm(x_BND)
        return out

    def forward_head(self, x_BND: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits, or what the head reads, from what `forward_features` gives."""
        x_BD = x_BND[:, 0]
        return x_BD if pre_logits else self.head(x_BD)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def create(name: str, num_classes: int | None = None, **overrides: Any) -> T2TViT:
    """A model of `VARIANTS` by its name, with random weights; 1,000 classes by default."""
    model = T2TViT(
        **(VARIANTS[name] | overrides), num_classes=1000 if num_classes is None else num_classes
    )
    model.pretrained_cfg["architecture"] = name
    return model


def sinusoids(num_positions: int, dim: int) -> Tensor:
    """Fixed positions (N, D): sines of falling frequency at even features, their cosines at odd ones."""
    position_N1 = torch.arange(num_positions, dtype=torch.float64).unsqueeze(1)
    pair_D = torch.arange(dim) // 2
    angle_ND = position_N1 / 10000 ** (2 * pair_D.double() / dim)
    even_D = torch.arange(dim) % 2 == 0
    return torch.where(even_D, angle_ND.sin(), angle_ND.cos()).to(torch.get_default_dtype())


def _without_autocast(device_type: str) -> AbstractContextManager[object]:
    """Switches autocast off; where it is off already, there is nothing for a tracer to see."""
    on = torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)
    return torch.autocast(device_type, enabled=False) if on else nullcontext()


def _start(module: nn.Module) -> None:
    """Initial values of linear layers."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
