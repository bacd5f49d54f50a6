"""Small dense linear algebra that the criteria and reconstructions share, in float64."""

from __future__ import annotations

import torch
from torch import Tensor

#: As a share of the largest, a part of a product that is nothing but rounding.
ZERO = 1e-12


def sqrt_psd(matrix: Tensor, ridge: float = 0.0, least: float = 0.0) -> Tensor:
    """Symmetric square root of a (batch of) positive semi-definite matrices (..., n, n).

    `ridge` is added to the diagonal as a fraction of the mean diagonal, so that a singular matrix gets
    an invertible root. No eigenvalue counts less than `least`, likewise a fraction: rounding may have left a
    matrix not quite positive.
    """
    raised = add_ridge(matrix, ridge)
    values, vectors = torch.linalg.eigh(raised)
    floor = least * raised.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True).clamp_min(0)
    root: Tensor = (vectors * values.maximum(floor).sqrt().unsqueeze(-2)) @ vectors.mT
    return root


def cholesky_psd(matrix: Tensor, ridge: float = 0.0) -> Tensor:
    """Lower triangular S with S S^T = `matrix` + `ridge` * mean diagonal * identity, also where that is
    singular, or by rounding not quite positive."""
    lower, failed = torch.linalg.cholesky_ex(add_ridge(matrix, ridge))
    if failed.item():
        lower = torch.linalg.qr(sqrt_psd(matrix, ridge, ridge))[1].mT
    root: Tensor = lower
    return root


def add_ridge(matrix: Tensor, ridge: float) -> Tensor:
    """`matrix` + `ridge` * mean diagonal * identity; an all-zero matrix gets `ridge` itself."""
    scale = matrix.diagonal(dim1=-2, dim2=-1).mean(-1)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale)) * ridge
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    return matrix + scale[..., None, None] * eye


def balanced(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """The factors (m, r) and (r, n) of the same product with columns of one as long as rows of the other, as training
    likes them. What is zero on one side stays as it is on the other, so that training can get at it."""
    columns, rows = up.norm(dim=0), down.norm(dim=1)
    there = columns * rows > ZERO * (columns * rows).max()
    ratio = torch.where(there, (rows / columns).sqrt(), torch.ones_like(rows))
    return up * ratio, down / ratio.unsqueeze(1)


def balanced_bases(left: Tensor, right: Tensor, ridge: float = 1e-8) -> tuple[Tensor, Tensor]:
    """Bases that sort the dims of an inner product a^T b by how much they matter.

    With second moments C_a = `left` and C_b = `right`, the rank-r map M that keeps a^T M b closest to
    a^T b in mean square, for independent a and b, comes from the SVD of C_a^(1/2) C_b^(1/2) =
    U S V^T. Here a^T b = (A^T a)^T (B^T b) with A = C_b^(1/2) V S^(-1/2), B = C_a^(1/2) U S^(-1/2), and
    keeping the first r coordinates of both sides is that optimum for every r.

    Args:
        left, right: (..., n, n) second moments.

    Returns:
        A, B: (..., n, n) with A B^T = identity.
    """
    root_a, root_b = sqrt_psd(left, ridge), sqrt_psd(right, ridge)
    u, s, vt = torch.linalg.svd(root_a @ root_b)
    scale = s.rsqrt().unsqueeze(-2)
    return root_b @ vt.mT * scale, root_a @ u * scale


def regress_on_kept(weight: Tensor, covariance: Tensor, kept: Tensor, ridge: float) -> Tensor:
    """Ridge regression of `weight` x on the kept coordinates of x: W C[:, k] (C[k, k] + ridge)^-1.

    Args:
        weight: (m, n). covariance: (n, n) of x. kept: (r,) indices.
        ridge: fraction of the mean variance of the kept coordinates.

    Returns:
        (m, r) weights on x[kept] whose output is closest to weight @ x in mean square.
    """
    kept_covariance = add_ridge(covariance[kept][:, kept], ridge)
    cross = weight @ covariance[:, kept]
    # The ridge pulls towards the uncompensated weights, not towards zero.
    prior = weight[:, kept] @ (kept_covariance - covariance[kept][:, kept])
    refit: Tensor = torch.linalg.solve(kept_covariance, (cross + prior).mT).mT
    return refit
