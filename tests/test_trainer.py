"""`train`: any model in, a trained one out, and a teacher that need not be asked twice."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vitailor as vt
from conftest import build, images
from test_compression import same_state
from vitailor.data import open_images
from vitailor.errors import UsageError
from vitailor.trainer import default_teacher
from vitailor.training import Event, TrainConfig, fit
from vitailor.training import teacher as remembering
from vitailor.training.losses import Outputs

QUICK: dict[str, Any] = {"epochs": 2, "batch_size": 8, "lr": 1e-3, "hflip": 0.0}


def data(model: nn.Module, count: int = 20) -> list[tuple[Tensor, Tensor]]:
    return [(images(model, count), torch.arange(count) % 5)]


def test_a_trained_copy_with_its_record(tmp_path):
    model = build()
    before = copy.deepcopy(model)
    trained = vt.train(model, data(model), TrainConfig(**QUICK), val=data(model))
    assert same_state(model, before)
    assert not same_state(trained, model)
    assert not any(module.training for module in trained.modules())
    facts = trained.vitailor.record["training"]
    assert (facts["epochs"], len(facts["losses"]), len(facts["top1"])) == (2, 2, 2)
    assert facts["settings"] == TrainConfig(**QUICK).model_dump(mode="json")
    assert facts["images"] == 20
    assert facts["top1"][-1] == vt.evaluate(trained, data(model)).top1
    x = images(model, 3)
    vt.save(trained, tmp_path / "trained")
    assert torch.equal(vt.load(tmp_path / "trained")(x), trained(x))


def test_compressed_models_are_trained_and_old_accuracies_do_not_stay():
    model = build()
    small = vt.compress(model, vt.TokenMerge(), vt.Budget(macs=0.8), evaluate=data(model))
    assert "top1" in small.vitailor.record
    trained = vt.train(small, [images(model, 16)], TrainConfig(**QUICK), teacher=model)
    assert vt.shape_of(trained) == vt.shape_of(small)
    known = trained.vitailor
    assert known.steps == small.vitailor.steps
    assert known.record["macs"] == small.vitailor.record["macs"]
    assert not {"top1", "top5", "images"} & set(known.record)
    assert known.record["training"]["settings"]["distill"] == "soft"
    losses = known.record["training"]["losses"]
    assert losses[1] < losses[0]


def test_resuming_takes_the_same_model_images_and_teacher(tmp_path):
    model, other = build(), build(seed=4)
    config = TrainConfig(**QUICK, distill="soft")

    def run(model: nn.Module, count: int, teacher: nn.Module, resume: bool = True) -> nn.Module:
        return vt.train(
            model, data(model, count), config, teacher=teacher, folder=tmp_path, resume=resume
        )

    first = run(model, 20, other, resume=False)
    assert same_state(run(model, 20, other), first)
    for changed, what in (
        ((other, 20, other), "another model"),
        ((model, 19, other), "another images"),
        ((model, 20, model), "another teacher"),
    ):
        with pytest.raises(UsageError, match=what):
            run(*changed)


def test_the_teacher_at_hand(tmp_path, monkeypatch):
    from safetensors.torch import save_file

    model = build()
    save_file(model.state_dict(), tmp_path / "dense.safetensors")
    asked: list[str] = []

    def open_model(source: str) -> Any:
        from vitailor.models import OpenedModel, read_weights

        asked.append(source)
        found = build()
        found.load_state_dict(read_weights(source))
        return OpenedModel(found, source)

    monkeypatch.setattr("vitailor.trainer.open_model", open_model)
    monkeypatch.setattr("vitailor.trainer._is_at_hand", lambda source: True)
    source = str(tmp_path / "dense.safetensors")
    small = vt.compress(model, vt.TokenMerge(), vt.Budget(macs=0.8), source=source)
    found = default_teacher(small)
    assert found is not None
    assert same_state(found, model)
    assert asked == [source]
    # Other weights under the same name are not the ones it came from; nor is a missing file.
    save_file(build(seed=8).state_dict(), tmp_path / "dense.safetensors")
    assert default_teacher(small) is None
    (tmp_path / "dense.safetensors").unlink()
    assert default_teacher(small) is None
    assert default_teacher(model) is None


def test_a_teacher_of_other_classes_is_refused():
    model, other = build(), build(num_classes=7)
    with pytest.raises(UsageError, match="teacher has 7 classes and the model 5"):
        vt.train(model, data(model), TrainConfig(**QUICK), teacher=other)
    feature = TrainConfig(**QUICK | {"distill": "feature"})
    vt.train(model, data(model), feature, teacher=other)


def test_teachers_that_do_not_fit_are_refused():
    model = build()
    feature = TrainConfig(**QUICK | {"distill": "feature"})
    with pytest.raises(UsageError, match="teacher gives 32 features and the model 16"):
        vt.train(model, data(model), feature, teacher=build(embed_dim=32))
    with pytest.raises(UsageError, match="cannot take images of"):
        vt.train(model, data(model), feature, teacher=build(img_size=32))


def test_a_teacher_gets_images_with_its_own_mean():
    model, teacher = build(), build(seed=3)
    teacher.pretrained_cfg = teacher.pretrained_cfg | {
        "mean": (0.2, 0.4, 0.6),
        "std": (0.3, 0.2, 0.1),
    }
    given = vt.Preprocessing(
        input_size=(3, 24, 24),
        crop_pct=1.0,
        interpolation="bilinear",
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
    )
    from vitailor.trainer import _on_images_of

    pixels = torch.rand(2, 3, 24, 24)
    mean, std = (torch.tensor(teacher.pretrained_cfg[k]).view(3, 1, 1) for k in ("mean", "std"))
    found = _on_images_of(teacher, model, given)
    assert torch.allclose(found((pixels - 0.5) / 0.5), teacher((pixels - mean) / std), atol=1e-5)
    assert found.num_classes == 5
    # Chosen by the caller, a preprocessing is for both.
    chosen = given.model_copy(update={"mean": (0.1,) * 3})
    assert _on_images_of(teacher, model, chosen) is teacher


def test_what_is_remembered_is_of_the_same_images(tmp_path):
    config = TrainConfig(**QUICK, distill="soft")
    teacher, model = build(seed=3), build()
    other = [(images(model, 20, 7), torch.arange(20) % 5)]
    vt.train(model, data(model), config, teacher=teacher, folder=tmp_path)
    again = vt.train(model, other, config, teacher=teacher, folder=tmp_path)
    alone = vt.train(model, other, config, teacher=teacher)
    assert same_state(again, alone)


def test_validation_images_must_stay_the_same(tmp_path):
    model = build()
    vt.train(model, data(model), TrainConfig(**QUICK), val=data(model), folder=tmp_path)
    for val in (None, data(model, 7)):
        with pytest.raises(UsageError, match="another val"):
            vt.train(
                model, data(model), TrainConfig(**QUICK), val=val, folder=tmp_path, resume=True
            )


# -- remembering the teacher ---------------------------------------------------------------------


def opened(count: int = 20) -> Any:
    return open_images(data(build(), count), None)


class Random(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """Images that come out otherwise every time."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.randn(3, 24, 24), index % 5


@pytest.mark.parametrize(
    ("settings", "worth"),
    [
        ({"epochs": 2}, True),
        ({"epochs": 1}, False),
        ({"epochs": 2, "hflip": 0.5}, False),
        ({"epochs": 3, "hflip": 0.5}, True),
        ({"epochs": 2, "hflip": 1.0}, True),
        ({"epochs": 9, "mixup": 0.8}, False),
    ],
)
def test_what_is_worth_remembering(settings, worth):
    config = TrainConfig(**QUICK | settings)
    assert remembering.worth_remembering(config, 20, 5) == worth
    assert not remembering.worth_remembering(config, 20, 2**26)


def test_images_that_come_out_otherwise_are_noticed():
    assert remembering.probe(open_images(Random(), None)) is None
    seen = remembering.probe(opened())
    assert seen == remembering.probe(opened())
    assert seen != remembering.probe(open_images([images(build(), 20, 5)], None))


@pytest.mark.parametrize("kind", ["soft", "hard", "feature"])
@pytest.mark.parametrize("hflip", [0.0, 0.5, 1.0])
def test_remembered_is_what_the_teacher_says(kind, hflip, monkeypatch):
    teacher = build(seed=3)
    settings = QUICK | {"epochs": 3, "hflip": hflip, "distill": kind}
    calls: list[int] = []
    original = Outputs.forward

    def forward(self: Outputs, x: Tensor) -> Any:
        calls.append(len(x))
        return original(self, x)

    monkeypatch.setattr(Outputs, "forward", forward)
    losses = []
    for limit in (2**30, 0):
        monkeypatch.setattr(remembering, "MAX_BYTES", limit)
        calls.clear()
        losses.append(fit(build(), TrainConfig(**settings), opened(), teacher=teacher).losses)
        asked = sum(calls) - 3 * 24 - 2  # but for the student, and two looks at the widths
        assert asked == (20 * len(remembering.views_of(TrainConfig(**settings))) if limit else 72)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_resuming_reads_what_was_remembered(tmp_path, monkeypatch):
    config = TrainConfig(**QUICK | {"distill": "soft", "checkpoint_every": 1})

    class Stop(Exception):
        pass

    def interrupt(event: Event) -> None:
        if (event.epoch, event.update) == (2, 1):
            raise Stop

    whole, cut = build(), build()
    fit(whole, config, opened(), teacher=build(seed=3))
    with pytest.raises(Stop):
        fit(cut, config, opened(), teacher=build(seed=3), folder=tmp_path, on_event=interrupt)
    assert (tmp_path / remembering.FILE).exists()
    monkeypatch.setattr(remembering, "remember", lambda *a: pytest.fail("asked again"))
    again = build()
    fit(again, config, opened(), teacher=build(seed=3), folder=tmp_path, resume=True)
    assert same_state(again, whole)
    # Damaged, it is made anew.
    monkeypatch.undo()
    (tmp_path / remembering.FILE).write_bytes(b"damaged")
    (tmp_path / "last.pt").unlink()
    again = build()
    fit(again, config, opened(), teacher=build(seed=3), folder=tmp_path, resume=True)
    assert same_state(again, whole)
