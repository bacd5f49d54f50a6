"""Decompositions of a linear map at a rank: SVD, four versions of QR, two of LU, plain or activation-aware.

After "Vision Transformer Pruning via Matrix Decomposition" (arXiv 2308.10839), which compares SVD, QR and LU
of the projections that importance scores have pruned. Every decomposition here is a rank-r projector P
applied to the weights, W_r = P W, in factors `up` (out, r) and `down` (r, in):

    svd             P = U U^T with the leading left singular vectors. No other W_r of that rank is nearer to W:
                    the squared error is the sum of the squared singular values beyond r (Eckart and Young).
    randomized-svd  the same from a sketch and two power iterations (Halko et al. 2011), for wide layers. A
                    sketch of r + 10 columns misses at most sqrt(1 + r / 9) times the optimum in expectation,
                    before the iterations, each of which brings it nearer.
    qr              Householder QR without pivoting: P projects onto the span of the first r columns of W,
                    which are kept exactly. The error is that of the remaining columns outside this span,
                    the norm of R[r:, r:].
    qr-pivoted      the columns are those that column pivoting puts first, each the longest outside the
                    span of those before it; the error is at most sqrt(n - r) times the next pivot |R[r, r]|.
    qr-importance   the columns are those with the highest scores: important features are read exactly.
    qr-randomized   the columns are chosen by pivoting a sketch of W (rank-revealing QR from samples), which
                    is cheaper for tall W; the error is again the norm of R[r:, r:].
    lu              LU with partial pivoting, P W = L U: the first r columns and the r pivot rows are kept
                    exactly. The error is the norm of the Schur complement.
    lu-complete     LU with complete pivoting: rows and columns are chosen together. The error is again that
                    norm, at most sqrt((m - r) (n - r)) times the next pivot, its largest entry.

numpy's four QR modes are no four decompositions: "reduced" and "complete" hold the same first r columns of
Q, "r" is R alone, and "raw" is LAPACK's packed form of the same; all give the same W_r, that of `qr`.

Where P is orthogonal (all but LU, which keeps rows exact instead), P W is the best there is for its span, whatever
the inputs are; so the activation-aware forms differ in the span alone. The bounds hold for W, or in those forms for
the W S that the span is chosen from. With second moments C = S S^T of the inputs, the span is chosen from W S, so that the error
of the outputs, E |W x - W_r x|^2 = tr((W - W_r) C (W - W_r)^T), is made small. For SVD this is the principal
components of the outputs, and optimal. For QR and LU, S is the Cholesky factor: a column then is a feature
together with what it predicts of the features after it. No inverse of C is taken, so it may be singular, and
full rank is exact in any case.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import scipy.linalg
import torch
from torch import Tensor

from .errors import UsageError
from .linalg import add_ridge, balanced, cholesky_psd, sqrt_psd

Decomposition = Literal[
    "svd",
    "randomized-svd",
    "qr",
    "qr-pivoted",
    "qr-importance",
    "qr-randomized",
    "lu",
    "lu-complete",
]
#: Directions that inputs never take count this fraction of the mean, so that full rank is exact.
RIDGE = 1e-10
#: Columns of a sketch beyond the rank, and how often it is multiplied by W W^T.
OVERSAMPLING, POWER = 10, 2


@dataclass(frozen=True)
class Factors:
    """A linear map at a rank, `up @ down`, in the dtype of the weights it came from.

    Attributes:
        up: (out, r). down: (r, in). Rank by rank they are equally long.
        weight_error: Frobenius norm of what is lost of the weights, rounding to their dtype included.
        output_error: root mean square norm of what is lost of the outputs, likewise; None without second moments.
    """

    up: Tensor
    down: Tensor
    weight_error: float
    output_error: float | None

    @property
    def rank(self) -> int:
        return self.up.shape[1]

    @property
    def product(self) -> Tensor:
        """(out, in) the map as one matrix of that rank."""
        return self.up @ self.down


def decompose(
    weight: Tensor,
    rank: int,
    kind: Decomposition = "svd",
    *,
    moments: Tensor | None = None,
    scores: Tensor | None = None,
    seed: int = 0,
) -> Factors:
    """Decompose a linear map y = W x.

    Args:
        weight: (out, in).
        rank: from 1 to min(out, in).
        moments: (in, in) second moments E x x^T of the inputs, for the activation-aware form.
        scores: (in,) importance of each input for "qr-importance", higher means keep; by default each
            column's share in the error, |W_j|^2 (times C_jj with moments).
        seed: of the randomized forms.

    Raises:
        UsageError: for a kind that there is not, a rank out of range, sizes that do not fit, or values that are not
            finite.
    """
    exact, second = _checked(weight, moments)
    out, width = exact.shape
    if kind not in get_args(Decomposition):
        raise UsageError(
            f"There is no decomposition {kind!r}.",
            f"Choose one of {', '.join(get_args(Decomposition))}.",
        )
    if not 1 <= rank <= min(out, width):
        raise UsageError(
            f"Rank {rank} is not between 1 and {min(out, width)} for a map of {width} to {out} features.",
            "Choose a rank in this range.",
        )
    if scores is not None and kind != "qr-importance":
        raise UsageError(f"{kind} does not look at scores.", "Choose qr-importance.")
    if scores is not None and (len(scores) != width or not torch.isfinite(scores).all()):
        raise UsageError(f"The scores are not {width} finite numbers.", "Give one for each input.")
    generator = torch.Generator().manual_seed(seed)
    if kind in ("svd", "randomized-svd"):
        seen = exact if second is None else _rooted(exact, second)
        up = _principal(seen, rank, generator if kind == "randomized-svd" else None)
        read = up.mT
    else:
        power = exact.square().sum(0) * (1 if second is None else second.diagonal())
        order = torch.arange(width)
        if kind == "qr-importance":
            given = power if scores is None else scores.detach().double()
            order = given.argsort(descending=True, stable=True)
        seen = exact[:, order]
        if second is not None:
            seen = seen @ cholesky_psd(second[order][:, order], RIDGE)
        up, read = _COLUMNS[kind](seen, rank, generator)
    up, down = (half.to(weight.dtype) for half in balanced(up, read @ exact))
    lost = exact - up.double() @ down.double()
    return Factors(
        up,
        down,
        float(lost.norm()),
        None if second is None else float((lost @ second * lost).sum().clamp_min(0).sqrt()),
    )


def _checked(weight: Tensor, moments: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Both in float64.

    Raises:
        UsageError: for sizes that do not fit, or values that are not finite.
    """
    exact = weight.detach().double()
    if not torch.isfinite(exact).all():
        raise UsageError("The weights hold values that are not finite.", "Repair the model first.")
    if moments is None:
        return exact, None
    second = moments.detach().double()
    width = exact.shape[1]
    if second.shape != (width, width):
        raise UsageError(
            f"Second moments of size {tuple(second.shape)} do not fit a map of {width} features.",
            f"Give ({width}, {width}).",
        )
    if not torch.isfinite(second).all():
        raise UsageError(
            "The second moments hold values that are not finite.",
            "See that images and activations are finite; calibrate in float32 or bfloat16.",
        )
    return exact, second


def energies(weight: Tensor, moments: Tensor | None = None) -> Tensor:
    """(min(out, in)) energy of the outputs along their principal directions, falling; without second
    moments, the squared singular values of the weights. What SVD loses at rank r is the sum beyond r."""
    w, second = _checked(weight, moments)
    if second is None:
        plain: Tensor = torch.linalg.svdvals(w).square()
        return plain
    if second.shape[0] <= w.shape[0]:
        root = sqrt_psd(second)
        gram = root @ (w.mT @ w) @ root
    else:
        gram = w @ second @ w.mT
    values: Tensor = torch.linalg.eigvalsh(gram).flip(0).clamp_min(0)
    return values


# -- spans ---------------------------------------------------------------------------------------
# Each gives `up` (out, r) and `read` (r, out): the projector is up @ read.


def _principal(seen: Tensor, rank: int, generator: torch.Generator | None) -> Tensor:
    """(out, r) leading left singular vectors, exact or from a sketch."""
    if generator is None:
        u: Tensor = torch.linalg.svd(seen, full_matrices=False)[0]
        return u[:, :rank]
    columns = min(rank + OVERSAMPLING, *seen.shape)
    sketch = torch.randn(seen.shape[1], columns, generator=generator, dtype=seen.dtype)
    basis = torch.linalg.qr(seen @ sketch.to(seen.device))[0]
    for _ in range(POWER):  # orthonormal in between, so that small directions survive rounding
        basis = torch.linalg.qr(seen.mT @ basis)[0]
        basis = torch.linalg.qr(seen @ basis)[0]
    u = torch.linalg.svd(basis.mT @ seen, full_matrices=False)[0]
    leading: Tensor = basis @ u[:, :rank]
    return leading


Span = tuple[Tensor, Tensor]


def _leading(seen: Tensor, rank: int, _: torch.Generator) -> Span:
    """The first columns."""
    q = torch.linalg.qr(seen[:, :rank])[0]
    return q, q.mT


def _pivoted(seen: Tensor, rank: int, _: torch.Generator) -> Span:
    """The columns that pivoting puts first."""
    return _leading(seen[:, _pivots(seen)], rank, _)


def _sampled(seen: Tensor, rank: int, generator: torch.Generator) -> Span:
    """The columns that pivoting a sketch puts first."""
    rows = min(rank + OVERSAMPLING, seen.shape[0])
    sketch = torch.randn(rows, seen.shape[0], generator=generator, dtype=seen.dtype)
    return _leading(seen[:, _pivots(sketch.to(seen.device) @ seen)], rank, generator)


def _pivots(matrix: Tensor) -> Tensor:
    """Order of the columns under QR with column pivoting."""
    order = scipy.linalg.qr(matrix.cpu().numpy(), mode="r", pivoting=True)[1]
    return torch.from_numpy(order).long().to(matrix.device)


def _lu(seen: Tensor, rank: int, _: torch.Generator) -> Span:
    """LU with partial pivoting."""
    permutation, lower, _upper = torch.linalg.lu(seen)
    return _oblique(permutation.argmax(0), lower, rank)


def _lu_complete(seen: Tensor, rank: int, _: torch.Generator) -> Span:
    """LU with complete pivoting, by LAPACK's getc2, which takes square matrices and goes on to the last row: in
    the cube of the longer side, seconds for a thousand rows."""
    out, width = seen.shape
    square = torch.zeros(max(out, width), max(out, width), dtype=seen.dtype)
    square[:out, :width] = seen
    packed, swaps, _columns, _info = scipy.linalg.lapack.dgetc2(square.numpy())
    rows = list(range(len(square)))
    for i, j in enumerate(swaps.tolist()):
        rows[i], rows[j] = rows[j], rows[i]
    # Rows of the padding are never chosen before all that is there is used up.
    lower = torch.from_numpy(packed).tril(-1)[:, :rank]
    lower.diagonal().fill_(1)
    inside = torch.tensor([i for i, row in enumerate(rows) if row < out])
    chosen = torch.tensor(rows)[inside]
    return _oblique(chosen.to(seen.device), lower[inside].to(seen.device), rank)


def _oblique(rows: Tensor, lower: Tensor, rank: int) -> Span:
    """The projector onto the span of L[:, :r] that leaves the first r of the permuted rows as they are."""
    up = torch.empty_like(lower[:, :rank])
    up[rows] = lower[:, :rank]
    pick = torch.zeros(rank, len(rows), dtype=lower.dtype, device=lower.device)
    pick[torch.arange(rank), rows[:rank]] = 1
    first = lower[:rank, :rank]
    return up, torch.linalg.solve_triangular(first, pick, upper=False, unitriangular=True)


_COLUMNS: dict[str, Callable[[Tensor, int, torch.Generator], Span]] = {
    "qr": _leading,
    "qr-importance": _leading,
    "qr-pivoted": _pivoted,
    "qr-randomized": _sampled,
    "lu": _lu,
    "lu-complete": _lu_complete,
}

# -- roots of second moments ---------------------------------------------------------------------


def _rooted(weight: Tensor, moments: Tensor) -> Tensor:
    """A matrix X with X X^T = W C W^T, by a root on the narrower side."""
    if moments.shape[0] <= weight.shape[0]:
        return weight @ sqrt_psd(moments, RIDGE, RIDGE)
    return sqrt_psd(weight @ add_ridge(moments, RIDGE) @ weight.mT)
