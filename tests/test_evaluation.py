"""Accuracy, its interval, and the paired difference of two."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn

from vitailor.data import Preprocessing, open_images
from vitailor.errors import DataError, UnsupportedModelError
from vitailor.evaluation import Accuracy, evaluate, paired_difference, wilson_interval

PREPROCESSING = Preprocessing(
    input_size=(3, 8, 8),
    crop_pct=1.0,
    interpolation="nearest",
    mean=(0.0, 0.0, 0.0),
    std=(1.0, 1.0, 1.0),
)


class Grey(nn.Module):
    """Its k-th highest output is the class whose grey level (class / 10) is k-th nearest."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.levels = nn.Parameter(torch.arange(classes) / 10)
        self.inner = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm2d(3))

    def forward(self, x: Tensor) -> Tensor:
        return -(x.mean(dim=(1, 2, 3))[:, None] - self.levels).abs()


def grey_batch(greys: Sequence[float], labels: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    x = torch.tensor(greys)[:, None, None, None].expand(-1, 3, 8, 8)
    return [(x, torch.tensor(labels))]


def accuracy(correct: Sequence[bool], list_hash: str = "") -> Accuracy:
    return Accuracy(
        top1=100 * sum(correct) / len(correct),
        top5=100.0,
        images=len(correct),
        top1_interval=(0.0, 100.0),
        correct=tuple(correct),
        list_hash=list_hash,
    )


def test_top1_and_top5_are_percent_of_all_images() -> None:
    # Nearest classes of grey 0.51 are 5, 6, 4, 7, 3; and of 0.0 they are 0, 1, 2, 3, 4.
    found = evaluate(Grey(), grey_batch([0.51, 0.51, 0.51, 0.0], [5, 3, 2, 4]))
    assert (found.top1, found.top5, found.images) == (25.0, 75.0, 4)
    assert found.correct == (True, False, False, False)
    low, high = wilson_interval(1, 4)
    assert found.top1_interval == (100 * low, 100 * high)
    assert set(found.to_json()) == {"top1", "top5", "images", "top1_interval"}
    assert json.loads(json.dumps(found.to_json()))["top1_interval"] == [100 * low, 100 * high]


def test_with_few_classes_top5_is_over_all_of_them() -> None:
    found = evaluate(Grey(classes=2), grey_batch([0.0, 0.0], [0, 1]))
    assert (found.top1, found.top5) == (50.0, 100.0)


def test_outputs_that_are_not_numbers_are_wrong() -> None:
    broken = Grey()
    broken.levels.data.fill_(float("nan"))
    found = evaluate(broken, grey_batch([0.0, 0.1, 0.2], [0, 1, 2]))
    assert (found.top1, found.top5) == (0.0, 0.0)


@pytest.mark.parametrize("batch_size", [None, 1, 3])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_folder_is_evaluated_whatever_the_batches(
    tmp_path: Path, batch_size: int | None, workers: int
) -> None:
    for c in range(10):
        for i in range(2):
            path = tmp_path / f"class{c}" / f"{i}.png"
            path.parent.mkdir(exist_ok=True)
            # The second image of each odd class is of the next lower class.
            level = c - 1 if i and c % 2 else c
            Image.new("RGB", (8, 8), (round(25.5 * level),) * 3).save(path)
    seen: list[tuple[int, int]] = []
    found = evaluate(
        Grey(),
        tmp_path,
        preprocessing=PREPROCESSING,
        batch_size=batch_size,
        workers=workers,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert (found.top1, found.top5, found.images) == (75.0, 100.0, 20)
    assert found.list_hash == open_images(tmp_path, PREPROCESSING).list_hash
    assert seen[-1] == (20, 20)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    drawn = evaluate(Grey(), str(tmp_path), preprocessing=PREPROCESSING, images=10)
    assert drawn.images == 10
    with pytest.raises(DataError, match="10 class folders"):
        evaluate(Grey(classes=4), tmp_path, preprocessing=PREPROCESSING)


def test_the_digits_and_an_opened_set_are_evaluated() -> None:
    by_name = evaluate(Grey(), "digits", preprocessing=PREPROCESSING, images=50, seed=1)
    opened = open_images("digits", PREPROCESSING, images=50, seed=1)
    assert evaluate(Grey(), opened) == by_name
    assert by_name.images == 50


def test_model_and_random_state_are_left_as_found() -> None:
    class Noisy(Grey):
        def forward(self, x: Tensor) -> Tensor:
            assert not self.training
            assert not self.inner[0].training
            assert torch.is_inference_mode_enabled()
            return super().forward(x) + 0 * torch.rand(1)

    model = Noisy()
    model.train()
    model.inner[1].eval()
    flags = [module.training for module in model.modules()]
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    evaluate(model, grey_batch([0.0], [0]))
    with pytest.raises(DataError):
        evaluate(model, grey_batch([0.0], [10]))
    assert [module.training for module in model.modules()] == flags
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == (random.getstate(), np.random.get_state()[1].tolist())  # noqa: NPY002
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    assert all(p.requires_grad and not p.is_inference() for p in model.parameters())


def test_images_take_the_models_precision_and_outputs_may_carry_logits() -> None:
    class Carrying(Grey):
        def forward(self, x: Tensor) -> Any:
            assert x.dtype == torch.bfloat16
            return SimpleNamespace(logits=super().forward(x))

    assert evaluate(Carrying().bfloat16(), grey_batch([0.0, 0.5], [0, 5])).top1 == 100.0


def test_what_cannot_be_evaluated_is_refused() -> None:
    with pytest.raises(DataError, match="no labels"):
        evaluate(Grey(), [torch.zeros(3, 8, 8)])
    with pytest.raises(DataError, match=r"label 10, but the model has 10 classes"):
        evaluate(Grey(), grey_batch([0.0], [10]))
    with pytest.raises(UnsupportedModelError, match="Identity returns no logits"):
        evaluate(nn.Identity(), grey_batch([0.0], [0]))


# -- intervals


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [  # Newcombe (1998), Statistics in Medicine 17:857-872, table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_the_wilson_interval_has_the_published_values(
    successes: int, trials: int, low: float, high: float
) -> None:
    assert wilson_interval(successes, trials) == pytest.approx((low, high), abs=5e-5)
    mirrored = wilson_interval(trials - successes, trials)
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=5e-5)


@given(st.integers(1, 10**6).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_the_wilson_interval_holds_the_estimate_and_stays_in_range(case: tuple[int, int]) -> None:
    low, high = wilson_interval(*case)
    assert 0 <= low <= case[0] / case[1] <= high <= 1
    assert low < high


def test_no_images_have_no_interval() -> None:
    with pytest.raises(DataError):
        wilson_interval(0, 0)


def test_the_paired_interval_has_the_published_values() -> None:
    # Fagerland, Lydersen and Laake (2014): airway reactivity of 21 children before and after a
    # transplant, discordant counts 1 and 7: difference -0.286, Bonett-Price (-0.508 to -0.013).
    before = [True] * 8 + [False] * 13
    after = [True] * 1 + [False] * 7 + [True] * 1 + [False] * 12
    difference, low, high = paired_difference(accuracy(after), accuracy(before))
    assert (difference, low, high) == pytest.approx((-28.6, -50.8, -1.3), abs=0.06)


pairs = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=300)


@given(pairs)
def test_the_paired_interval_is_antisymmetric_and_holds_the_estimate(
    cases: list[tuple[bool, bool]],
) -> None:
    after, before = (accuracy(correct) for correct in zip(*cases, strict=True))
    difference, low, high = paired_difference(after, before)
    assert difference == pytest.approx(after.top1 - before.top1)
    assert -100 <= low <= difference <= high <= 100
    assert paired_difference(before, after) == pytest.approx((-difference, -high, -low))


@given(pairs, st.randoms())
def test_the_order_of_the_images_does_not_matter(
    cases: list[tuple[bool, bool]], shuffler: random.Random
) -> None:
    shuffled = list(cases)
    shuffler.shuffle(shuffled)
    first, second = (
        paired_difference(*(accuracy(correct) for correct in zip(*order, strict=True)))
        for order in (cases, shuffled)
    )
    assert first == second


@given(st.lists(st.booleans(), min_size=1, max_size=3000))
def test_agreement_on_every_image_is_zero_with_an_honest_width(correct: list[bool]) -> None:
    same = accuracy(correct)
    difference, low, high = paired_difference(same, same)
    assert difference == 0
    assert -low == high > 0
    # No discordant pair among n bounds their share by about 3.7 / n (exact, two-sided 95%).
    assert high <= min(100.0, 370 / len(correct))


def test_pairing_is_tighter_than_two_separate_intervals() -> None:
    before = [i % 10 < 7 for i in range(1000)]
    after = [b and i % 100 != 0 for i, b in enumerate(before)]
    difference, low, high = paired_difference(accuracy(after), accuracy(before))
    assert difference == pytest.approx(-1.0)
    assert high < 0
    own_low, own_high = wilson_interval(sum(before), 1000)
    assert high - low < 100 * (own_high - own_low) / 3


def test_different_images_cannot_be_paired() -> None:
    one = accuracy([True, False], "a")
    with pytest.raises(DataError, match="different images"):
        paired_difference(one, accuracy([True, False, True]))
    with pytest.raises(DataError, match="different images"):
        paired_difference(one, accuracy([True, False], "b"))
    assert paired_difference(one, accuracy([True, False]))[0] == 0
