"""What a smaller model gains in time: each beside the dense one, interleaved, by batch size and threads.

    python benchmarks/speed.py --data ../shared/data --work ../runs

Models are compressed once and kept in the work folder. Each call appends one run for every number of threads to the
log; several calls show how much a machine's noise matters. It should have nothing else to do.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import nn
from training_free import IMAGES, append

import vitailor as vt
from vitailor.artifact import is_artifact
from vitailor.benchmarking import bench, check_settings
from vitailor.data import open_images
from vitailor.models import open_model
from vitailor.preprocessing import resolve_preprocessing

KEEP = 0.5
METHODS: dict[str, vt.ClosedForm | vt.TokenMerge] = {
    "closed-form": vt.ClosedForm(),
    "closed-form, widths alone": vt.ClosedForm(dimensions=("heads", "qk", "v", "neurons")),
    "token merging, constant r (ToMe)": vt.TokenMerge(),
}


def models(data: Path, work: Path) -> list[tuple[str, nn.Module]]:
    """The dense model first, then the smaller ones."""
    source = "vit_tiny_tinyimagenet200.safetensors"
    dense = open_model(f"vit_tiny_patch16_224={data / source}").model
    preprocessing = resolve_preprocessing(dense, crop_pct=1.0, interpolation="bilinear")
    found: list[tuple[str, nn.Module]] = [("dense", dense)]
    for name, method in METHODS.items():
        folder = work / f"{name} {KEEP}".replace(" ", "-").replace(",", "")
        if not is_artifact(folder):
            images = open_images(
                str(data / "tiny_imagenet/train"), preprocessing, images=IMAGES, split="train"
            )
            budget = vt.Budget(macs=KEEP)
            small = vt.compress(
                dense, method, budget, data=images, source=source, preprocessing=preprocessing
            )
            vt.save(small, folder)
        found.append((name, vt.load(folder)))
    return found


def measure(
    named: list[tuple[str, nn.Module]], batch_sizes: list[int], threads: int, runs: int, log: Path
) -> None:
    found = bench(named, batch_sizes=batch_sizes, threads=threads, runs=runs)
    rows = [row.model_dump(mode="json") for row in found.models]
    append(log, {"threads": threads, "rows": rows, "conditions": found.conditions})
    for row in found.models:
        print(f"{threads} threads  {row.model} x {row.batch_size}: {row.speedup:.2f}", flush=True)


def page(runs: list[dict]) -> str:
    if not runs:
        return ""
    known = runs[-1]["conditions"]
    rounds = " or ".join(str(n) for n in sorted({run["conditions"]["rounds"] for run in runs}))
    lines = [
        "## Speed",
        "",
        f"The ViT-Ti/16 for Tiny-ImageNet at {KEEP:g} of the MACs on {known['hardware']}, float32, torch "
        f"{known['versions']['torch']}, {known['date'][:10]}. Speed-ups over",
        f"the dense model, medians of {rounds} interleaved rounds, one number for each run. Made by",
        "`python benchmarks/speed.py`.",
        "",
        "| model | MAC ratio | threads | batch | dense ms | speed-ups |",
        "|---|---|---|---|---|---|",
    ]
    cells: dict[tuple, list[dict]] = {}
    for run in runs:
        dense = {row["batch_size"]: row for row in run["rows"] if row["model"] == "dense"}
        for row in run["rows"]:
            if row["model"] != "dense":
                place = row["model"], run["threads"], row["batch_size"]
                own = {**row, "dense_ms": dense[row["batch_size"]]["latency_ms"]["median"]}
                cells.setdefault(place, []).append(own)
    for (name, threads, batch), rows in sorted(cells.items(), key=lambda cell: cell[0]):
        dense_ms = " ".join(f"{row['dense_ms']:.0f}" for row in rows)
        speedups = " ".join(f"{row['speedup']:.2f}" for row in rows)
        lines.append(
            f"| {name} | {rows[0]['mac_ratio']:.2f} | {threads} | {batch} | {dense_ms} | {speedups} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--work", type=Path, required=True, help="folder for the models")
    parser.add_argument("--log", type=Path, default=Path("benchmarks/results/speed.jsonl"))
    parser.add_argument("--threads", type=int, nargs="+", default=[1, torch.get_num_threads()])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--runs", type=int, default=20)
    arguments = parser.parse_args()
    check_settings(arguments.batch_sizes, "float32", None, arguments.runs, 3)
    named = models(arguments.data, arguments.work)
    for threads in dict.fromkeys(arguments.threads):
        measure(named, arguments.batch_sizes, threads, arguments.runs, arguments.log)


if __name__ == "__main__":
    main()
