"""The training loop: what it computes does not depend on how it is run."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.data import Mixup
from torch import Tensor, nn

from conftest import build, images
from vitailor.data import open_images
from vitailor.errors import TrainingError, UsageError
from vitailor.gates import gates_of, insert_gates, l1, shrink
from vitailor.preprocessing import Preprocessing
from vitailor.training import Event, TrainConfig, fit
from vitailor.training.images import Augmentation, GlobalBatches, Seeded, reseed
from vitailor.training.losses import teacher_loss, total_loss
from vitailor.training.prepare import optimizer_for, parameter_groups
from vitailor.training.progress import Meter

QUICK = {"epochs": 2, "batch_size": 8, "lr": 1e-3, "hflip": 0.0}


def dataset(count: int = 20, model: nn.Module | None = None) -> Any:
    model = build() if model is None else model
    x = images(model, count).float()
    return open_images([(x, torch.arange(count) % 5)], None)


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


# -- what is seen --------------------------------------------------------------------------------


@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_processes_share_the_same_global_batches(processes, accumulate):
    whole = list(GlobalBatches(20, 8, 1, 0, 1, seed=3, epoch=1))
    assert len(whole) == 3
    assert sorted({index for batch in whole for _, index in batch}) == list(range(20))
    parts = [
        list(GlobalBatches(20, 8, accumulate, rank, processes, seed=3, epoch=1))
        for rank in range(processes)
    ]
    for update, batch in enumerate(whole):
        found = [
            key
            for part in range(accumulate)
            for rank in range(processes)
            for key in parts[rank][update * accumulate + part]
        ]
        assert found == batch
    rest = list(GlobalBatches(20, 8, accumulate, 0, processes, seed=3, epoch=1, first=2))
    assert rest == parts[0][2 * accumulate :]
    assert whole != list(GlobalBatches(20, 8, 1, 0, 1, seed=3, epoch=2))
    assert whole != list(GlobalBatches(20, 8, 1, 0, 1, seed=4, epoch=1))


def test_sets_smaller_than_a_batch_are_repeated():
    (batch,) = GlobalBatches(3, 8, 1, 0, 1, seed=0, epoch=0)
    assert len(batch) == 8
    assert {index for _, index in batch} == {0, 1, 2}


def digits(config: TrainConfig) -> Any:
    plain = Preprocessing(
        input_size=(3, 32, 32),
        crop_pct=1.0,
        interpolation="bilinear",
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
    )
    return open_images("digits:train", Augmentation.of(plain, config))


def test_augmentation_depends_on_seed_epoch_and_image_alone():
    config = TrainConfig(
        scale=(0.3, 1.0), rand_augment="rand-m9-mstd0.5", random_erasing=0.5, hflip=0.5
    )
    seeded = Seeded(digits(config), 7)
    first = seeded[0, 3][0]
    assert first.shape == (3, 32, 32)
    torch.rand(5)
    seeded[1, 9]
    assert torch.equal(seeded[0, 3][0], first)
    assert not torch.equal(seeded[1, 3][0], first)
    assert not torch.equal(Seeded(digits(config), 8)[0, 3][0], first)


def test_without_augmentation_training_sees_what_evaluation_sees():
    config = TrainConfig(hflip=0.0)
    plain = Preprocessing(
        input_size=(3, 32, 32),
        crop_pct=1.0,
        interpolation="bilinear",
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
    )
    expected = open_images("digits:train", plain)[5][0]
    assert torch.equal(Seeded(digits(config), 0)[0, 5][0], expected)


# -- losses --------------------------------------------------------------------------------------


def test_distillation_losses_written_out():
    torch.manual_seed(0)
    student = (torch.randn(4, 6), torch.randn(4, 5))
    teacher = (torch.randn(4, 6), torch.randn(4, 5))
    soft = TrainConfig(distill="soft", temperature=3.0)
    p, q = (teacher[1] / 3).softmax(-1), (student[1] / 3).softmax(-1)
    expected = 9 * (p * (p / q).log()).sum(-1).mean()
    torch.testing.assert_close(teacher_loss(student, teacher, soft), expected)
    hard = teacher_loss(student, teacher, TrainConfig(distill="hard"))
    rows = student[1].log_softmax(-1)[torch.arange(4), teacher[1].argmax(-1)]
    torch.testing.assert_close(hard, -rows.mean())
    feature = teacher_loss(student, teacher, TrainConfig(distill="feature"))
    torch.testing.assert_close(
        feature, (student[0] - teacher[0]).square().sum() / teacher[0].square().sum()
    )
    labels = torch.tensor([0, 1, 2, 3])
    both = total_loss(student, teacher, labels, TrainConfig(distill="hard", alpha=0.3))
    task = nn.functional.cross_entropy(student[1], labels)
    torch.testing.assert_close(both, 0.3 * hard + 0.7 * task)


@pytest.mark.parametrize("kind", ["soft", "hard", "feature"])
def test_a_student_comes_nearer_to_its_teacher_without_labels(kind):
    teacher, student = build(seed=1), build(seed=2)
    before = weights(teacher)
    x = images(teacher, 16).float()
    data = open_images([x], None)
    config = TrainConfig(**QUICK | {"epochs": 8, "distill": kind, "lr": 3e-3})
    result = fit(student, config, data, teacher=teacher)
    assert result.losses[-1] < 0.8 * result.losses[0]
    assert torch.equal(weights(teacher), before)


# -- the loop ------------------------------------------------------------------------------------


def test_training_learns_and_tells():
    model, events = build(), list[Event]()
    random_state = torch.get_rng_state()
    result = fit(
        model,
        TrainConfig(**QUICK | {"epochs": 6, "lr": 3e-3}),
        dataset(),
        val=dataset(),
        on_event=events.append,
    )
    assert result.losses[-1] < 0.9 * result.losses[0]
    assert len(result.losses) == len(result.top1) == result.epochs == 6
    assert [e.update for e in events[:4]] == [1, 2, 3, 3]
    assert events[3].top1 == result.top1[0]
    assert events[-2].seconds_left == 0
    assert not model.training
    assert torch.equal(torch.get_rng_state(), random_state)


def test_accumulation_is_the_big_batch():
    found = []
    for accumulate in (1, 4):
        model = build(seed=5)
        # Not Adam: it makes steps out of the rounding noise where gradients are zero.
        config = TrainConfig(
            **QUICK | {"lr": 0.02}, optimizer="sgd", accumulate=accumulate, clip_grad=None
        )
        fit(model, config, dataset())
        found.append(weights(model))
    torch.testing.assert_close(found[0], found[1], atol=1e-6, rtol=1e-5)
    assert (found[0] - weights(build(seed=5))).abs().max() > 1e-3


def test_workers_change_nothing():
    found = []
    for workers in (0, 2):
        model = build(seed=5)
        fit(model, TrainConfig(**QUICK | {"epochs": 1}, workers=workers), dataset())
        found.append(weights(model))
    assert torch.equal(found[0], found[1])


def test_gates_have_their_own_learning_rate_and_no_decay():
    model = insert_gates(build())
    start = {name: gate.detach().clone() for name, gate in gates_of(model)}
    config = TrainConfig(**QUICK | {"lr": 1e-12, "weight_decay": 0.5}, gate_lr=1e-2)
    before = weights(build())
    fit(model, config, dataset())
    assert all((gate - start[name]).abs().max() > 1e-3 for name, gate in gates_of(model))
    kept = torch.cat(
        [p.detach().flatten() for n, p in model.named_parameters() if not n.endswith(".gate")]
    )
    torch.testing.assert_close(kept, before, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("settings", "fused"),
    [
        ({}, True),
        ({"optimizer": "sgd"}, True),
        ({"optimizer": "lion"}, None),
        ({"precision": "fp16"}, None),
    ],
)
def test_an_update_is_one_kernel_where_there_is_one(settings, fused):
    optimizer = optimizer_for(build(), TrainConfig(**settings))
    assert optimizer.param_groups[0].get("fused") is fused


def test_matrices_alone_decay():
    model = insert_gates(build())
    config = TrainConfig(lr=0.1, gate_lr=0.3, weight_decay=0.5)
    settings = {
        id(parameter): (group["weight_decay"], group["lr"])
        for group in parameter_groups(model, config)
        for parameter in group["params"]
    }
    for name, parameter in model.named_parameters():
        matrix = parameter.dim() > 1 and name not in ("pos_embed", "cls_token")
        expected = (0.0, 0.3) if name.endswith(".gate") else (0.5 if matrix else 0.0, 0.1)
        assert settings[id(parameter)] == expected, name


def test_gates_are_a_hundred_times_as_fast_unless_told_otherwise():
    moved = {}
    for lr, gate_lr in ((1e-4, None), (1e-4, 1e-2), (1e-4, 1e-4)):
        model = insert_gates(build())
        fit(model, TrainConfig(**QUICK | {"lr": lr}, gate_lr=gate_lr), dataset())
        moved[gate_lr] = torch.cat([gate.detach().flatten() for _, gate in gates_of(model)])
    assert torch.equal(moved[None], moved[1e-2])
    assert not torch.equal(moved[None], moved[1e-4])


def test_penalties_and_proximal_steps_make_gates_small():
    sums = {}
    for name, extra in {
        "plain": {},
        "loss": {"penalty": lambda m: 0.1 * l1(m)},
        "proximal": {"after_update": lambda m, lr: shrink(m, 0.5 * lr)},
    }.items():
        model = insert_gates(build())
        fit(model, TrainConfig(**QUICK, gate_lr=1e-2), dataset(), **extra)
        sums[name] = l1(model).item()
    assert sums["loss"] < sums["plain"]
    assert sums["proximal"] < sums["plain"]


def test_a_moving_average_is_what_is_returned():
    plain, averaged = build(), build()
    start = weights(plain)
    fit(plain, TrainConfig(**QUICK), dataset())
    fit(averaged, TrainConfig(**QUICK, ema=0.9), dataset())
    moved = (weights(plain) - start).norm()
    assert 0 < (weights(averaged) - start).norm() < moved


@pytest.mark.parametrize(
    "settings",
    [
        {"label_smoothing": 0.3},
        {"mixup": 0.8},
        {"cutmix": 1.0},
        {"mixup": 0.8, "cutmix": 1.0, "label_smoothing": 0.1},
    ],
)
def test_the_task_loss_is_that_of_its_settings(settings):
    """The first update's loss, written out."""
    config = TrainConfig(
        **QUICK | {"epochs": 1, "batch_size": 20, "lr": 1e-12, "weight_decay": 0.0}, **settings
    )
    model, data = build(), dataset()
    (keys,) = GlobalBatches(20, 20, 1, 0, 1, seed=0, epoch=0)
    x = torch.stack([data[i][0] for _, i in keys])
    y = torch.tensor([data[i][1] for _, i in keys])
    smoothing = config.label_smoothing
    reseed(0, 0, 0, 0, 0)
    if config.mixes:
        mix = Mixup(config.mixup, config.cutmix, label_smoothing=smoothing, num_classes=5)
        x, y = mix(x, y)
        smoothing = 0.0
    with torch.no_grad():
        expected = F.cross_entropy(model(x), y, label_smoothing=smoothing)
    (loss,) = fit(model, config, data).losses
    assert loss == pytest.approx(float(expected), rel=1e-5)
    (plain,) = fit(build(), config.model_copy(update=dict.fromkeys(settings, 0.0)), data).losses
    assert abs(loss - plain) > 1e-3


def test_images_of_any_precision_train():
    model = build()
    data = open_images([(images(model, 8).double(), torch.arange(8) % 5)], None)
    exact = build()
    fit(model, TrainConfig(**QUICK, distill="soft"), data, teacher=build(seed=3))
    same = open_images([(images(exact, 8).float(), torch.arange(8) % 5)], None)
    fit(exact, TrainConfig(**QUICK, distill="soft"), same, teacher=build(seed=3))
    torch.testing.assert_close(weights(model), weights(exact), atol=1e-6, rtol=1e-5)


def test_half_precision_stays_close():
    exact, rough = build(), build()
    fit(exact, TrainConfig(**QUICK), dataset())
    fit(rough, TrainConfig(**QUICK, precision="bf16"), dataset())
    assert 0 < (weights(exact) - weights(rough)).norm() < 0.1 * weights(exact).norm()
    assert all(p.dtype == torch.float32 for p in rough.parameters())


def test_a_loss_that_is_not_finite_stops_with_the_last_good_checkpoint(tmp_path):
    model = build()
    calls = 0

    def explode(_: nn.Module) -> Tensor:
        nonlocal calls
        calls += 1
        return torch.tensor(float("nan") if calls == 5 else 0.0)

    with pytest.raises(
        TrainingError, match=r"nan at epoch 2, update 2 of 3\. The last good .*last\.pt"
    ):
        fit(model, TrainConfig(**QUICK), dataset(), folder=tmp_path, penalty=explode)
    assert torch.isfinite(weights(model)).all()


def test_gradients_that_are_not_finite_stop_before_the_update(tmp_path):
    config = TrainConfig(**QUICK, checkpoint_every=1)
    model = build()

    class Poison(torch.autograd.Function):
        """The identity, with gradients that are not finite."""

        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad * float("nan")

    updates: list[int] = []

    def penalty(model: nn.Module) -> Tensor:
        updates.append(1)
        gate = model.cls_token.sum() * 0
        return Poison.apply(gate) if len(updates) == 3 else gate

    with pytest.raises(TrainingError, match=r"gradient's norm is nan at epoch 1, update 3"):
        fit(model, config, dataset(), folder=tmp_path, penalty=penalty)
    state = torch.load(tmp_path / "last.pt")
    assert (state["epoch"], state["update"]) == (0, 2)
    assert all(torch.isfinite(value).all() for value in state["model"].values())


@pytest.mark.parametrize("schedule", ["cosine", "tanh", "step"])
def test_every_schedule_warms_up_and_falls(schedule):
    rates: list[float] = []
    config = TrainConfig(**QUICK | {"epochs": 6}, schedule=schedule, warmup_epochs=1)
    fit(build(), config, dataset(), on_event=lambda event: rates.append(event.lr))
    assert rates[0] < max(rates)
    assert rates[-1] < 0.5 * max(rates)
    assert max(rates) <= config.lr


def test_steps_are_taken_after_each_third():
    for epochs, expected in ((6, [1, 1, 0.1, 0.1, 0.01, 0.01]), (4, [1, 0.1, 0.01, 0.01])):
        rates: dict[int, float] = {}
        config = TrainConfig(**QUICK | {"epochs": epochs}, schedule="step")
        fit(build(), config, dataset(), on_event=lambda e, r=rates: r.update({e.epoch: e.lr}))
        assert list(rates.values()) == pytest.approx([config.lr * x for x in expected])


def test_the_best_checkpoint_is_of_the_best_epoch(tmp_path, monkeypatch):
    found = iter([10.0, 50.0, 20.0])
    monkeypatch.setattr("vitailor.training.loop._Run._validated", lambda *_: next(found))
    config = TrainConfig(**QUICK | {"epochs": 3})
    assert fit(build(), config, dataset(), val=dataset(), folder=tmp_path).top1 == (10, 50, 20)
    epochs = [torch.load(tmp_path / name)["epoch"] for name in ("best.pt", "last.pt")]
    assert epochs == [2, 3]


def test_a_training_begun_anew_leaves_nothing_of_the_last_one(tmp_path):
    fit(build(), TrainConfig(**QUICK), dataset(), folder=tmp_path)

    def explode(_: nn.Module) -> Tensor:
        return torch.tensor(float("nan"))

    with pytest.raises(TrainingError, match="no checkpoint yet"):
        fit(build(), TrainConfig(**QUICK), dataset(), folder=tmp_path, penalty=explode)
    assert not (tmp_path / "best.pt").exists()


def test_mixing_needs_no_labels_where_none_are_learned():
    model = build()
    unlabeled = open_images([images(model, 16).float()], None)
    config = TrainConfig(**QUICK, distill="soft", mixup=0.8)
    losses = fit(model, config, unlabeled, teacher=build(seed=3)).losses
    assert losses[1] < losses[0]


def test_trackers_are_told(tmp_path, monkeypatch):
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
    from accelerate.utils import LoggerType

    told: list[dict[str, Any]] = []
    finished: list[int] = []
    # It would part processes that have another stage to train together.
    monkeypatch.delattr("accelerate.Accelerator.end_training")

    class Notes(GeneralTracker):
        name, requires_logging_directory = "notes", False

        def __init__(self, run_name: str, **_: Any) -> None:
            super().__init__()

        @property
        def tracker(self) -> None:
            return None

        def store_init_configuration(self, values: dict[str, Any]) -> None:
            assert all(isinstance(value, str) for value in values.values())

        def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
            told.append(values | {"step": step})

        def finish(self) -> None:
            finished.append(1)

    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "tensorboard", Notes)
    monkeypatch.setattr("accelerate.tracking._available_trackers", [LoggerType.TENSORBOARD])
    config = TrainConfig(**QUICK, tracker="tensorboard")
    fit(build(), config, dataset(), val=dataset(), folder=tmp_path)
    assert [row["step"] for row in told if "loss" in row] == list(range(6))
    assert [row["step"] for row in told if "top1" in row] == [3, 6]
    assert finished == [1]
    nan = {"penalty": lambda _: torch.tensor(float("nan"))}
    with pytest.raises(TrainingError):
        fit(build(), config, dataset(), folder=tmp_path, **nan)
    assert finished == [1, 1]


def test_forecasts_are_made_of_this_runs_speed():
    meter = Meter(seen=100, seconds=50.0)
    assert (meter.overall, meter.speed, meter.seconds_for(7)) == (2, 0, float("inf"))
    meter.add(100, 10.0)
    assert (meter.speed, meter.seconds_for(30)) == (10, 3)
    assert meter.overall == pytest.approx(200 / 60)


# -- interruptions -------------------------------------------------------------------------------


class Stop(Exception):
    pass


@pytest.mark.parametrize("stop", [(1, 2), (2, 1), (2, 3)])
@pytest.mark.parametrize("extra", [{}, {"ema": 0.9, "mixup": 0.8}, {"precision": "bf16"}])
def test_resumed_equals_uninterrupted(tmp_path, stop, extra):
    overrides = {"drop_rate": 0.1, "drop_path_rate": 0.1}
    config = TrainConfig(**QUICK | extra, checkpoint_every=1)
    whole = build(**overrides)
    expected = fit(whole, config, dataset(), val=dataset(), folder=tmp_path / "whole")

    def interrupt(event: Event) -> None:
        if (event.epoch, event.update) == stop:
            raise Stop

    model = build(**overrides)
    with pytest.raises(Stop):
        fit(model, config, dataset(), val=dataset(), folder=tmp_path / "cut", on_event=interrupt)
    again = build(seed=9, **overrides)
    found = fit(again, config, dataset(), val=dataset(), folder=tmp_path / "cut", resume=True)
    assert torch.equal(weights(again), weights(whole))
    assert (found.losses, found.top1) == (expected.losses, expected.top1)


def test_resuming_with_other_settings_is_refused(tmp_path):
    fit(build(), TrainConfig(**QUICK), dataset(), folder=tmp_path)
    other = TrainConfig(**QUICK | {"lr": 2e-3})
    with pytest.raises(UsageError, match=r"made with another lr: 0\.001, not 0\.002"):
        fit(build(), other, dataset(), folder=tmp_path, resume=True)
    free = TrainConfig(**QUICK, checkpoint_every=5, workers=1)
    fit(build(), free, dataset(), folder=tmp_path, resume=True)


SCRIPT = """
import json, sys, torch
from pathlib import Path
sys.path.insert(0, {tests!r})
torch.set_num_threads(1)
from conftest import build
from test_training import QUICK, dataset, weights
from vitailor.training import TrainConfig, fit
folder = Path(sys.argv[1])
# Weights of a start that is not resumed from must not matter: only the checkpoint's do.
again, slow = (folder / "last.pt").exists(), len(sys.argv) > 2
model = build(seed=9 if again else 0, drop_path_rate={drop})
def on_event(event):
    if slow:
        import time
        time.sleep(0.3)
config = TrainConfig(**QUICK | {{"hflip": 0.5}}, checkpoint_every=1)
result = fit(model, config, dataset(), folder=folder, resume=True, on_event=on_event)
torch.save(weights(model), folder / "weights.pt")
(folder / "losses.json").write_text(json.dumps(result.losses))
"""


def start(folder: Path, *extra: str, launcher: tuple[str, ...] = (), drop: float) -> Any:
    folder.mkdir(exist_ok=True)
    script = folder / "script.py"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent), drop=drop))
    source = str(Path(__file__).parents[1] / "src")
    paths = os.pathsep.join([source, os.environ.get("PYTHONPATH", "")])
    # Two processes of the test cannot share one GPU.
    hidden = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    environment = os.environ | hidden | {"PYTHONPATH": paths}
    command = [sys.executable, *launcher, str(script), str(folder), *extra]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def test_killed_and_resumed_equals_uninterrupted(tmp_path):
    whole = start(tmp_path / "whole", drop=0.2)
    killed = start(tmp_path / "killed", "slow", drop=0.2)
    checkpoint = tmp_path / "killed" / "last.pt"
    until = time.monotonic() + 120
    while not checkpoint.exists() and time.monotonic() < until:
        time.sleep(0.02)
    assert checkpoint.exists()
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    state = torch.load(checkpoint)
    assert (state["epoch"], state["update"]) < (2, 0)
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "killed" / "weights.pt").exists()
    again = start(tmp_path / "killed", drop=0.2)
    for process in (whole, again):
        out, _ = process.communicate(timeout=200)
        assert process.returncode == 0, out.decode()
    found = [torch.load(tmp_path / name / "weights.pt") for name in ("whole", "killed")]
    assert torch.equal(*found)


def test_two_processes_give_the_losses_of_one(tmp_path):
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    two = start(tmp_path / "two", launcher=launcher, drop=0.0)
    one = start(tmp_path / "one", drop=0.0)
    for process in (one, two):
        out, _ = process.communicate(timeout=250)
        assert process.returncode == 0, out.decode()
    losses = [json.loads((tmp_path / n / "losses.json").read_text()) for n in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    # Otherwise each would have trained alone, on the whole batch.
    processes = [torch.load(tmp_path / name / "last.pt")["processes"] for name in ("one", "two")]
    assert processes == [1, 2]


# -- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"epoch": 3}, "epoch"),
        ({"epochs": 0}, "epochs"),
        ({"lr": -1.0}, "lr"),
        ({"precision": "fp8"}, "precision"),
        ({"batch_size": 9, "accumulate": 2}, "not a multiple of accumulate"),
        ({"scale": (0.9, 0.1)}, "scale"),
        ({"schedule": "plateau"}, "schedule"),
        ({"optimizer": "adamww"}, "optimizer 'adamww' is unknown"),
        ({"tracker": "paper"}, "tracker 'paper' is unknown"),
        ({"seed": -1}, "seed"),
        ({"epochs": 2, "warmup_epochs": 2}, "never reach lr"),
        ({"rand_augment": "foo"}, "rand_augment 'foo' is unknown"),
        ({"rand_augment": "3"}, "rand_augment '3' is unknown"),
    ],
)
def test_bad_settings_are_named(settings, what):
    with pytest.raises(UsageError, match=what):
        TrainConfig(**settings)


def test_bad_input_is_refused_before_training():
    model = build()
    unlabeled = open_images([images(model, 4).float()], None)
    before = copy.deepcopy(model.state_dict())
    for settings, data, message in (
        ({}, unlabeled, "has no labels"),
        ({"distill": "soft"}, unlabeled, "needs a teacher"),
        ({"mixup": 0.5, "batch_size": 5}, dataset(), "even number"),
        ({"tracker": "aim"}, dataset(), "not installed"),
    ):
        with pytest.raises(UsageError, match=message):
            fit(model, TrainConfig(**QUICK | settings), data)
    with pytest.raises(UsageError, match="float32"):
        fit(build().double(), TrainConfig(**QUICK), dataset())
    with pytest.raises(UsageError, match="frozen"):
        fit(build().requires_grad_(False), TrainConfig(**QUICK), dataset())
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(3 * 24 * 24, 3))
    with pytest.raises(UsageError, match="gives 3 classes and the model 5"):
        fit(model, TrainConfig(**QUICK, distill="soft"), dataset(), teacher=teacher)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())
