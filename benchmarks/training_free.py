"""Training-free compression against every baseline, on two real models.

    python benchmarks/training_free.py --data ../shared/data --log benchmarks/results/training_free.jsonl

Each row, one method at one budget, is appended to the log when it is done, with the outcome for every
image, and is not measured again: a run that is cut off goes on where it stopped. `write_results.py` makes
the tables from the log.

Calibration, allocation and tuning see unlabeled training images only. The strongest methods are
evaluated on all validation images; the baselines that lose tens of points, on a fixed draw of 1,000 of
them, spread over classes, on which all comparisons with them are paired.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from vitailor.benchmarking import conditions
from vitailor.budget import Budget
from vitailor.compression import compress
from vitailor.data import ImageSet, open_images
from vitailor.errors import BudgetError
from vitailor.evaluation import evaluate, paired_difference
from vitailor.methods import ClosedForm, Method, TokenMerge
from vitailor.models import open_model
from vitailor.preprocessing import resolve_preprocessing

KEEPS = (0.8, 0.6, 0.5, 0.4)
IMAGES = 512
FEW = 1000
#: Three epochs of label-free distillation on the calibration images.
REFINED = "closed-form, refine=3"
WIDTHS = ("qk", "v", "neurons")


@dataclass(frozen=True)
class Case:
    """A model, its images and how they are prepared."""

    title: str
    weights: str
    calibration: str
    validation: str
    keeps: tuple[float, ...]
    crop_pct: float | None = None
    interpolation: str | None = None
    #: As many calibration images as there are, where the default method is measured with these too.
    more: int | None = None


CASES = {
    "tiny_imagenet": Case(
        "ViT-Ti/16 fine-tuned on Tiny-ImageNet, evaluated on tiny_imagenet/validation",
        "vit_tiny_tinyimagenet200.safetensors",
        "tiny_imagenet/train",
        "tiny_imagenet/validation",
        KEEPS,
        1.0,
        "bilinear",
    ),
    "imagenet": Case(
        "ViT-Ti/16 (AugReg, ImageNet-1k), evaluated on the photographs of imagenet/validation",
        "vit_tiny_patch16_224.safetensors",
        "imagenet/calibration",
        "imagenet/validation",
        (0.6, 0.5),
        more=1000,
    ),
}


def methods(case: Case) -> dict[str, tuple[Method, bool]]:
    """Name -> method, and whether it is evaluated on all images."""
    rows: dict[str, tuple[Method, bool]] = {"closed-form": (ClosedForm(), True)}
    rows[REFINED] = (ClosedForm(refine=3), True)
    if case.more is not None:
        rows[with_more(case)] = (ClosedForm(), True)
    rows |= {
        "token merging, constant r (ToMe)": (TokenMerge(), False),
        "token merging, constant r, Ward": (TokenMerge(matching="ward"), False),
        "closed-form without compensation": (ClosedForm(compensation=False), False),
        "closed-form, uniform": (ClosedForm(allocation="uniform"), False),
        "closed-form, uniform, without compensation": (
            ClosedForm(allocation="uniform", compensation=False),
            False,
        ),
        "closed-form, widths alone, uniform": (
            ClosedForm(allocation="uniform", dimensions=WIDTHS),
            False,
        ),
    }
    for criterion in ("magnitude", "variance", "taylor"):
        for compensation in (False, True):
            suffix = " + compensation" if compensation else ""
            rows[f"{criterion}, uniform{suffix}"] = (
                ClosedForm(
                    criterion=criterion,
                    compensation=compensation,
                    allocation="uniform",
                    dimensions=WIDTHS,
                ),
                False,
            )
    return rows


def with_more(case: Case) -> str:
    return f"closed-form, {case.more:,} calibration images"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--log", type=Path, default=Path("benchmarks/results/training_free.jsonl"))
    parser.add_argument("--only", nargs="*", help="only the methods of these names")
    parser.add_argument("--case", choices=list(CASES))
    arguments = parser.parse_args()
    for name, case in CASES.items():
        if arguments.case in (None, name):
            measure(name, case, arguments.data, arguments.log, arguments.only)


def measure(name: str, case: Case, data: Path, log: Path, only: list[str] | None) -> None:
    opened = open_model(f"vit_tiny_patch16_224={data / case.weights}")
    model = opened.model
    preprocessing = resolve_preprocessing(
        model, crop_pct=case.crop_pct, interpolation=case.interpolation
    )
    calibration, every = (
        open_images(str(data / case.calibration), preprocessing, images=n, seed=0, split="train")
        for n in (IMAGES, case.more or IMAGES)
    )
    validation = open_images(
        str(data / case.validation),
        preprocessing,
        num_classes=model.num_classes,
        labels_needed=True,
    )
    few = validation.draw(FEW, 0) if len(validation) > FEW else validation
    done = {(row["case"], row["method"], row["keep"]) for row in read(log)}

    def record(
        method: str, keep: float, small: torch.nn.Module, images: ImageSet, facts: dict
    ) -> None:
        started = time.perf_counter()
        found = evaluate(small, images)
        row = {
            "case": name,
            "method": method,
            "keep": keep,
            "top1": found.top1,
            "top1_interval": found.top1_interval,
            "images": found.images,
            "names": "all" if images is validation else f"draw of {FEW}",
            "correct": "".join("01"[hit] for hit in found.correct),
            "evaluation_seconds": round(time.perf_counter() - started, 1),
            **facts,
        }
        append(log, row)
        print(f"{name}  {method}  keep {keep}: {found.top1:.2f} (n = {found.images})", flush=True)

    environment = conditions(torch.device("cpu")) | {"threads": torch.get_num_threads()}
    if (name, "dense", 1.0) not in done:
        place = {name: i for i, name in enumerate(validation.names)}
        facts = {"conditions": environment, "few": [place[name] for name in few.names]}
        record("dense", 1.0, model, validation, facts)
    # The budgets that matter most come first, in case the run is cut off.
    for keep in sorted(case.keeps, key=lambda keep: abs(keep - 0.5)):
        for label, (method, full) in methods(case).items():
            if (name, label, keep) in done or (only and label not in only):
                continue
            try:
                small = compress(
                    model,
                    method,
                    Budget(macs=keep),
                    data=every if case.more and label == with_more(case) else calibration,
                    preprocessing=preprocessing,
                    source=case.weights,
                )
            except BudgetError as error:
                append(log, {"case": name, "method": label, "keep": keep, "misses": error.message})
                continue
            known = small.vitailor.record
            facts = {
                "macs": known["macs"],
                "params": known["params"],
                "seconds": known["seconds"],
                "peak_memory_mb": known["peak_memory_mb"],
                "tokens": [b.num_tokens_out for b in small.vitailor.shape.blocks],
                "conditions": environment,
            }
            record(label, keep, small, validation if full else few, facts)


def append(log: Path, row: dict) -> None:
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def read(log: Path) -> list[dict]:
    if not log.exists():
        return []
    return [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]


# -- the page ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcomes:
    """Outcomes of a row, image by image, as `paired_difference` takes them."""

    correct: tuple[bool, ...]
    list_hash: str = ""

    @property
    def images(self) -> int:
        return len(self.correct)


def outcomes(row: dict) -> Outcomes:
    return Outcomes(tuple(c == "1" for c in row["correct"]))


def on(images_of: dict, row: dict, dense: dict) -> Outcomes:
    """Outcomes of `row` on the images that `images_of` was evaluated on."""
    correct = row["correct"]
    if len(correct) > len(images_of["correct"]):
        correct = [correct[position] for position in dense["few"]]
    return outcomes({"correct": correct})


def page(rows: list[dict]) -> str:
    lines = [
        "## Training-free compression",
        "",
        "Nothing is trained (but where it says refine), no label is used. Made by `python benchmarks/training_free.py`; the log with",
        "every image's outcome is in `benchmarks/results/training_free.jsonl`.",
        "",
        "Differences are in points of top-1, paired on the same images, with 95% intervals (Bonett and",
        "Price's adjusted interval for paired proportions). MACs are of the whole model. Calibration, "
        "allocation",
        f"and tuning see {IMAGES} unlabeled training images, unless said otherwise; validation images are used for nothing "
        "but these figures.",
        "",
    ]
    for name, case in CASES.items():
        own = [row for row in rows if row["case"] == name]
        dense = next((row for row in own if row["method"] == "dense"), None)
        if dense is None:
            continue
        low, high = dense["top1_interval"]
        lines += [
            f"### {case.title}",
            "",
            f"Dense: {dense['top1']:.2f} (95% {low:.2f} to {high:.2f}, n = {dense['images']:,}).",
            "",
        ]
        for keep in case.keeps:
            lines += table(own, dense, keep)
        lines += where(own)
    return "\n".join(lines).rstrip() + "\n"


def table(rows: list[dict], dense: dict, keep: float) -> list[str]:
    here = [row for row in rows if row["keep"] == keep and row["method"] != "dense"]
    ours = next((row for row in here if row["method"] == "closed-form"), None)
    if ours is None:
        return []
    lines = [
        f"#### Keep {keep:g} of the MACs",
        "",
        "| method | MACs (M) | kept | top-1 | n | against dense | closed-form against it | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    short = [row for row in here if "misses" in row]
    met = [row for row in here if "misses" not in row]
    for row in sorted(met, key=lambda r: (r is not ours, -r["top1"])):
        kept = row["macs"]["after"] / row["macs"]["before"]
        versus = "" if row is ours else span(on(row, ours, dense), on(row, row, dense))
        seconds = "" if row["seconds"] is None else f"{row['seconds']:.0f}"
        lines.append(
            f"| {row['method']} | {row['macs']['after'] / 1e6:.0f} | {kept:.3f} | {row['top1']:.2f} | "
            f"{row['images']:,} | {span(on(row, row, dense), on(row, dense, dense))} | {versus} | "
            f"{seconds} |"
        )
        few = dense.get("few")
        if row is ours and few is not None and len(few) < row["images"]:
            same = on({"correct": few}, row, dense)
            top1 = 100 * sum(same.correct) / same.images
            change = span(same, on({"correct": few}, dense, dense))
            lines.append(
                f"| the same, on the images of the rows below | | | {top1:.2f} | {same.images:,} | {change} | | |"
            )
    lines += [f"| {row['method']} | cannot go so low | | | | | | |" for row in short]
    return [*lines, ""]


def span(after: Outcomes, before: Outcomes) -> str:
    difference, low, high = paired_difference(after, before)
    return f"{difference:+.2f} ({low:+.2f} to {high:+.2f})".replace("-", "\N{MINUS SIGN}")


def where(rows: list[dict]) -> list[str]:
    known = rows[0].get("conditions", {})
    threads = sorted({row["conditions"]["threads"] for row in rows if "conditions" in row})
    versions = ", ".join(f"{k} {v}" for k, v in known.get("versions", {}).items())
    return [
        f"Measured on {known.get('hardware', platform.processor())}, {' or '.join(map(str, threads))} threads, "
        f"{known.get('date', '')[:10]}; {versions}. Seconds are for compression, evaluation apart; the "
        "machine was shared with other work, so they are upper bounds.",
        "",
    ]


if __name__ == "__main__":
    main()
