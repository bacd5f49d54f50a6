"""Token merging as pure functions: bipartite soft matching and its inverse.

After ToMe (Bolya et al., arXiv 2210.09461): tokens that resemble each other are averaged, weighted by
how many original tokens each stands for; attention adds log(size) to the logits so that a merged token
counts as often as its members. Prefix tokens (class, distillation, registers) are never merged.

Shape suffixes: B batch, N tokens at hand, M original tokens, D embed_dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Tokens:
    """Tokens in the middle of a forward pass.

    Attributes:
        x: (B, N, D) features.
        size: (B, N) how many original tokens each token stands for; None before the first merge.
        source: (B, M) which of the N tokens each original token went into; None before the first merge.
    """

    x: Tensor
    size: Tensor | None = None
    source: Tensor | None = None

    def replace(self, x: Tensor) -> Tokens:
        return Tokens(x, self.size, self.source)

    def detached(self) -> Tokens:
        """The bookkeeping without features or their graph."""
        return Tokens(self.x.new_empty(0), self.size, self.source)


def start(x_BND: Tensor) -> Tokens:
    return Tokens(x_BND)


def attention_bias(tokens: Tokens) -> Tensor | None:
    """log(size) as an additive mask (B, 1, 1, N), or None when nothing has been merged."""
    if tokens.size is None:
        return None
    return tokens.size.log()[:, None, None, :]


def unmerge(tokens: Tokens) -> Tensor:
    """Features for every original token, (B, M, D): each gets those of the token it went into."""
    if tokens.source is None:
        return tokens.x
    return tokens.x.gather(1, tokens.source.unsqueeze(-1).expand(-1, -1, tokens.x.shape[-1]))


def regather(tokens: Tokens, x_BMD: Tensor) -> Tokens:
    """Inverse of `unmerge`: picks one original token for each merged one from spread-out features."""
    if tokens.source is None or tokens.size is None:
        return Tokens(x_BMD)
    batch, original = tokens.source.shape
    positions = torch.arange(original, device=x_BMD.device).expand(batch, -1)
    member = torch.zeros_like(tokens.size, dtype=torch.long).scatter(1, tokens.source, positions)
    x = x_BMD.gather(1, member.unsqueeze(-1).expand(-1, -1, x_BMD.shape[-1]))
    return Tokens(x, tokens.size, tokens.source)


def merge(
    tokens: Tokens, metric_BNM: Tensor, num_out: int, num_prefix: int, matching: str
) -> Tokens:
    """Merge the tokens that lose least until `num_out` are left, prefix included.

    Each round splits the patch tokens into alternating halves, gives every token of the first half its
    best partner in the second, and merges the best pairs. One round removes at most half, so strong
    reductions take several. At least one patch token stays.

    Args:
        metric_BNM: (B, N, M) features by which tokens are compared.
        matching: "cosine" merges the pairs of the highest cosine similarity, as in ToMe; "ward" those
            that add least to the variance within groups, s_a s_b / (s_a + s_b) * (1 - cosine)
            (Ward 1963, on unit vectors), so that large groups do not swallow everything.

    Returns:
        Tokens with x (B, num_out, D). The total size of the tokens is conserved.
    """
    while tokens.x.shape[1] > num_out:
        tokens, metric_BNM = _merge_round(tokens, metric_BNM, num_out, num_prefix, matching)
    return tokens


def affinity(metric_BNM: Tensor, size_BN: Tensor, matching: str) -> Tensor:
    """(B, A, C) how well each of the A even tokens goes with each of the C odd ones; higher is better."""
    unit = F.normalize(metric_BNM, dim=-1)
    cosine = unit[:, ::2] @ unit[:, 1::2].transpose(1, 2)
    if matching == "cosine":
        return cosine
    size_a, size_b = size_BN[:, ::2].unsqueeze(2), size_BN[:, 1::2].unsqueeze(1)
    return (cosine - 1) * (size_a * size_b / (size_a + size_b))


def _merge_round(
    tokens: Tokens, metric_BNM: Tensor, num_out: int, num_prefix: int, matching: str
) -> tuple[Tokens, Tensor]:
    n, p = tokens.x.shape[1], num_prefix
    size = tokens.x.new_ones(tokens.x.shape[:2]) if tokens.size is None else tokens.size
    num_a = (n - p + 1) // 2
    best, partner = affinity(metric_BNM[:, p:], size[:, p:], matching).max(-1)
    order = best.argsort(-1, descending=True)
    merged = min(n - num_out, num_a)
    gone, stays = order[:, :merged], order[:, merged:].sort(-1).values

    # New order: prefix, what stays of the first half, then the second half with what joined it.
    first_b = p + num_a - merged
    target = torch.empty(size.shape, dtype=torch.long, device=size.device)
    target[:, :p] = torch.arange(p, device=size.device)
    target[:, p + 1 :: 2] = torch.arange(first_b, n - merged, device=size.device)
    rank = torch.arange(p, first_b, device=size.device).expand(stays.shape)
    even = torch.empty_like(order).scatter(1, stays, rank)
    target[:, p::2] = even.scatter(1, gone, first_b + partner.gather(1, gone))

    total = _sum_into(size.unsqueeze(-1), target, n - merged)
    x = _sum_into(tokens.x * size.unsqueeze(-1), target, n - merged) / total
    metric_BNM = _sum_into(metric_BNM * size.unsqueeze(-1), target, n - merged) / total
    source = target if tokens.source is None else target.gather(1, tokens.source)
    return Tokens(x, total.squeeze(-1), source), metric_BNM


def _sum_into(x_BND: Tensor, target_BN: Tensor, num_out: int) -> Tensor:
    """Sum of the rows of x that go to each target, (B, num_out, D)."""
    out = x_BND.new_zeros(x_BND.shape[0], num_out, x_BND.shape[2])
    return out.scatter_add(1, target_BN.unsqueeze(-1).expand(-1, -1, x_BND.shape[2]), x_BND)
