"""Statistical dependence between a unit and the predictions: the Hilbert-Schmidt independence criterion.

The criterion of "Multi-Dimensional Model Compression of Vision Transformer" (arXiv 2201.00043) for heads,
neurons and tokens alike: with features z of a component and predictions y, the squared Hilbert-Schmidt norm
of their cross-covariance operator, which is zero for independent ones. On n samples with Gram matrices K and
L, and H = I - 1 1^T / n, it is

    biased    tr(K H L H) / (n - 1)^2                                        (Gretton et al. 2005)
    unbiased  [tr(K~ L~) + (1'K~1)(1'L~1) / ((n-1)(n-2)) - 2 1'K~L~1 / (n-2)] / (n (n-3)),
              K~ and L~ being K and L with their diagonals set to zero       (Song et al. 2012)

Features have a Gaussian kernel, the mean over several bandwidths; predictions a linear one. Here all units of
a block are done together: one product gives all distances, one exponential all bandwidths that are powers of
two apart, since exp(-d / 2 s^2) to the fourth power is that of s / 2; and both estimates are sums of the entries
of K, each times a number that only L decides. These numbers sum to zero, so that K - 1 stands for K.

Shape suffixes: U units, B images, N tokens, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .calibrate import Batches, images_of, wide
from .errors import DataError, UsageError
from .hosts import host_of
from .layers import Block

Estimator = Literal["biased", "unbiased"]
#: Bandwidths of the paper's kernel, and the rule that takes the median distance instead.
BANDWIDTHS: tuple[float, ...] = (1.0, 2.0, 4.0, 8.0, 16.0)
Bandwidths = Sequence[float] | Literal["median"]
#: What redundancy takes from a head's relevance, and relevance's share in a neuron's score, as published.
REDUNDANCY, RELEVANCE = 0.1, 0.1
#: Gram matrices of so many entries are held at once: few enough to stay in a cache.
ENTRIES = 2**16


def gaussian(x_UBN: Tensor, bandwidths: Bandwidths = BANDWIDTHS) -> Tensor:
    """Mean of Gaussian kernels exp(-|x - x'|^2 / (2 s^2)) between samples.

    Args:
        x_UBN: samples of N features.
        bandwidths: s of each kernel; "median" takes for each unit the median distance between samples.

    Returns:
        (U, B, B) Gram matrices.

    Raises:
        UsageError: when a bandwidth is not positive.
    """
    return _mean(_less_one(x_UBN, bandwidths)) + 1


def _mean(grams: Iterator[Tensor]) -> Tensor:
    total, count = next(grams).clone(), 1
    for gram in grams:
        total += gram
        count += 1
    return total / count


def _less_one(x_UBN: Tensor, bandwidths: Bandwidths) -> Iterator[Tensor]:
    """(U, B, B) Gram matrices less 1 of one bandwidth after the other; each overwrites the one before.

    Dependence does not change when a constant is added to a Gram matrix, but where all samples are near to each
    other entries close to 1 would lose in float32 what tells them apart; nor when one is added to the features.
    """
    x_UBN = x_UBN - x_UBN.mean(1, keepdim=True)
    if isinstance(bandwidths, str):
        n = x_UBN.shape[1]
        above = torch.ones(n, n, dtype=torch.bool, device=x_UBN.device).triu(1)
        median = (-2 * _exponents(x_UBN))[:, above].median(-1).values
        median = torch.where(median > 0, median, torch.ones_like(median))
        yield (_exponents(x_UBN) / median[:, None, None]).expm1_()
        return
    if not bandwidths or min(bandwidths) <= 0:
        raise UsageError(f"Bandwidths {bandwidths} are not all positive.", "Give at least one.")
    falling = sorted(bandwidths, reverse=True)
    gram = _exponents(x_UBN, falling[0]).expm1_()
    yield gram
    for wider, narrower in pairwise(falling):
        if wider == 2 * narrower:
            for _ in range(2):
                gram.mul_(gram + 2)  # (1 + a)^2 - 1
        else:
            gram = _exponents(x_UBN, narrower).expm1_()
        yield gram


def _exponents(x_UBN: Tensor, bandwidth: float = 1.0) -> Tensor:
    """(U, B, B) -|x - x'|^2 / 2 s^2, where |x - x'|^2 / 2 = |x|^2 / 2 + |x'|^2 / 2 - x x', in one product.

    Squared norms are its diagonal: summing them apart takes a third of the product's time again.
    """
    found = x_UBN.new_empty(()).expand(len(x_UBN), x_UBN.shape[1], x_UBN.shape[1])
    found = torch.baddbmm(found, x_UBN, x_UBN.mT, beta=0, alpha=bandwidth**-2)
    half = found.diagonal(dim1=1, dim2=2) / 2
    return found.sub_(half.unsqueeze(-1)).sub_(half.unsqueeze(-2)).clamp_(max=0)  # rounding


def linear(y_BC: Tensor) -> Tensor:
    """(B, B) Gram matrix of the linear kernel."""
    return y_BC @ y_BC.mT


def coefficients(gram: Tensor, estimator: Estimator = "biased") -> Tensor:
    """What each entry of another Gram matrix counts in the dependence: hsic(K, L) is the sum of K times this.

    Args:
        gram: (..., n, n) L.

    Returns:
        (..., n, n) H L H / (n - 1)^2 for the biased estimate; for the unbiased one, with r the row sums of
        L~, [L~ + 1'r / ((n-1)(n-2)) - (r_i + r_j) / (n-2)] / (n (n-3)) off the diagonal, and 0 on it.

    Raises:
        UsageError: for fewer samples than the estimator needs: 2, or 4 for the unbiased one.
    """
    n = gram.shape[-1]
    least = 2 if estimator == "biased" else 4
    if n < least:
        raise UsageError(
            f"{n} images are too few for the {estimator} estimate of dependence.",
            f"Give at least {least} in each batch.",
        )
    if estimator == "biased":
        rows = gram - gram.mean(-1, keepdim=True)
        return (rows - rows.mean(-2, keepdim=True)) / (n - 1) ** 2
    off = 1 - torch.eye(n, dtype=gram.dtype, device=gram.device)
    apart = gram * off
    rows = apart.sum(-1)
    every = rows.sum(-1)[..., None, None] / ((n - 1) * (n - 2))
    shared = (rows.unsqueeze(-1) + rows.unsqueeze(-2)) / (n - 2)
    return (apart + every - shared) * off / (n * (n - 3))


def relevance(
    x_UBN: Tensor,
    y_BC: Tensor,
    bandwidths: Bandwidths = BANDWIDTHS,
    estimator: Estimator = "biased",
) -> Tensor:
    """(U,) dependence of each unit on the predictions.

    Args:
        x_UBN: features of the units: for each image, one number at each token. Products are fastest where
            images lie closest in memory: the transpose of a contiguous (U, N, B).
        y_BC: class probabilities; their kernel is linear.
    """
    # Centred, which changes nothing: predictions that are nearly alike would else lose what tells them apart.
    counts = coefficients(linear(y_BC - y_BC.mean(0)), estimator).flatten()
    found = []
    for x in x_UBN.split(max(1, ENTRIES // len(counts))):
        parts = [gram.flatten(1) @ counts for gram in _less_one(x, bandwidths)]
        found.append(torch.stack(parts).mean(0))
    return torch.cat(found)


def redundancy(
    x_UBN: Tensor, bandwidths: Bandwidths = BANDWIDTHS, estimator: Estimator = "biased"
) -> Tensor:
    """(U,) mean dependence of each unit on each other one; 0 for a single unit.

    All Gram matrices are held at once: U B^2 numbers.
    """
    units = len(x_UBN)
    if units < 2:
        return x_UBN.new_zeros(units)
    grams = _mean(_less_one(x_UBN, bandwidths))
    pairs = grams.flatten(1) @ coefficients(grams, estimator).flatten(1).mT
    return (pairs.sum(1) - pairs.diagonal()) / (units - 1)


# -- units of a model ------------------------------------------------------------------------------


@dataclass
class UnitScores:
    """Scores of one block's units, higher means keep.

    Attributes:
        heads: (H,) relevance of each, less its redundancy.
        relevance: (F,) of each hidden unit of the MLP.
        activity: (F,) mean absolute activation.
        tokens: (N,) relevance of the values at each place, brought to [0, 1]; None unless asked for.
    """

    heads: Tensor
    relevance: Tensor
    activity: Tensor
    tokens: Tensor | None = None

    def neurons(self, relevance: float = RELEVANCE) -> Tensor:
        """(F,) mix of relevance and activity, each brought to [0, 1] over the block.

        Args:
            relevance: its share; the rest is activity's. 0.1 in the published code.
        """
        return relevance * _unit(self.relevance) + (1 - relevance) * _unit(self.activity)


@torch.inference_mode()
def score(
    model: nn.Module,
    batches: Batches,
    *,
    bandwidths: Bandwidths = BANDWIDTHS,
    estimator: Estimator = "biased",
    redundancy_weight: float = REDUNDANCY,
    tokens: bool = False,
) -> list[UnitScores]:
    """Dependence of every head and neuron on the predictions, in the mean over batches.

    A head's feature is its output, averaged over its dims; a neuron's is its activation: one number at each
    token. Each batch goes through the model twice: its predictions must be known before the first block is
    scored, and so no activation is kept.

    Args:
        model: any supported model; its mode is restored.
        batches: images; dependence is estimated within each batch, so these should be large, e.g. 128.
        tokens: score places too: the values of all heads there, as a commented-out part of the published
            code does, on predictions instead of labels.

    Raises:
        DataError: when there are no images.
        UsageError: when a batch is too small for the estimator.
    """
    host, device = host_of(model), next(model.parameters()).device
    shape = host.describe(model)
    total: dict[tuple[int, str], Tensor] = {}
    predicted: Tensor | None = None  # until the first pass of a batch has told

    def add(i: int, name: str, scores: Tensor) -> None:
        new = images * scores.double()
        total[i, name] = total[i, name] + new if (i, name) in total else new

    def on_heads(i: int, mixed_BNV: Tensor) -> None:
        if predicted is None:
            return
        x_HBN = (
            wide(mixed_BNV).unflatten(-1, (shape.blocks[i].num_heads, -1)).mean(-1).permute(2, 0, 1)
        )
        relevant = relevance(x_HBN, predicted, bandwidths, estimator)
        add(i, "heads", relevant - redundancy_weight * redundancy(x_HBN, bandwidths, estimator))

    def on_neurons(i: int, hidden_BNF: Tensor) -> None:
        if predicted is None:
            return
        x_FNB = wide(hidden_BNF).permute(2, 1, 0).contiguous()
        add(i, "relevance", relevance(x_FNB.mT, predicted, bandwidths, estimator))
        add(i, "activity", x_FNB.abs().mean((1, 2)))

    def on_tokens(i: int, read_BND: Tensor) -> None:
        if predicted is None:
            return
        values = host.read(host.block(model, i))
        weight = values["v.weight"].flatten(0, 1)
        seen = read_BND[..., values["attn_features"]] if "attn_features" in values else read_BND
        bias = values["v.bias"].flatten() if "v.bias" in values else None
        x_NBV = wide(F.linear(seen, weight, bias)).transpose(0, 1).contiguous()
        add(i, "tokens", relevance(x_NBV, predicted, bandwidths, estimator))

    readers: dict[str, Reader] = {"attn.proj": on_heads, "mlp.fc2": on_neurons}
    if tokens:
        readers["attn"] = on_tokens
    handles = [
        handle for i in range(shape.depth) for handle in _listen(host.block(model, i), i, readers)
    ]
    count, images, was_training = 0, 0, model.training
    model.eval()
    try:
        for batch in batches:
            x = images_of(batch).to(device)
            images, predicted = len(x), None
            outputs = wide(model(x))
            predicted = outputs.softmax(-1) if shape.num_classes > 1 else outputs.flatten(1)
            model(x)
            count += images
    finally:
        for handle in handles:
            handle.remove()
        model.train(was_training)
    if not count:
        raise DataError("There are no calibration images.", "Give a folder with images.")
    mean = {key: scores / count for key, scores in total.items()}
    return [
        UnitScores(
            mean[i, "heads"],
            mean[i, "relevance"],
            mean[i, "activity"],
            _unit(mean[i, "tokens"]) if tokens else None,
        )
        for i in range(shape.depth)
    ]


#: Called with a block's index and what a part of it reads.
Reader = Callable[[int, Tensor], None]


def _listen(block: Block, i: int, readers: dict[str, Reader]) -> Iterator[RemovableHandle]:
    """Temporary hooks on what parts of a block read."""
    for name, tell in readers.items():
        yield block.get_submodule(name).register_forward_pre_hook(
            lambda _, args, tell=tell: tell(i, args[0])
        )


def _unit(scores: Tensor) -> Tensor:
    """Scores brought to [0, 1]."""
    low, high = scores.aminmax()
    return (scores - low) / (high - low).clamp_min(torch.finfo(scores.dtype).tiny)
