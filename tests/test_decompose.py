"""Decompositions of a linear map: what theory says of their errors, on shapes of every kind."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vitailor.decompose import Decomposition, Factors, decompose, energies
from vitailor.errors import UsageError

KINDS = get_args(Decomposition)
EXACT = 1e-10


def weights(kind: str, out: int, width: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(out, width, generator=generator, dtype=torch.float64)
    small = min(out, width)
    if kind == "deficient":
        thin = max(1, small // 2)
        w = w[:, :1].expand(out, width) + w[:, :thin] @ w[:thin, :] if small > 1 else 0 * w
    elif kind == "zero":
        w = 0 * w
    elif kind == "ill-conditioned":
        u, _, v = torch.linalg.svd(w, full_matrices=False)
        w = u * torch.logspace(0, -12, small, dtype=torch.float64) @ v
    elif kind == "decaying":
        u, _, v = torch.linalg.svd(w, full_matrices=False)
        w = u * torch.logspace(1, -2, small, dtype=torch.float64) @ v
    return w


def second_moments(width: int, samples: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 1)
    mix = torch.randn(width, width, generator=generator, dtype=torch.float64)
    x = torch.randn(samples, width, generator=generator, dtype=torch.float64) @ mix + 0.5
    return x.mT @ x / samples


sizes = st.integers(1, 24)
seeds = st.integers(0, 1000)
shapes_of_weights = st.sampled_from(["plain", "deficient", "zero", "ill-conditioned", "decaying"])


def close(error: float, expected: float, scale: Tensor) -> bool:
    return abs(error - expected) <= 1e-9 * float(scale.norm()) + 1e-300


@pytest.mark.parametrize("kind", KINDS)
@given(shapes_of_weights, sizes, sizes, seeds, st.sampled_from([None, 2, 100]), st.data())
def test_errors_are_what_is_lost_and_full_rank_is_exact(
    kind, sort, out, width, seed, samples, data
):
    w = weights(sort, out, width, seed)
    moments = None if samples is None else second_moments(width, samples, seed)
    rank = data.draw(st.integers(1, min(out, width)))
    found = decompose(w, rank, kind, moments=moments, seed=seed)
    assert (found.up.shape, found.down.shape) == ((out, rank), (rank, width))
    assert found.rank == rank
    lost = w - found.product
    assert close(found.weight_error, float(lost.norm()), w)
    if moments is None:
        assert found.output_error is None
    else:
        expected = float((lost @ moments @ lost.mT).trace().clamp_min(0).sqrt())
        assert abs(found.output_error - expected) <= 1e-7 * float(w.norm() * moments.trace().sqrt())
    full = decompose(w, min(out, width), kind, moments=moments, seed=seed)
    assert full.weight_error <= EXACT * float(w.norm())


@given(shapes_of_weights, sizes, sizes, seeds, st.data())
def test_no_error_is_below_that_of_svd(sort, out, width, seed, data):
    w = weights(sort, out, width, seed)
    rank = data.draw(st.integers(1, min(out, width)))
    values = torch.linalg.svdvals(w)
    best = decompose(w, rank, "svd").weight_error
    assert close(best, float(values[rank:].norm()), w)  # Eckart and Young
    for kind in KINDS:
        assert decompose(w, rank, kind, seed=seed).weight_error >= best - 1e-9 * float(w.norm())


@given(st.sampled_from(["plain", "decaying"]), sizes, sizes, seeds, st.data())
def test_errors_of_qr_and_lu_in_closed_form(sort, out, width, seed, data):
    w = weights(sort, out, width, seed)
    rank = data.draw(st.integers(1, min(out, width)))
    r = torch.linalg.qr(w)[1]
    assert close(decompose(w, rank, "qr").weight_error, float(r[rank:, rank:].norm()), w)
    import scipy.linalg

    r = torch.from_numpy(scipy.linalg.qr(w.numpy(), mode="r", pivoting=True)[0])
    pivoted = decompose(w, rank, "qr-pivoted").weight_error
    assert close(pivoted, float(r[rank:, rank:].norm()), w)
    if rank < min(out, width):
        assert pivoted <= (width - rank) ** 0.5 * abs(float(r[rank, rank])) * (1 + 1e-9)
    _, lower, upper = torch.linalg.lu(w)
    schur = lower[rank:, rank:] @ upper[rank:, rank:]
    lu = decompose(w, rank, "lu").weight_error
    assert close(lu, float(schur.norm()), w)
    # The same leading columns of full rank: an orthogonal projection is the nearest.
    assert decompose(w, rank, "qr").weight_error <= lu + 1e-9 * float(w.norm())


@given(sizes, sizes, seeds, st.integers(2, 40), st.data())
def test_activation_aware_svd_loses_least_of_the_outputs(out, width, seed, samples, data):
    w = weights("plain", out, width, seed)
    moments = second_moments(width, samples, seed)
    rank = data.draw(st.integers(1, min(out, width)))
    best = decompose(w, rank, "svd", moments=moments).output_error
    scale = float((w @ moments @ w.mT).trace().sqrt())
    # The optimum in closed form: what the principal components of the outputs leave.
    values = torch.linalg.eigvalsh(w @ moments @ w.mT)
    assert abs(best - float(values[: out - rank].clamp_min(0).sum().sqrt())) <= 1e-4 * scale
    plain = decompose(w, rank, "svd").product
    lost = w - plain
    assert best <= float((lost @ moments @ lost.mT).trace().clamp_min(0).sqrt()) + 1e-4 * scale
    for kind in KINDS:
        found = decompose(w, rank, kind, moments=moments, seed=seed)
        assert found.output_error >= best - 1e-4 * scale


@given(st.integers(2, 20), st.integers(2, 20), seeds, st.data())
def test_important_features_are_kept_exactly(out, width, seed, data):
    w = weights("plain", out, width, seed)
    rank = data.draw(st.integers(1, min(out, width)))
    scores = torch.rand(width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    best = scores.argsort(descending=True)[:rank]
    found = decompose(w, rank, "qr-importance", scores=scores)
    assert torch.allclose(found.product[:, best], w[:, best], atol=1e-9)
    longest = decompose(w, rank, "qr-importance").product
    by_norm = w.norm(dim=0).argsort(descending=True)[:rank]
    assert torch.allclose(longest[:, by_norm], w[:, by_norm], atol=1e-9)


@given(st.integers(2, 20), st.integers(2, 20), seeds, st.data())
def test_lu_keeps_its_columns_and_rows_exactly(out, width, seed, data):
    w = weights("plain", out, width, seed)
    rank = data.draw(st.integers(1, min(out, width)))
    product = decompose(w, rank, "lu").product
    assert torch.allclose(product[:, :rank], w[:, :rank], atol=1e-8)
    exact_rows = (product - w).abs().amax(1) < 1e-8
    assert int(exact_rows.sum()) >= rank
    complete = decompose(w, rank, "lu-complete").product
    assert int(((complete - w).abs().amax(0) < 1e-8).sum()) >= rank
    assert int(((complete - w).abs().amax(1) < 1e-8).sum()) >= rank


def test_activation_aware_importance_regresses_the_rest_on_what_is_kept():
    """The best prediction of the outputs from the important features lies in the span."""
    w, moments = weights("plain", 9, 12), second_moments(12, 60)
    scores = torch.arange(12).double()
    kept = [11, 10, 9, 8]
    found = decompose(w, 4, "qr-importance", moments=moments, scores=scores)
    regressed = w @ moments[:, kept] @ torch.linalg.inv(moments[kept][:, kept])
    basis = torch.linalg.qr(found.up)[0]
    outside = regressed - basis @ (basis.mT @ regressed)
    assert outside.norm() < 1e-6 * regressed.norm()


def test_sketches_come_near_the_exact_forms_and_follow_their_seed():
    w = weights("decaying", 120, 80)
    exact = decompose(w, 20, "svd").weight_error
    sketched = decompose(w, 20, "randomized-svd", seed=3)
    assert sketched.weight_error <= 1.01 * exact
    assert torch.equal(sketched.up, decompose(w, 20, "randomized-svd", seed=3).up)
    pivoted = decompose(w, 20, "qr-pivoted").weight_error
    assert decompose(w, 20, "qr-randomized", seed=3).weight_error <= 1.5 * pivoted
    # Pivoting earns its name where columns come in an unlucky order.
    unlucky = torch.cat([1e-3 * w[:, :40], w[:, 40:]], 1)
    lost = {kind: decompose(unlucky, 20, kind).weight_error for kind in KINDS}
    assert max(lost["qr-pivoted"], lost["qr-randomized"]) < 0.8 * lost["qr"]
    assert lost["lu-complete"] < 0.8 * lost["lu"]


@given(st.integers(3, 14), st.integers(3, 14), seeds, st.data())
def test_complete_pivoting_takes_the_largest_entry_each_time(out, width, seed, data):
    """Against the textbook's loop; the error is the Schur complement's, within its bound."""
    w = weights("plain", out, width, seed)
    rank = data.draw(st.integers(1, min(out, width) - 1))
    schur = w.clone()
    for _ in range(rank):
        row, column = divmod(int(schur.abs().argmax()), width)
        schur -= torch.outer(schur[:, column], schur[row]) / schur[row, column].clone()
    error = decompose(w, rank, "lu-complete").weight_error
    assert error == pytest.approx(float(schur.norm()), rel=1e-8)
    left = (out - rank) * (width - rank)
    assert error <= left**0.5 * float(schur.abs().max()) * (1 + 1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_full_rank_is_exact_where_rounding_makes_moments_indefinite(kind):
    """Sums in single precision over inputs that a LayerNorm has made dependent."""
    w = weights("plain", 24, 12)
    c = second_moments(12, 60)
    values, vectors = torch.linalg.eigh(c)
    values[0] = -1e-7 * values.mean()
    found = decompose(w, 12, kind, moments=vectors * values @ vectors.mT)
    assert found.weight_error < 1e-8 * w.norm()


def test_factors_have_the_dtype_of_the_weights_and_errors_tell_of_it():
    half = weights("plain", 6, 5).half()
    found = decompose(half, 5, moments=torch.eye(5))
    assert found.up.dtype == found.down.dtype == torch.float16
    assert isinstance(found, Factors)
    lost = float((half.double() - found.up.double() @ found.down.double()).norm())
    assert found.weight_error == pytest.approx(lost) == pytest.approx(found.output_error)
    assert lost > 1e-5  # rounding alone


@given(shapes_of_weights, sizes, sizes, seeds, st.sampled_from([None, 2, 100]))
def test_energies_are_what_svd_loses(sort, out, width, seed, samples):
    w = weights(sort, out, width, seed)
    moments = None if samples is None else second_moments(width, samples, seed)
    found = energies(w, moments)
    assert found.shape == (min(out, width),)
    scale = w.norm() * (1 if moments is None else moments.trace().sqrt())
    for rank in range(1, len(found) + 1):
        best = decompose(w, rank, moments=moments)
        error = best.weight_error if moments is None else best.output_error
        expected = float(found[rank:].sum().sqrt())
        assert abs(error - expected) <= 1e-6 * float(scale) + 1e-300


@pytest.mark.parametrize("kind", ["qr", "qr-pivoted", "qr-importance", "lu", "lu-complete"])
def test_activation_aware_columns_are_those_of_the_weights_times_a_root(kind):
    """By hand: the span is that of W L for C = L L^T, features ordered by importance first where that decides."""
    w, moments = weights("decaying", 7, 9), second_moments(9, 100)
    order = torch.arange(9)
    if kind == "qr-importance":
        order = (w.square().sum(0) * moments.diagonal()).argsort(descending=True)
    seen = w[:, order] @ torch.linalg.cholesky(moments[order][:, order])
    found = decompose(w, 3, kind, moments=moments).product
    if kind.startswith("lu"):
        # The rows that LU keeps are exact in the product, and its column space is that of the leading columns.
        exact = ((found - w).norm(dim=1) < 1e-8 * w.norm()).sum()
        assert exact == 3
        assert (found - decompose(w, 3, kind).product).norm() > 1e-3
        if kind == "lu":
            q = torch.linalg.qr(seen[:, :3])[0]
            assert (found - q @ q.mT @ found).norm() < 1e-7 * w.norm()
        return
    if kind == "qr-pivoted":
        pivots: list[int] = []
        rest = seen.clone()
        for _ in range(3):
            pivots.append(int(rest.norm(dim=0).argmax()))
            column = rest[:, pivots[-1]] / rest[:, pivots[-1]].norm()
            rest = rest - torch.outer(column, column @ rest)
        seen = seen[:, pivots]
    q = torch.linalg.qr(seen[:, :3])[0]
    torch.testing.assert_close(found, q @ q.mT @ w, rtol=1e-6, atol=1e-6)


def test_columns_are_chosen_from_a_sketch():
    """The randomized form sees only so many mixtures of the rows, which differ by seed."""
    w = torch.randn(60, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    kept = [decompose(w, 2, "qr-randomized", seed=seed).product for seed in range(6)]
    assert len({round(float(product.norm()), 6) for product in kept}) > 1


def test_what_cannot_be_decomposed_is_refused():
    w = weights("plain", 4, 6)
    for rank in (0, 5):
        with pytest.raises(UsageError, match=f"Rank {rank} is not between 1 and 4"):
            decompose(w, rank)
    with pytest.raises(UsageError, match="scores are not 6 finite numbers"):
        decompose(w, 2, "qr-importance", scores=torch.rand(5))
    with pytest.raises(UsageError, match="does not look at scores"):
        decompose(w, 2, "svd", scores=torch.rand(6))
    with pytest.raises(UsageError, match="no decomposition 'QR'"):
        decompose(w, 2, "QR")
    infinite, other = torch.full((6, 6), float("inf")), torch.eye(5)
    for moments, message in ((infinite, "second moments hold"), (other, "do not fit a map of 6")):
        with pytest.raises(UsageError, match=message):
            decompose(w, 2, moments=moments)
        with pytest.raises(UsageError, match=message):
            energies(w, moments)
    w[0, 0] = float("nan")
    for call in (lambda: decompose(w, 2), lambda: energies(w), lambda: energies(w, torch.eye(6))):
        with pytest.raises(UsageError, match="not finite"):
            call()
