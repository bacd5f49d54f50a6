"""The modules a compressed model is made of. What a plan does not touch stays the host library's own.

Shape suffixes: B batch, N tokens, D embed_dim, H heads, K query/key dim per head, V value dim per head.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import tokens
from .errors import UnsupportedModelError
from .shape import DENSE, Matching, Ranks
from .tokens import Tokens


class GatheredLinear(nn.Linear):
    """A linear layer that reads only some of its input features.

    Args:
        in_features: how many features are read.
        out_features: outputs.
        bias: whether there is a bias.

    The buffer `features` (in_features,) holds the indices that are read.
    """

    features: Tensor

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__(in_features, out_features, bias=bias)
        self.register_buffer("features", torch.arange(in_features))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x[..., self.features])


class LowRankLinear(nn.Module):
    """`up(down(x))`: a linear map of the given rank; the bias is in `up`."""

    def __init__(
        self, in_features: int, out_features: int, rank: int, bias: bool, gathered: bool = False
    ) -> None:
        super().__init__()
        self.rank = rank
        self.in_features, self.out_features = in_features, out_features
        kind = GatheredLinear if gathered else nn.Linear
        self.down: nn.Linear = kind(in_features, rank, bias=False)
        self.up = nn.Linear(rank, out_features, bias=bias)

    @property
    def bias(self) -> Tensor | None:
        return self.up.bias

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.up(self.down(x)))


Projection = nn.Linear | LowRankLinear


def linear(
    in_features: int,
    out_features: int,
    *,
    bias: bool,
    rank: int | None = None,
    gathered: bool = False,
) -> Projection:
    """The simplest layer that computes a (low-rank, gathered) linear map."""
    if rank is not None:
        return LowRankLinear(in_features, out_features, rank, bias, gathered)
    kind = GatheredLinear if gathered else nn.Linear
    return kind(in_features, out_features, bias=bias)


class Attention(nn.Module):
    """Multi-head self-attention with its own head count, query/key dim, value dim and softmax scale.

    Fused scaled-dot-product kernels need equal query/key and value dims: the smaller is padded with
    zeros to the larger, which leaves the result as it is and is faster than the unfused kernel.

    Args:
        embed_dim: D. `in_features` is how many of them q, k and v read, `gathered` whether through
            an index.
        num_heads, qk_dim, v_dim: H, K, V.
        scale: factor on the logits before softmax; stays that of the dense model.
        ranks: with a rank for q, k or v these are separate layers, else one fused `qkv`.
        q_norm, k_norm: the host's query and key norms (over K).
        attn_drop, proj_drop: dropout probabilities.
    """

    def __init__(
        self,
        embed_dim: int,
        *,
        num_heads: int,
        qk_dim: int,
        v_dim: int,
        scale: float,
        qkv_bias: bool,
        out_bias: bool,
        in_features: int | None = None,
        ranks: Ranks = DENSE,
        q_norm: nn.Module | None = None,
        k_norm: nn.Module | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_heads, self.qk_dim, self.v_dim, self.scale = num_heads, qk_dim, v_dim, scale
        gathered, fan_in = in_features is not None, in_features or embed_dim
        qk, v = num_heads * qk_dim, num_heads * v_dim
        if ranks.factors_qkv:
            self.q = linear(fan_in, qk, bias=qkv_bias, rank=ranks.q, gathered=gathered)
            self.k = linear(fan_in, qk, bias=qkv_bias, rank=ranks.k, gathered=gathered)
            self.v = linear(fan_in, v, bias=qkv_bias, rank=ranks.v, gathered=gathered)
            self.qkv = None
        else:
            self.qkv = linear(fan_in, 2 * qk + v, bias=qkv_bias, gathered=gathered)
        self.q_norm = q_norm if q_norm is not None else nn.Identity()
        self.k_norm = k_norm if k_norm is not None else nn.Identity()
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = linear(v, embed_dim, bias=out_bias, rank=ranks.out)
        self.proj_drop = nn.Dropout(proj_drop)

    def heads(self, x_BND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, H, N, K), keys (B, H, N, K) and values (B, H, N, V)."""
        if self.qkv is None:
            projected = [self.q(x_BND), self.k(x_BND), self.v(x_BND)]
        else:
            qk, v = self.num_heads * self.qk_dim, self.num_heads * self.v_dim
            projected = list(self.qkv(x_BND).split((qk, qk, v), dim=-1))
        q, k, v_BHNV = (p.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for p in projected)
        return self.q_norm(q), self.k_norm(k), v_BHNV

    def mix(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Attention-weighted values of every head, (B, H, N, V), from what `heads` returns."""
        wide = max(self.qk_dim, self.v_dim)
        if self.qk_dim < wide:
            q, k = F.pad(q, (0, wide - self.qk_dim)), F.pad(k, (0, wide - self.qk_dim))
        elif self.v_dim < wide:
            v = F.pad(v, (0, wide - self.v_dim))
        z = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=attn_mask,
            dropout_p=self.attn_drop.p if self.training else 0.0,
            is_causal=is_causal,
            scale=self.scale,
        )
        return z[..., : self.v_dim]

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        asks: Literal["first", "mean"] | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """(B, N, D); and if asked for, (B, N) how much the first token, or one of the mean query, attends to
        every token: the mean over heads of its row of attention, without gradient."""
        q, k, v = self.heads(x)
        z_BHNV = self.mix(q, k, v, attn_mask, is_causal)
        out = cast(Tensor, self.proj_drop(self.proj(z_BHNV.transpose(1, 2).flatten(2))))
        if asks is None:
            return out
        with torch.no_grad():
            asking = q[:, :, :1] if asks == "first" else q.mean(2, keepdim=True)
            logits = (self.scale * asking) @ k.transpose(-1, -2)
            logits = logits if attn_mask is None else logits + attn_mask
            return out, logits.float().softmax(-1).mean(1).squeeze(1)


class Block(nn.Module):
    """A pre-norm transformer block whose two halves can be run apart, with tokens merged in between.

    It takes over the children of the host's block under timm's names, so that state dicts keep their
    keys. `num_tokens_out` is the number of tokens left after the attention half, `fuses` whether those
    that go become one, `match_features` the features by which they are compared for merging, or None for
    all, `token_weights` what attention to a token is multiplied by, for each place, or None for nothing.
    """

    norm1: nn.Module
    attn: nn.Module
    ls1: nn.Module
    drop_path1: nn.Module
    norm2: nn.Module
    mlp: nn.Module
    ls2: nn.Module
    drop_path2: nn.Module
    match_features: Tensor | None
    token_weights: Tensor | None

    def __init__(
        self,
        children: dict[str, nn.Module],
        num_tokens_in: int,
        num_tokens_out: int,
        match_features: int | None = None,
        fuses: bool = False,
    ) -> None:
        super().__init__()
        for name in ("norm1", "attn", "ls1", "drop_path1", "norm2", "mlp", "ls2", "drop_path2"):
            self.add_module(name, children[name])
        self.num_tokens_in, self.num_tokens_out, self.fuses = num_tokens_in, num_tokens_out, fuses
        self.register_buffer("match_features", None)
        self.register_buffer("token_weights", None)
        self.compare_by(match_features)

    def compare_by(self, count: int | None) -> None:
        """Compare tokens by so many features; the first ones, until told which."""
        have = None if self.match_features is None else len(self.match_features)
        if count != have:
            device = next(self.parameters()).device
            self.match_features = None if count is None else torch.arange(count, device=device)

    def weigh(self, places: int | None) -> None:
        """Weigh so many places; alike, until told how."""
        have = None if self.token_weights is None else len(self.token_weights)
        if places != have:
            like = next(self.parameters())
            self.token_weights = None if places is None else like.new_ones(places)

    def attend(
        self, x_BND: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        y = self.attn(self.norm1(x_BND), attn_mask=attn_mask, is_causal=is_causal)
        return self._added(x_BND, y)

    def attend_and_merge(
        self,
        state: Tokens,
        num_out: int,
        num_prefix: int,
        matching: Matching,
        pools_prefix: bool,
    ) -> Tokens:
        """The attention half, then `tokens.merge` or `tokens.fuse` until `num_out` tokens are left.

        What the first token attends to counts where the head reads it; elsewhere a class token is one that nothing
        has taught where to look.

        To be merged, tokens are compared by what the MLP is about to read, which costs no projection and does not
        depend on how queries and keys were factored.
        """
        bias = tokens.attention_bias(state)
        if num_out == state.x.shape[1]:
            return state.replace(self.attend(state.x, bias))
        row_BN = None
        if self.fuses or (matching == "attention" and pools_prefix):
            asks = "first" if pools_prefix else "mean"
            y, row_BN = self.attn(self.norm1(state.x), attn_mask=bias, asks=asks)
            state = state.replace(self._added(state.x, y))
        else:
            state = state.replace(self.attend(state.x, bias))
        if self.fuses and row_BN is not None:
            if self.token_weights is not None:
                row_BN = row_BN * tokens.of_members(state, self.token_weights)
            return tokens.fuse(state, num_out, num_prefix, row_BN)
        metric = self.norm2(state.x)
        if self.match_features is not None:
            # Gathering with an index for every token is several times faster than indexing here.
            index = self.match_features.expand(*metric.shape[:2], -1)
            metric = metric.gather(2, index)
        return tokens.merge(state, metric, num_out, num_prefix, matching, row_BN)

    def _added(self, x_BND: Tensor, y_BND: Tensor) -> Tensor:
        return cast(Tensor, x_BND + self.drop_path1(self.ls1(y_BND)))

    def gains(self) -> tuple[Tensor | None, Tensor | None]:
        """Layer scales (D,) on the outputs of the attention and of the MLP half, where there are any."""
        scales = (getattr(half, "gamma", None) for half in (self.ls1, self.ls2))
        first, second = (None if g is None else cast(Tensor, g).detach() for g in scales)
        return first, second

    def feed(self, x_BND: Tensor) -> Tensor:
        return cast(Tensor, x_BND + self.drop_path2(self.ls2(self.mlp(self.norm2(x_BND)))))

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """The block on all tokens, without merging, as the host would run it."""
        return self.feed(self.attend(x, attn_mask, is_causal))


class BlockStack(nn.ModuleList):
    """Runs blocks that merge tokens, and returns one feature for each original token.

    Takes the place of the host's sequence of blocks. The state of merging, how many original tokens
    each token stands for and which, lives in local variables of one forward pass. At the end merged
    tokens are spread back to their sources, so pooling and dense features see (B, N, D) as always.

    Indexing gives the blocks; a slice gives a shorter stack; iterating gives one callable a block,
    each from (B, N, D) to (B, N, D), which together compute what the stack computes.

    Args:
        blocks: `Block`s in order.
        num_prefix_tokens: leading tokens that are never merged.
        matching: rule by which tokens are paired, see `shape.Matching`.
        pools_prefix: whether the head reads the first token, and not the patches.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        num_prefix_tokens: int,
        matching: Matching,
        pools_prefix: bool,
    ) -> None:
        super().__init__(blocks)
        self.num_prefix_tokens, self.pools_prefix = num_prefix_tokens, pools_prefix
        self.matching: Matching = matching

    def forward(self, x_BND: Tensor) -> Tensor:
        state = tokens.start(x_BND)
        for i in range(len(self)):
            state = self.step(i, state)
        return tokens.unmerge(state)

    def step(self, index: int, state: Tokens) -> Tokens:
        """Block `index` on merged tokens."""
        block = self.block(index)
        state = self.attend(index, state)
        return state.replace(block.feed(state.x))

    def attend(self, index: int, state: Tokens) -> Tokens:
        """The attention half of block `index`, and the merging after it."""
        num_out = self.num_out(index, state.x.shape[1])
        return self.block(index).attend_and_merge(
            state, num_out, self.num_prefix_tokens, self.matching, self.pools_prefix
        )

    @property
    def match_features(self) -> int | None:
        """By how many features tokens are compared; None means all."""
        features = self.block(0).match_features
        return None if features is None else len(features)

    @property
    def weighs_tokens(self) -> bool:
        """Whether places of tokens have weights."""
        return self.block(0).token_weights is not None

    def block(self, index: int) -> Block:
        return cast(Block, super().__getitem__(index))

    def num_out(self, index: int, arriving: int) -> int:
        """Tokens that block `index` leaves of those that arrive.

        When the input size is not the reference's, the fraction of patch tokens counts.
        """
        block = self.block(index)
        if arriving == block.num_tokens_in:
            return block.num_tokens_out
        prefix = self.num_prefix_tokens
        kept = (block.num_tokens_out - prefix) / max(1, block.num_tokens_in - prefix)
        return min(arriving, prefix + max(1, round(kept * (arriving - prefix))))

    def __iter__(self) -> Iterator[Any]:
        trail: dict[int, Tokens] = {}
        return iter([BlockStep(self, i, trail) for i in range(len(self))])

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            blocks = [self.block(i) for i in range(len(self))[index]]
            return BlockStack(blocks, self.num_prefix_tokens, self.matching, self.pools_prefix)
        return super().__getitem__(index)


class BlockStep:
    """One block of a `BlockStack` as a callable on (B, N, D), for hosts that loop over blocks.

    The steps of one iteration share `trail`: where tokens stand before each block. It belongs to that
    iteration, not to a module, and is only read again when gradient checkpointing repeats a step.
    Attributes not found here are the block's.
    """

    def __init__(self, stack: BlockStack, index: int, trail: dict[int, Tokens]) -> None:
        self.stack, self.index, self.trail = stack, index, trail

    def __call__(
        self, x_BND: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        if attn_mask is not None or is_causal:
            raise UnsupportedModelError(
                "Attention masks cannot be combined with token merging: merged tokens have no mask.",
                "Compress without the token dimension to use masks.",
            )
        if self.index == 0:
            state = tokens.start(x_BND)
        else:
            state = tokens.regather(self.trail[self.index], x_BND)
        state = self.stack.step(self.index, state)
        self.trail[self.index + 1] = state.detached()
        return tokens.unmerge(state)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stack.block(self.index), name)
