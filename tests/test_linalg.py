"""Bases and regressions against their definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vitailor.linalg import add_ridge, balanced, balanced_bases, regress_on_kept, sqrt_psd

sizes = st.integers(1, 6)
seeds = st.integers(0, 1000)


def psd(n: int, seed: int, rank: int | None = None, batch: int = 1) -> Tensor:
    """Random positive semi-definite matrices (batch, n, n) with a wide spectrum."""
    generator = torch.Generator().manual_seed(seed)
    rank = n if rank is None else rank
    shape = (batch, n, rank)
    factor = torch.randn(shape, generator=generator, dtype=torch.float64)
    return factor * torch.logspace(0, -1.5, rank, dtype=torch.float64) ** 2 @ factor.mT


def truncation_error(left: Tensor, right: Tensor, kept: Tensor) -> float:
    """Mean square of a^T b - a^T M b for independent a, b with second moments `left` and `right`."""
    missing = torch.eye(len(left), dtype=left.dtype) - kept
    return float(torch.trace(left @ missing @ right @ missing.T))


@given(sizes, sizes, sizes, seeds)
def test_balanced_factors_have_the_same_product(m, r, n, seed):
    generator = torch.Generator().manual_seed(seed)
    up = 100 * torch.randn(m, r, generator=generator, dtype=torch.float64)
    down = torch.randn(r, n, generator=generator, dtype=torch.float64)
    down[0] = 0
    a, b = balanced(up, down)
    torch.testing.assert_close(a @ b, up @ down)
    torch.testing.assert_close(a[:, 1:].norm(dim=0), b[1:].norm(dim=1))
    torch.testing.assert_close(a[:, 0], up[:, 0])  # the other half is zero: here training can begin


# -- roots ---------------------------------------------------------------------------------------


@given(sizes, seeds)
def test_a_root_squares_to_the_matrix(n, seed):
    matrix = psd(n, seed, batch=3)
    root = sqrt_psd(matrix)
    torch.testing.assert_close(root @ root, matrix)
    torch.testing.assert_close(root, root.mT)
    assert torch.linalg.eigvalsh(root).min() > -1e-9


def test_a_singular_matrix_has_a_finite_root():
    matrix = psd(5, 0, rank=2)
    assert torch.isfinite(sqrt_psd(matrix)).all()
    torch.testing.assert_close(sqrt_psd(matrix) @ sqrt_psd(matrix), matrix)


def test_a_ridge_is_a_fraction_of_the_mean_diagonal():
    matrix = torch.stack([torch.diag(torch.tensor([1.0, 3.0])), torch.zeros(2, 2)])
    expected = torch.stack([torch.diag(torch.tensor([1.2, 3.2])), 0.1 * torch.eye(2)])
    torch.testing.assert_close(add_ridge(matrix, 0.1), expected)


# -- bases ---------------------------------------------------------------------------------------


@given(sizes, seeds)
def test_bases_are_inverse_to_one_another(n, seed):
    to_a, to_b = balanced_bases(psd(n, seed, batch=2), psd(n, seed + 1, batch=2))
    torch.testing.assert_close(to_a @ to_b.mT, torch.eye(n, dtype=to_a.dtype).expand(2, n, n))


@given(st.integers(2, 6), seeds)
def test_leading_dims_are_the_best_of_any_bases(n, seed):
    left, right = psd(n, seed)[0], psd(n, seed + 1)[0]
    to_a, to_b = balanced_bases(left, right)
    singular = torch.linalg.svdvals(sqrt_psd(left) @ sqrt_psd(right))
    generator = torch.Generator().manual_seed(seed)
    for r in range(n + 1):
        kept = to_a[:, :r] @ to_b[:, :r].T
        error = truncation_error(left, right, kept)
        # Eckart and Young: no map of rank r is closer.
        tail = float(singular[r:].square().sum())
        slack = 1e-6 * float(singular.square().sum())
        assert error == pytest.approx(tail, abs=slack)
        others = torch.randn(2, n, n, generator=generator, dtype=left.dtype)
        for other in (torch.eye(n, dtype=left.dtype), *others):
            random = other[:, :r] @ torch.linalg.inv(other)[:r]
            assert error <= truncation_error(left, right, random) + slack


def test_activation_aware_bases_beat_plain_svd():
    """Plain SVD of the product takes no notice of how often a direction is used."""
    left, right = psd(6, 3)[0], psd(6, 8)[0]
    u, _, vt = torch.linalg.svd(left @ right)  # some bases that ignore the moments' roots
    to_a, to_b = balanced_bases(left, right)
    ours = truncation_error(left, right, to_a[:, :3] @ to_b[:, :3].T)
    for basis in (u, vt.T):
        plain = truncation_error(left, right, basis[:, :3] @ basis[:, :3].T)
        assert ours < 0.9 * plain


def test_coordinates_are_balanced():
    """Both sides carry the singular values, uncorrelated: the moments in the new bases are equal."""
    left, right = psd(5, 1)[0], psd(5, 2)[0]
    to_a, to_b = balanced_bases(left, right)
    values = torch.linalg.svdvals(sqrt_psd(left) @ sqrt_psd(right))
    for basis, moments in ((to_a, left), (to_b, right)):
        torch.testing.assert_close(
            basis.T @ moments @ basis, torch.diag(values), rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_singular_moments(rank):
    left, right = psd(5, 1, rank=rank)[0], psd(5, 2, rank=2)[0]
    to_a, to_b = balanced_bases(left, right)
    assert torch.isfinite(to_a).all()
    assert torch.isfinite(to_b).all()
    eye = torch.eye(5, dtype=left.dtype)
    torch.testing.assert_close(to_a @ to_b.T, eye, rtol=0, atol=1e-6)
    # All that is used fits into the smaller rank.
    kept = to_a[:, : min(rank, 2)] @ to_b[:, : min(rank, 2)].T
    scale = float(torch.trace(left) * torch.trace(right))
    assert truncation_error(left, right, kept) <= 1e-6 * scale


# -- regression ----------------------------------------------------------------------------------


@given(st.integers(2, 8), st.data())
def test_regression_is_least_squares(n, data):
    seed = data.draw(seeds)
    kept = sorted(data.draw(st.sets(st.integers(0, n - 1), min_size=1)))
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(50, n, generator=generator, dtype=torch.float64)
    x = x @ torch.randn(n, n, generator=generator, dtype=torch.float64)
    weight = torch.randn(3, n, generator=generator, dtype=torch.float64)
    found = regress_on_kept(weight, x.T @ x / 50, torch.tensor(kept), 1e-12)
    expected = np.linalg.lstsq(x[:, kept].numpy(), (x @ weight.T).numpy(), rcond=None)[0].T
    scale = np.abs(expected).max()
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-5 * scale)


def test_a_strong_ridge_means_no_change():
    """The ridge pulls towards the weights as they are, not towards zero."""
    weight = torch.randn(3, 6, dtype=torch.float64)
    kept = torch.tensor([0, 2, 5])
    found = regress_on_kept(weight, psd(6, 0)[0], kept, 1e9)
    torch.testing.assert_close(found, weight[:, kept], rtol=0, atol=1e-6)


def test_keeping_everything_changes_nothing():
    weight = torch.randn(3, 6, dtype=torch.float64)
    found = regress_on_kept(weight, psd(6, 0)[0], torch.arange(6), 1e-3)
    torch.testing.assert_close(found, weight)
