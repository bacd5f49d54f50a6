"""`vitailor compress`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shutil import copytree
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UsageError
from ..processes import is_first_process
from . import budgets as b
from . import options as o

if TYPE_CHECKING:
    from rich.console import Console

    from ..methods import Method
    from ..shape import ViTShape

EXAMPLE = o.example(
    "vitailor compress vit_tiny_patch16_224 --method closed-form --keep 0.6 "
    "--calibrate photos/train --evaluate photos/val -o small/",
    "vitailor compress vit_tiny_patch16_224=w.pth --method token-merge --macs 750M --dry-run",
    "vitailor compress vit_tiny_patch16_224 --method vtp --keep 0.6 --train photos/train --epochs 5 "
    "-o pruned/",
)


def compress(
    model: o.Model,
    method: Annotated[
        str,
        typer.Option(
            "--method",
            metavar="NAME",
            help="closed-form, token-merge, vtp, low-rank, hybrid or multi-dim.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="DIR", help="Folder to write the result to."),
    ] = None,
    keep: b.Keep = None,
    macs: b.Macs = None,
    params: b.Params = None,
    latency_ms: b.LatencyMs = None,
    calibrate: Annotated[
        str | None,
        typer.Option(
            "--calibrate",
            metavar="DATA",
            help="Images to calibrate on, without labels; token-merge needs none.",
            rich_help_panel="Images",
        ),
    ] = None,
    train: Annotated[
        str | None,
        typer.Option(
            "--train",
            metavar="DATA",
            help="Training images, for methods that train (vtp; hybrid and multi-dim if given).",
            rich_help_panel="Images",
        ),
    ] = None,
    reward: o.Reward = None,
    settings: o.Settings = None,
    config: o.Config = None,
    epochs: o.Epochs = None,
    batch_size: o.BatchSize = None,
    lr: o.LearningRate = None,
    precision: o.Precision = None,
    checkpoint_every: o.CheckpointEvery = None,
    stage: Annotated[
        str | None,
        typer.Option(
            "--stage",
            metavar="NAME",
            help="Stop after this stage (vtp: sparse, prune, finetune); earlier ones that the output "
            "folder holds are not done again.",
            rich_help_panel="Training",
        ),
    ] = None,
    resume: o.Resume = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Print the plan and its cost; write nothing. Learned gates are trained for that, unless the "
            "output folder holds them.",
        ),
    ] = False,
    overwrite: o.Overwrite = False,
    weights: o.Weights = None,
    num_classes: o.NumClasses = None,
    images: o.CalibrationImages = None,
    evaluate: o.Evaluate = None,
    class_map: o.ClassMap = None,
    input_size: o.InputSize = None,
    crop_pct: o.CropPct = None,
    interpolation: o.Interpolation = None,
    mean: o.Mean = None,
    std: o.Std = None,
    seed: o.Seed = 0,
    device: o.Device = None,
    json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Cut a model to a budget and write it as a folder that evaluate, bench and load take."""
    # Everything cheap first: a typing error must not cost a download or a calibration.
    budget = b.make_budget(keep, macs, params, latency_ms)
    transform = o.preprocessing_settings(input_size, crop_pct, interpolation, mean, std)
    from . import settings as s
    from . import setup
    from .console import emit

    fields, sets = s.read_config(config), s.parse_sets(settings or [])
    if stage is not None:
        fields["stage"] = stage
    if output is None and not dry_run:
        raise UsageError("There is no folder to write to.", "Name one with -o, or pass --dry-run.")
    begun = output is not None and (output / setup.CHECKPOINTS).is_dir()
    resume = resume or (stage not in (None, "sparse") and begun)
    if output is not None and not dry_run and is_first_process():
        setup.check_folder(output, overwrite or (resume and begun))
    setup.check_positive("--images", images)
    for data in (calibrate, evaluate, train, reward):
        if data is not None:
            setup.check_data(data)
    where = setup.device_of(device)

    from ..methods import METHODS

    if method not in METHODS:
        raise UsageError(f"Unknown method '{method}'.", f"Choose {', '.join(METHODS)}.")
    given = {
        "epochs": epochs,
        "batch_size": batch_size,
        "lr": lr,
        "precision": precision,
        "checkpoint_every": checkpoint_every,
    }
    made = make_method(method, fields, sets, given, train, resume)
    if reward is not None and not made.searches:
        raise UsageError(f"{method} does not search, so --reward is not for it.", "Leave it out.")
    if class_map is not None and evaluate is None and train is None and not made.needs_labels:
        raise UsageError(
            "--class-map goes with --evaluate or --train.", "Leave it out, or pass one of them."
        )
    setup.check_file("--class-map", class_map)
    if calibrate is None and made.needs_images:
        raise UsageError(f"{method} needs images.", "Name some with --calibrate.")

    from ..artifact import save
    from ..compression import compress as cut
    from ..compression import plan_only
    from ..data import open_images
    from ..hosts import shape_of
    from ..inspection import inspect
    from ..preprocessing import resolve_preprocessing
    from ..provenance import provenance_of

    opened = setup.open_model(model, weights, num_classes)
    dense = shape_of(opened.model)
    made.check(dense, budget)
    preprocessing = resolve_preprocessing(opened.model, **transform)
    test = None
    if evaluate is not None and is_first_process():  # the only one to tell
        test = open_images(
            evaluate,
            preprocessing,
            num_classes=dense.num_classes or None,
            class_map=class_map,
            labels_needed=True,
        )
    common: dict[str, Any] = {
        "data": calibrate,
        "images": images,
        "train": train,
        "reward": reward,
        "class_map": class_map,
        "device": where,
        "seed": seed,
        "source": opened.source,
        "preprocessing": preprocessing,
    }
    payload: dict[str, Any] = {"out": None, "method": method, "budget": str(budget)}
    if output is None or dry_run:
        begun_in = output / setup.CHECKPOINTS if output and begun and made.resumable else None
        with watching(made, "planning") as told, copied(begun_in) as checkpoints:
            common |= {"folder": checkpoints, "resume": checkpoints is not None}
            shape = plan_only(opened.model, made, budget, **told, **common)
        payload |= _before_and_after(dense, shape) | {"plan": inspect(shape)}
        emit(payload, json, lambda out: _draw_plan(out, dense, shape))
        return
    if made.resumable:
        common |= {"folder": output / setup.CHECKPOINTS, "resume": resume}
    with watching(made, "compressing") as told:
        small = cut(opened.model, made, budget, evaluate=test, **told, **common)
    if not is_first_process():
        return
    save(small, output, overwrite=overwrite or made.resumable)
    known = provenance_of(small)
    record = known.record if known is not None else {}
    payload |= {"out": str(output), **_before_and_after(dense, shape_of(small))}
    payload |= {name: record.get(name) for name in ("seconds", "peak_memory_mb")}
    for name in ("top1", "latency_ms"):
        if name in record:
            payload[name] = record[name]
    emit(payload, json, lambda out: _draw(out, payload, record.get("images")))


def make_method(
    name: str,
    fields: dict[str, Any],
    sets: dict[str, str],
    training: dict[str, Any],
    train: str | None,
    resume: bool,
) -> Method:
    """The method with its settings, those of training from the options of their own.

    Raises:
        UsageError: when options do not go with the method.
    """
    from ..methods import METHODS
    from . import settings as s

    kind, training = METHODS[name], {k: v for k, v in training.items() if v is not None}
    if "training" in kind.model_fields:
        if training or train is not None:  # for some methods training is a choice
            fields = fields | {"training": {**(fields.get("training") or {}), **training}}
    elif training or train is not None:
        option = "--" + next(iter(training), "train").replace("_", "-")
        raise UsageError(
            f"{name} does not train, so {option} is not for it.",
            "Train its result afterwards with vitailor train.",
        )
    made = s.make_config(name, kind, fields, sets)
    if made.trains is not None and train is None:
        raise UsageError(f"{name} needs training images.", "Name some with --train.")
    if not made.resumable and resume:
        raise UsageError(f"{name} has nothing to resume.", "Leave --resume out.")
    return made


@contextmanager
def watching(method: Method, what: str) -> Iterator[dict[str, Any]]:
    """How the library is to tell of its progress: steps, the candidates of a search, or the epochs of training."""
    from .console import progress, training_progress, trial_progress

    if method.trains is not None:
        with training_progress() as telling:
            yield {"on_event": telling.event, "on_trial": telling.trial}
    elif method.searches:
        with trial_progress() as told:
            yield {"on_trial": told}
    else:
        with progress(what) as advance:
            yield {"progress": advance}


@contextmanager
def copied(folder: Path | None) -> Iterator[Path | None]:
    """A copy of a folder that may be written to, gone afterwards; None of none."""
    if folder is None:
        yield None
        return
    with TemporaryDirectory() as scratch:
        yield Path(copytree(folder, Path(scratch) / folder.name))


def _before_and_after(before: ViTShape, after: ViTShape) -> dict[str, Any]:
    return {
        "macs": {"before": before.macs, "after": after.macs},
        "params": {"before": before.params, "after": after.params},
    }


def _draw_plan(out: Console, dense: ViTShape, shape: ViTShape) -> None:
    from ..inspection import table

    out.print(table(shape))
    _draw_costs(out, _before_and_after(dense, shape))
    out.print("[dim]dry run: nothing was written")


def _draw(out: Console, payload: dict[str, Any], images: int | None) -> None:
    from ..reporting import signed

    _draw_costs(out, payload)
    if "latency_ms" in payload:
        before, after = payload["latency_ms"]["before"], payload["latency_ms"]["after"]
        out.print(f"latency {before:.2f} > [bold]{after:.2f}[/bold] ms for one image")
    top1 = payload.get("top1")
    if top1 is None:
        out.print("top-1   not measured (pass --evaluate DATA)")
    else:
        low, high = top1["interval"]
        out.print(
            f"top-1   {top1['before']:.2f}% > [bold]{top1['after']:.2f}%[/bold]  "
            f"(change {signed(top1['after'] - top1['before'])}, paired 95% interval "
            f"{signed(low)} to {signed(high)}, n = {images})"
        )
    out.print(f"wrote {payload['out']} after {payload['seconds']:.1f} s")


def _draw_costs(out: Console, costs: dict[str, Any]) -> None:
    from ..reporting import count

    for name, label in (("macs", "MACs"), ("params", "params")):
        before, after = costs[name]["before"], costs[name]["after"]
        out.print(
            f"{label:<7} {count(before)} > [bold]{count(after)}[/bold]  ({after / before:.1%} kept)"
        )


def register(app: typer.Typer) -> None:
    app.command(help=o.prose(compress), epilog=EXAMPLE)(compress)
