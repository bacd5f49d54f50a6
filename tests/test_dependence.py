"""The Hilbert-Schmidt independence criterion against its formula."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from conftest import build, images
from vitailor import dependence as d
from vitailor.errors import DataError, UsageError


def samples(*sizes: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*sizes, generator=generator, dtype=torch.float64)


def plain_gaussian(x: Tensor, bandwidths: tuple[float, ...]) -> Tensor:
    n = len(x)
    gram = torch.zeros(n, n, dtype=x.dtype)
    for i in range(n):
        for j in range(n):
            far = float((x[i] - x[j]).square().sum())
            gram[i, j] = sum(math.exp(-far / (2 * s * s)) for s in bandwidths) / len(bandwidths)
    return gram


def plain_biased(k: Tensor, l: Tensor) -> Tensor:
    n = len(k)
    h = torch.eye(n, dtype=k.dtype) - torch.ones(n, n, dtype=k.dtype) / n
    return torch.trace(k @ h @ l @ h) / (n - 1) ** 2


def plain_unbiased(k: Tensor, l: Tensor) -> float:
    """The U-statistic as what it is: a mean over quadruples of different samples."""
    n, total = len(k), 0.0
    every = [(i, j, q, r) for i in range(n) for j in range(n) for q in range(n) for r in range(n)]
    every = [quad for quad in every if len(set(quad)) == 4]
    for i, j, q, r in every:
        total += float(k[i, j] * (l[i, j] + l[q, r] - 2 * l[i, q]))
    return total / len(every)


WIDTHS = st.sampled_from([d.BANDWIDTHS, (3.0,), (0.5, 1.0, 7.0), (4.0, 1.0, 2.0)])


@given(st.integers(1, 4), st.integers(4, 9), st.integers(1, 6), WIDTHS, st.integers(0, 99))
def test_scores_are_those_of_the_formula(units, images, tokens, widths, seed):
    x, y = (
        3 * samples(units, images, tokens, seed=seed),
        samples(images, 5, seed=seed + 1).softmax(-1),
    )
    found = d.relevance(x, y, widths)
    for one, score in zip(x, found, strict=True):
        expected = plain_biased(plain_gaussian(one, widths), y @ y.mT)
        assert float(score) == pytest.approx(float(expected), rel=1e-6, abs=1e-15)
        assert score >= 0


@given(st.integers(4, 6), st.integers(0, 99))
def test_the_unbiased_estimate_is_the_mean_over_quadruples(images, seed):
    x, y = samples(1, images, 3, seed=seed), samples(images, 4, seed=seed + 1)
    k, l = plain_gaussian(x[0], (2.0,)), y @ y.mT
    found = d.relevance(x, y, (2.0,), "unbiased")
    assert float(found[0]) == pytest.approx(plain_unbiased(k, l), rel=1e-6, abs=1e-12)


def test_redundancy_is_the_mean_dependence_on_the_others():
    x = samples(4, 7, 3)
    grams = [plain_gaussian(one, d.BANDWIDTHS) for one in x]
    for u, score in enumerate(d.redundancy(x)):
        others = [plain_biased(grams[u], grams[v]) for v in range(4) if v != u]
        assert float(score) == pytest.approx(float(sum(others)) / 3, rel=1e-6)
    assert d.redundancy(x[:1]).tolist() == [0.0]


@pytest.mark.parametrize("estimator", ["biased", "unbiased"])
@pytest.mark.parametrize(("spread", "offset"), [(1.0, 0.0), (0.1, 0.0), (0.1, 10.0)])
def test_single_precision_is_enough(estimator, spread, offset):
    # Samples near to each other, far from zero: what a neuron that hardly moves looks like.
    x, y = spread * samples(8, 24, 50) + offset, (spread**3 * samples(24, 10)).softmax(-1)
    x, y = x.float().double(), y.float().double()
    for score in (d.relevance, lambda x, y, estimator: d.redundancy(x, estimator=estimator)):
        exact = score(x, y, estimator=estimator)
        found = score(x.float(), y.float(), estimator=estimator).double()
        # The unbiased estimate is a small difference of sums, which the biased one tells the size of.
        scale = score(x, y, estimator="biased")
        assert ((found - exact).abs() / scale).max() < 1e-6 * (1 if estimator == "biased" else 20)


def test_chunks_change_nothing(monkeypatch):
    x, y = samples(10, 8, 3), samples(8, 4).softmax(-1)
    whole = d.relevance(x, y)
    monkeypatch.setattr(d, "ENTRIES", 3 * 64)
    assert torch.allclose(d.relevance(x, y), whole, rtol=1e-12)


def test_what_predictions_depend_on_scores_above_noise():
    generator = torch.Generator().manual_seed(0)
    classes = torch.randint(0, 4, (200,), generator=generator)
    y = torch.eye(4, dtype=torch.float64)[classes]
    tells = classes[:, None] + 0.1 * samples(200, 3)
    noise = samples(200, 3, seed=1)
    for estimator in ("biased", "unbiased"):
        scores = d.relevance(torch.stack([tells, noise]), y, estimator=estimator)
        assert scores[0] > 20 * scores[1].abs()
    # Independent samples: the unbiased estimate is zero in the mean, the biased one is not.
    many = samples(400, 12, 2, seed=3)
    unbiased, biased = (
        float(d.relevance(many, samples(12, 3, seed=4), estimator=e).mean())
        for e in ("unbiased", "biased")
    )
    assert abs(unbiased) < 0.1 * biased


def test_the_median_bandwidth_does_not_depend_on_scale():
    x, y = samples(3, 9, 4), samples(9, 4)
    scores = [d.relevance(scale * x, y, "median") for scale in (1.0, 1000.0)]
    assert torch.allclose(*scores, rtol=1e-9)
    assert d.relevance(1000 * x, y).std() < 1e-9  # fixed bandwidths saturate there
    assert torch.isfinite(d.relevance(torch.zeros(1, 9, 4).double(), y, "median")).all()


def test_too_few_images_and_bad_bandwidths_are_refused():
    with pytest.raises(UsageError, match="too few"):
        d.relevance(samples(1, 3, 2), samples(3, 2), estimator="unbiased")
    with pytest.raises(UsageError, match="not all positive"):
        d.gaussian(samples(1, 3, 2), (1.0, 0.0))


# -- units of a model ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit3_small_patch16_224"])
def test_units_are_scored_by_what_they_put_out(name):
    model = build(name).double()
    batches = [images(model, 6, seed=1), images(model, 6, seed=2)]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = d.score(model, batches, tokens=True)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    expected = {
        (i, what): 0.0 for i in range(2) for what in ("heads", "relevance", "activity", "tokens")
    }
    for x in batches:
        seen: dict[tuple[int, str], Tensor] = {}
        handles = [
            block.get_submodule(child).register_forward_pre_hook(
                lambda _, args, key=(i, child), into=seen: into.update({key: args[0]})
            )
            for i, block in enumerate(model.blocks)
            for child in ("attn", "attn.proj", "mlp.fc2")
        ]
        with torch.no_grad():
            y = model(x).softmax(-1)
        for handle in handles:
            handle.remove()
        for i in range(2):
            mixed, hidden = seen[i, "attn.proj"], seen[i, "mlp.fc2"]
            heads = [mixed[..., 8 * h : 8 * h + 8].mean(-1) for h in range(2)]
            grams = [plain_gaussian(head, d.BANDWIDTHS) for head in heads]
            twice = plain_biased(*grams)
            scores = [plain_biased(gram, y @ y.mT) - 0.1 * twice for gram in grams]
            expected[i, "heads"] += torch.stack(scores) / 2
            scores = [
                plain_biased(plain_gaussian(hidden[..., f], d.BANDWIDTHS), y @ y.mT)
                for f in range(hidden.shape[-1])
            ]
            expected[i, "relevance"] += torch.stack(scores) / 2
            values = model.blocks[i].attn.qkv(seen[i, "attn"])[..., 32:].detach()
            scores = [
                plain_biased(plain_gaussian(values[:, n], d.BANDWIDTHS), y @ y.mT)
                for n in range(values.shape[1])
            ]
            expected[i, "tokens"] += torch.stack(scores) / 2
            expected[i, "activity"] += hidden.abs().mean((0, 1)) / 2
    for i, block in enumerate(found):
        assert torch.allclose(block.heads, expected[i, "heads"], rtol=1e-6)
        assert torch.allclose(block.relevance, expected[i, "relevance"], rtol=1e-6)
        assert torch.allclose(block.activity, expected[i, "activity"], rtol=1e-6)
        low, high = expected[i, "tokens"].aminmax()
        assert torch.allclose(block.tokens, (expected[i, "tokens"] - low) / (high - low), atol=1e-6)


def test_neurons_mix_relevance_and_activity():
    scores = d.UnitScores(
        torch.zeros(1), torch.tensor([1.0, 3.0, 2.0]), torch.tensor([40.0, 0.0, 20.0])
    )
    assert scores.neurons(1.0).tolist() == [0.0, 1.0, 0.5]
    assert scores.neurons(0.0).tolist() == [1.0, 0.0, 0.5]
    assert scores.neurons().tolist() == pytest.approx([0.9, 0.1, 0.5])
    alike = d.UnitScores(torch.zeros(1), torch.ones(3), torch.ones(3))
    assert alike.neurons().tolist() == [0.0, 0.0, 0.0]


def test_no_images_are_refused():
    with pytest.raises(DataError, match="no calibration images"):
        d.score(build(), [])
