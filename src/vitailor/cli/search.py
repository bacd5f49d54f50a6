"""`vitailor search`."""

from __future__ import annotations

import json as as_json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UsageError, VitailorError
from ..processes import is_first_process
from . import budgets as b
from . import options as o

if TYPE_CHECKING:
    from rich.console import Console

EXAMPLE = o.example(
    "vitailor search vit_tiny_patch16_224 --keep 0.6 --calibrate photos/train --trials 40 -o found/",
    "vitailor search vit_tiny_patch16_224 --keep 0.6 --calibrate photos/train --trials 200 "
    "--storage search.journal -o worker1/",
)
#: Candidates as JSON, one a line, beside the model.
HISTORY = "trials.jsonl"
#: What was asked for, beside the journal.
REQUEST = "search.json"
_SEARCH = "Search"


def search(
    model: o.Model,
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="DIR",
            help="Folder for the best model, and the candidates in trials.jsonl.",
            show_default=False,
        ),
    ],
    calibrate: Annotated[
        str,
        typer.Option(
            "--calibrate",
            metavar="DATA",
            help="Images to calibrate on.",
            rich_help_panel="Images",
            show_default=False,
        ),
    ],
    keep: b.Keep = None,
    macs: b.Macs = None,
    params: b.Params = None,
    trials: Annotated[
        int | None,
        typer.Option(
            "--trials",
            metavar="N",
            min=1,
            help="Candidates in all, other workers' and earlier ones included; 40.",
            rich_help_panel=_SEARCH,
        ),
    ] = None,
    sampler: Annotated[
        str | None,
        typer.Option("--sampler", metavar="NAME", help="gp or random.", rich_help_panel=_SEARCH),
    ] = None,
    storage: Annotated[
        str | None,
        typer.Option(
            "--storage",
            metavar="URL",
            help="Journal file or database that workers share; by default a file in DIR.",
            rich_help_panel=_SEARCH,
        ),
    ] = None,
    reward: o.Reward = None,
    reward_images: Annotated[
        int | None,
        typer.Option(
            "--reward-images",
            metavar="N",
            min=1,
            help="How many of them, drawn by seed; 256, or half of the calibration images.",
            rich_help_panel="Images",
        ),
    ] = None,
    images: o.CalibrationImages = None,
    evaluate: o.Evaluate = None,
    class_map: o.ClassMap = None,
    settings: o.Settings = None,
    config: o.Config = None,
    overwrite: o.Overwrite = False,
    weights: o.Weights = None,
    num_classes: o.NumClasses = None,
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
    """Search for the sizes that harm a model least within a budget, and write that model.

    The method is multi-dim, with its settings by --set; nothing is trained. A search that was cut off goes on
    where it stopped; workers with one --storage, each with a folder of its own, share its candidates.
    """
    budget = b.make_budget(keep, macs, params, None)
    transform = o.preprocessing_settings(input_size, crop_pct, interpolation, mean, std)
    from . import settings as s
    from . import setup
    from .console import emit, trial_progress

    given = {
        "trials": trials,
        "sampler": sampler,
        "storage": storage,
        "reward_images": reward_images,
    }
    fields = s.read_config(config) | {k: v for k, v in given.items() if v is not None}
    sets = s.parse_sets(settings or [])
    if {"training", "sharing"} & {name.partition(".")[0] for name in (*fields, *sets)}:
        raise UsageError(
            "A search trains nothing.", "Take vitailor compress --method multi-dim --train DATA."
        )
    # What the folder's model and candidates came from; another number of trials goes on with them.
    asked = {
        "model": [model, str(weights), num_classes],
        "budget": str(budget),
        "images": [calibrate, reward, images, str(class_map), seed],
        "preprocessing": {name: str(value) for name, value in transform.items()},
        "settings": {**fields, **sets, "trials": None, "storage": None},
    }
    request = as_json.dumps(asked, sort_keys=True, default=str)
    note = output / setup.CHECKPOINTS / REQUEST
    begun = note.is_file() and note.read_text(encoding="utf-8") == request
    if is_first_process():
        setup.check_folder(output, overwrite or begun)
    setup.check_file("--class-map", class_map)
    setup.check_positive("--images", images)
    for data in (calibrate, reward, evaluate):
        if data is not None:
            setup.check_data(data)
    where = setup.device_of(device)

    from ..methods import MultiDim

    made = s.make_config("search", MultiDim, fields, sets)
    if class_map is not None and evaluate is None and not made.needs_labels:
        raise UsageError(
            "--class-map goes with --evaluate, or with --set reward=accuracy.", "Leave it out."
        )

    from ..artifact import save
    from ..data import open_images
    from ..hosts import shape_of
    from ..preprocessing import resolve_preprocessing
    from ..provenance import provenance_of
    from ..searching import search as run

    opened = setup.open_model(model, weights, num_classes)
    dense = shape_of(opened.model)
    made.check(dense, budget)
    preprocessing = resolve_preprocessing(opened.model, **transform)
    classes = dense.num_classes or None
    test = None
    if evaluate is not None:
        test = open_images(
            evaluate, preprocessing, num_classes=classes, class_map=class_map, labels_needed=True
        )
    with _noted(note, request), trial_progress() as told:
        found = run(
            opened.model,
            budget,
            method=made,
            data=calibrate,
            images=images,
            reward=reward,
            evaluate=test,
            class_map=class_map,
            folder=output / setup.CHECKPOINTS,
            device=where,
            seed=seed,
            source=opened.source,
            preprocessing=preprocessing,
            on_trial=told,
        )
    if not is_first_process():
        return
    save(found.model, output, overwrite=True)
    lines = "".join(as_json.dumps(trial) + "\n" for trial in found.trials)
    (output / HISTORY).write_text(lines, encoding="utf-8")
    known = provenance_of(found.model)
    payload: dict[str, Any] = {"out": str(output), "best": found.best, "trials": found.trials}
    if known is not None and "top1" in known.record:
        payload["top1"] = known.record["top1"]
    emit(payload, json, lambda out: _draw(out, payload, found.overhead_seconds))


@contextmanager
def _noted(note: Path, request: str) -> Iterator[None]:
    """With a note of what is searched; as it was before when that is refused before any work."""
    there = set(note.parent.iterdir()) if note.parent.is_dir() else set()
    before = note.read_text(encoding="utf-8") if note.is_file() else None
    if is_first_process():
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(request, encoding="utf-8")
    try:
        yield
    except VitailorError:
        begun = set(note.parent.iterdir()) - there - {note}
        if is_first_process() and not begun:
            if before is not None:
                note.write_text(before, encoding="utf-8")
            else:
                note.unlink()
                with suppress(OSError):  # other files are there
                    note.parent.rmdir()
                    note.parent.parent.rmdir()
        raise


def _draw(out: Console, payload: dict[str, Any], overhead: float) -> None:
    from ..reporting import count, signed

    best, trials = payload["best"], payload["trials"]
    seconds = sum(trial["seconds"] for trial in trials) / len(trials)
    out.print(
        f"best of {len(trials)} candidates: number {best['number']}, reward [bold]{best['reward']:.4f}"
        f"[/bold], {count(best['macs'])} MACs, {count(best['params'])} parameters"
    )
    for name, sizes in best["policy"].items():
        told = ("-" if size is None else str(size) for size in sizes)
        out.print(f"  {name:<15} {' '.join(told)}")
    out.print(f"{seconds:.2f} s a candidate; choosing, storing and waiting took {overhead:.2f} s")
    if "top1" in payload:
        top1 = payload["top1"]
        low, high = top1["interval"]
        out.print(
            f"top-1   {top1['before']:.2f}% > [bold]{top1['after']:.2f}%[/bold]  "
            f"(paired 95% interval {signed(low)} to {signed(high)})"
        )
    out.print(f"wrote {payload['out']}")


def register(app: typer.Typer) -> None:
    app.command(help=o.prose(search), epilog=EXAMPLE)(search)
