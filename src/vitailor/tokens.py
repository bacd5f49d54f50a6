"""Fewer tokens as pure functions: merging by bipartite soft matching, selection with one fused token, and back.

Merging, after ToMe (Bolya et al., arXiv 2210.09461): tokens that resemble each other are averaged, weighted
by how many original tokens each stands for; attention adds log(size) to the logits so that a merged token
counts as often as its members. Selection, after EViT (Liang et al., arXiv 2202.07800): tokens that get least
attention become one. Prefix tokens (class, distillation, registers) always stay as they are.

Shape suffixes: B batch, N tokens at hand, M original tokens, D embed_dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import UnsupportedModelError
from .shape import Matching, merge_rounds


@dataclass(frozen=True, slots=True)
class Tokens:
    """Tokens in the middle of a forward pass.

    Attributes:
        x: (B, N, D) features.
        size: (B, N) how many original tokens each token stands for; None where nothing was merged, and
            every token counts as one.
        source: (B, M) which of the N tokens each original token went into; None while all are there.
    """

    x: Tensor
    size: Tensor | None = None
    source: Tensor | None = None

    def replace(self, x: Tensor) -> Tokens:
        return Tokens(x, self.size, self.source)

    def detached(self) -> Tokens:
        """The bookkeeping without features or their graph."""
        return Tokens(self.x.new_empty(*self.x.shape[:2], 0), self.size, self.source)


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
    if tokens.source is None:
        return Tokens(x_BMD)
    batch, original = tokens.source.shape
    positions = torch.arange(original, device=x_BMD.device).expand(batch, -1)
    member = tokens.source.new_zeros(tokens.x.shape[:2]).scatter(1, tokens.source, positions)
    x = x_BMD.gather(1, member.unsqueeze(-1).expand(-1, -1, x_BMD.shape[-1]))
    return Tokens(x, tokens.size, tokens.source)


def sizes(tokens: Tokens) -> Tensor:
    """(B, N) how many original tokens each stands for."""
    return tokens.x.new_ones(tokens.x.shape[:2]) if tokens.size is None else tokens.size


def of_members(tokens: Tokens, value_M: Tensor) -> Tensor:
    """(B, N) means over the original tokens that went into each, of a value for every place."""
    batch, n = tokens.x.shape[:2]
    places = n if tokens.source is None else tokens.source.shape[1]
    if places != len(value_M):
        raise UnsupportedModelError(
            f"The model weighs {len(value_M)} places of tokens, but the image has {places}.",
            "Give images of the size that it was compressed at.",
        )
    if tokens.source is None:
        return value_M.expand(batch, -1)
    values = value_M.expand(batch, -1)
    zeros = values.new_zeros(batch, n)
    total = zeros.scatter_add(1, tokens.source, values)
    return total / zeros.scatter_add(1, tokens.source, torch.ones_like(values))


def shares(size_BN: Tensor, attention_BN: Tensor, num_prefix: int) -> Tensor:
    """(B, N) each patch token's share of the image's tokens plus its share of an attention row.

    A weight for merging: what the class token looks at stays apart, the rest may become coarse.
    """

    def share(x_BN: Tensor) -> Tensor:
        return x_BN / x_BN[:, num_prefix:].sum(1, keepdim=True)

    return share(size_BN) + share(attention_BN)


def merge(
    tokens: Tokens,
    metric_BNM: Tensor,
    num_out: int,
    num_prefix: int,
    matching: Matching,
    attention_BN: Tensor | None = None,
) -> Tokens:
    """Merge the tokens that lose least until `num_out` are left, prefix included, in their old order.

    Each round splits the patch tokens into alternating halves, gives every token of the first half its
    best partner in the second, and merges the best pairs (`shape.merge_rounds`). Since tokens keep their
    raster order, every token goes on meeting its neighbours in the other half. At least one patch token
    stays.

    Args:
        metric_BNM: (B, N, M) features by which tokens are compared.
        matching: rule by which pairs are chosen, see `shape.Matching` and `affinity`.
        attention_BN: (B, N) how much the class token attends to each token, for "attention"; without,
            that is "ward".

    Returns:
        Tokens with x (B, num_out, D). The total size of the tokens is conserved.
    """
    n, size = tokens.x.shape[1], sizes(tokens)
    if n == num_out:
        return tokens
    # What a round asks of a token is summed over its members: features, size and weight.
    # Who goes where is a choice without gradient.
    size = size.to(torch.promote_types(size.dtype, torch.float32))  # for weights far below 1
    metric = metric_BNM.detach()
    columns = [
        metric if tokens.size is None else metric * size.unsqueeze(-1),
        size.unsqueeze(-1),
    ]
    if matching != "cosine":
        weight = size if attention_BN is None else shares(size, attention_BN, num_prefix)
        columns.append(weight.unsqueeze(-1))
    table = torch.cat(columns, dim=-1)
    features = metric_BNM.shape[-1]
    target: Tensor | None = None
    rounds = merge_rounds(n - num_prefix, n - num_out, matching)
    for number, merged in enumerate(rounds, start=1):
        weight_BN = table[..., features + 1] if matching != "cosine" else None
        step = _pair_off(table[..., :features], weight_BN, merged, num_prefix)
        n -= merged
        if number == len(rounds):  # no round follows that would compare them
            table, features = table[..., features:], 0
        table = _sum_into(table, step, n)
        target = step if target is None else step.gather(1, target)
    assert target is not None  # there was something to merge
    total = table[..., features].to(tokens.x.dtype)
    x = tokens.x if tokens.size is None else tokens.x * size.unsqueeze(-1).to(tokens.x.dtype)
    x = _sum_into(x, target, n) / total.unsqueeze(-1)
    source = target if tokens.source is None else target.gather(1, tokens.source)
    return Tokens(x, total, source)


def fuse(tokens: Tokens, num_out: int, num_prefix: int, attention_BN: Tensor) -> Tokens:
    """Keep the patch tokens that get most attention, in their old order; all others become one, their mean, at
    the end.

    Token selection of "Multi-Dimensional Model Compression of Vision Transformer" (arXiv 2201.00043). A token
    that was fused before is one like any other. Where sizes are known, the mean is weighted by them and the
    fused token has their sum; else it counts as one, as published.

    Args:
        num_out: tokens left, prefix and fused token included.
        attention_BN: (B, N) how much attention each token gets.
    """
    x, n, p = tokens.x, tokens.x.shape[1], num_prefix
    if n == num_out:
        return tokens
    chosen = attention_BN[:, p:].topk(num_out - p - 1).indices.sort().values + p
    first = torch.arange(p, device=x.device).expand(len(x), -1)
    kept = torch.cat([first, chosen], dim=1)
    gone_BN = sizes(tokens).scatter(1, kept, 0)
    total = gone_BN.sum(1, keepdim=True)
    weight_BN = (gone_BN / total).to(x.dtype)
    fused = (weight_BN.unsqueeze(-1) * x).sum(1, keepdim=True)
    x = torch.cat([x.gather(1, kept.unsqueeze(-1).expand(-1, -1, x.shape[-1])), fused], dim=1)
    places = torch.arange(num_out - 1, device=x.device).expand(len(x), -1)
    step = kept.new_full((len(x), n), num_out - 1).scatter(1, kept, places)
    size = None if tokens.size is None else torch.cat([tokens.size.gather(1, kept), total], dim=1)
    source = step if tokens.source is None else step.gather(1, tokens.source)
    return Tokens(x, size, source)


def affinity(metric_BNM: Tensor, weight_BN: Tensor | None) -> Tensor:
    """(B, A, C) how well each of the A even tokens goes with each of the C odd ones; higher is better.

    The cosine similarity, as in ToMe; or with weights w, minus what a merger adds to the weighted
    variance within groups, w_a w_b / (w_a + w_b) * (1 - cosine) (Ward 1963, on unit vectors), so that
    what counts much is merged only with what is very like it.
    """
    unit = F.normalize(metric_BNM, dim=-1)
    cosine = unit[:, ::2] @ unit[:, 1::2].transpose(1, 2)
    if weight_BN is None:
        return cosine
    inverse = 1 / weight_BN  # w_a w_b / (w_a + w_b) = 1 / (1 / w_a + 1 / w_b)
    return (cosine - 1) / (inverse[:, ::2].unsqueeze(2) + inverse[:, 1::2].unsqueeze(1))


def _pair_off(metric_BNM: Tensor, weight_BN: Tensor | None, merged: int, num_prefix: int) -> Tensor:
    """(B, N) where each token goes in one round that merges the `merged` best pairs."""
    p = num_prefix
    weight = None if weight_BN is None else weight_BN[:, p:]
    best, partner = affinity(metric_BNM[:, p:], weight).max(-1)
    pair = best.topk(merged).indices
    gone, into = p + 2 * pair, p + 1 + 2 * partner.gather(1, pair)
    stays = torch.ones(metric_BNM.shape[:2], dtype=torch.long, device=metric_BNM.device)
    rank = stays.scatter(1, gone, 0).cumsum(1) - 1
    return rank.scatter(1, gone, rank.gather(1, into))


def _sum_into(x: Tensor, target_BN: Tensor, num_out: int) -> Tensor:
    """Sum of x (B, N, ...) over the tokens that go to each target, (B, num_out, ...).

    On flattened rows, where adding by index is several times faster than along an inner axis.
    """
    batch = x.shape[0]
    start = torch.arange(batch, device=x.device).unsqueeze(1) * num_out
    out = x.new_zeros(batch * num_out, *x.shape[2:])
    out = out.index_add(0, (target_BN + start).flatten(), x.flatten(0, 1))
    return out.view(batch, num_out, *x.shape[2:])
