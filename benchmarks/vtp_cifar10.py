"""Vision Transformer Pruning from scratch on CIFAR-10: three seeds, three rates.

    python benchmarks/vtp_cifar10.py --data ../shared/data/cifar10 --work ../runs

For each seed a Vision Transformer is trained, its gates are trained sparse, and at each rate the pruned
model is evaluated as it is, after fine-tuning on labels, and after fine-tuning from the dense model. Rows
are appended to the log and training is resumed from its checkpoints, so that a run that is cut off goes on
where it stopped.

The images are a JPEG copy of CIFAR-10. Test images are used for the figures alone.
"""

from __future__ import annotations

import argparse
import statistics
import tarfile
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn
from training_free import append, read

import vitailor as vt
from vitailor.artifact import is_artifact
from vitailor.benchmarking import conditions
from vitailor.preprocessing import Preprocessing
from vitailor.training import Event

RATES = (0.2, 0.3, 0.4)
SEEDS = (0, 1, 2)
SIZES: dict[str, dict[str, Any]] = {
    # One core trains it in a quarter of an hour.
    "small": {
        "patch_size": 8,
        "embed_dim": 96,
        "depth": 4,
        "num_heads": 4,
        "mlp_ratio": 4.0,
        "dense": 8,
        "sparse": 2,
        "more": 1,
    },
    # The setting of the public reimplementation: six layers, 512 wide, MLP ratio 1.
    "paper": {
        "patch_size": 4,
        "embed_dim": 512,
        "depth": 6,
        "num_heads": 8,
        "mlp_ratio": 1.0,
        "dense": 100,
        "sparse": 30,
        "more": 30,
    },
}
PREPROCESSING = Preprocessing(
    input_size=(3, 32, 32),
    crop_pct=1.0,
    interpolation="bilinear",
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2470, 0.2435, 0.2616),
)
COMMON: dict[str, Any] = {"batch_size": 128, "scale": (0.6, 1.0), "checkpoint_every": 100}
ARCHITECTURE = ("patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio")
PLACEMENTS = ("inputs", "outputs")


class Bench:
    """One size: where its data, checkpoints and rows are."""

    def __init__(self, size: str, data: Path, work: Path, log: Path) -> None:
        self.size, self.sizes, self.work, self.log = size, SIZES[size], work / size, log
        self.train, self.test = (unpack(data, work, part) for part in ("train", "test"))
        self.done = {key(row) for row in read(log)}

    def config(self, epochs: int, lr: float, seed: int, **more: Any) -> vt.TrainConfig:
        return vt.TrainConfig(epochs=epochs, lr=lr, seed=seed, **COMMON, **more)

    def dense(self, seed: int) -> nn.Module:
        folder = self.work / f"dense-{seed}"
        if not is_artifact(folder):
            sizes = {name: self.sizes[name] for name in ARCHITECTURE}
            torch.manual_seed(seed)
            model = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=10, **sizes)
            config = self.config(self.sizes["dense"], 1e-3, seed, warmup_epochs=1)
            vt.save(self.trained(model, config, f"dense-{seed}"), folder, overwrite=True)
        return vt.load(folder)

    def trained(
        self, model: nn.Module, config: vt.TrainConfig, name: str, teacher: nn.Module | None = None
    ) -> nn.Module:
        return vt.train(
            model,
            self.train,
            config,
            teacher=teacher,
            folder=self.work / name / "checkpoints",
            resume=True,
            preprocessing=PREPROCESSING,
            on_event=lambda event: tell(name, event),
        )

    def seed(self, seed: int) -> None:
        dense = self.dense(seed)
        self.record("dense", seed, None, "", dense)
        more = self.sizes["more"]
        for placement in PLACEMENTS:
            sparse = self.config(self.sizes["sparse"], 2e-4, seed, gate_lr=2e-3)
            for rate in RATES:
                method = vt.VTP(placement=placement, rate=rate, stage="prune", training=sparse)
                name = f"{placement}-{seed}"
                pruned = vt.compress(
                    dense,
                    method,
                    vt.Budget(macs=1.0),
                    train=self.train,
                    folder=self.work / name,
                    resume=True,
                    preprocessing=PREPROCESSING,
                    on_event=lambda stage, event, name=name: tell(f"{name} {stage}", event),
                )
                self.record("pruned", seed, rate, placement, pruned)
                if placement != "inputs":
                    continue  # the other placement is compared by what it prunes
                for row, teacher in (("fine-tuned", None), ("distilled", dense)):
                    if (row, self.size, seed, rate, placement) in self.done:
                        continue
                    extra = {"distill": "soft", "alpha": 0.5} if teacher is not None else {}
                    config = self.config(more, 5e-4, seed, **extra)
                    found = self.trained(pruned, config, f"{row}-{seed}-{rate:g}", teacher)
                    self.record(row, seed, rate, placement, found)

    def record(
        self, row: str, seed: int, rate: float | None, placement: str, model: nn.Module
    ) -> None:
        if (row, self.size, seed, rate, placement) in self.done:
            return
        found = vt.evaluate(model, self.test, preprocessing=PREPROCESSING)
        shape = vt.shape_of(model)
        facts = {
            "row": row,
            "size": self.size,
            "seed": seed,
            "rate": rate,
            "placement": placement,
            "top1": found.top1,
            "images": found.images,
            "macs": shape.macs,
            "params": shape.params,
            "facts": model.vitailor.record.get("facts"),
            "conditions": conditions(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
            | {"threads": torch.get_num_threads()},
        }
        append(self.log, facts)
        self.done.add(key(facts))
        print(f"{row} {placement} seed {seed} rate {rate}: {found.top1:.2f}", flush=True)


def key(row: dict) -> tuple:
    return row["row"], row["size"], row["seed"], row["rate"], row["placement"]


def unpack(data: Path, work: Path, part: str) -> str:
    folder = work / "images" / part
    if not folder.is_dir():
        partial = work / "images" / f".{part}"
        with tarfile.open(data / f"{part}.tar.xz") as archive:
            archive.extractall(partial, filter="data")
        found = partial / part
        (found if found.is_dir() else partial).rename(folder)
    return str(folder)


def tell(what: str, event: Event) -> None:
    if event.update == event.updates or event.update % 100 == 0:
        print(
            f"{what}  epoch {event.epoch}/{event.epochs} {event.update}/{event.updates} "
            f"loss {event.loss:.4f} {event.images_per_s:.0f} images/s {event.observed}",
            flush=True,
        )


# -- the page ------------------------------------------------------------------------------------

#: 97.5% quantile of Student's t for n - 1 degrees of freedom.
T = {2: 12.706, 3: 4.303}


def page(rows: list[dict]) -> str:
    if not rows:
        return ""
    lines = [
        "## Vision Transformer Pruning on CIFAR-10, from scratch",
        "",
        "Made by `python benchmarks/vtp_cifar10.py`; the rows are in `benchmarks/results/vtp_cifar10.jsonl`.",
        "Images are a JPEG copy of CIFAR-10; top-1 is on its 10,000 test images, mean over seeds with a 95%",
        "interval of the mean (Student's t) where there are several.",
        "",
    ]
    for size, sizes in SIZES.items():
        own = [row for row in rows if row["size"] == size]
        if not own:
            continue
        lines += [
            f"### {sizes['depth']} blocks, {sizes['embed_dim']} wide, patches of {sizes['patch_size']}, MLP ratio "
            f"{sizes['mlp_ratio']:g}; {sizes['dense']} epochs, then {sizes['sparse']} sparse and "
            f"{sizes['more']} of fine-tuning",
            "",
            "| gates pruned | MACs kept | parameters kept | pruned | fine-tuned | from the dense model |",
            "|---|---|---|---|---|---|",
        ]
        dense = [row for row in own if row["row"] == "dense"]
        lines.append(f"| none | 1 | 1 | {mean([row['top1'] for row in dense])} | | |")
        for rate in RATES:
            here = [row for row in own if row["rate"] == rate and row["placement"] == "inputs"]
            if not here:
                continue
            cells = [mean([r["top1"] for r in here if r["row"] == name]) for name in STAGES]
            macs = statistics.mean(row["macs"] for row in here) / dense[0]["macs"]
            params = statistics.mean(row["params"] for row in here) / dense[0]["params"]
            lines.append(f"| {rate:.0%} | {macs:.3f} | {params:.3f} | {' | '.join(cells)} |")
        lines += ["", *where_it_falls(own), ""]
    return "\n".join(lines).rstrip() + "\n"


STAGES = ("pruned", "fine-tuned", "distilled")


def where_it_falls(rows: list[dict]) -> list[str]:
    """Share of the gates of each kind that stay, for both placements."""
    lines = [
        "Share of the gated features that stay, by kind, mean over blocks and seeds:",
        "",
        "| placement | gates pruned | attention | feed-forward |",
        "|---|---|---|---|",
    ]
    for placement in PLACEMENTS:
        for rate in RATES:
            here = [r for r in rows if r["row"] == "pruned" and r["rate"] == rate]
            here = [r["facts"]["kept"] for r in here if r["placement"] == placement]
            if not here:
                continue
            groups = []
            for kinds in (("attn_features", "v", "dims"), ("mlp_features", "neurons")):
                parts = [
                    f"{kind} {statistics.mean(x for kept in here for x in kept[kind]):.3f}"
                    for kind in kinds
                    if kind in here[0]
                ]
                groups.append(", ".join(parts))
            lines.append(f"| {placement} | {rate:.0%} | {' | '.join(groups)} |")
    return lines


def mean(values: list[float], unit: str = "") -> str:
    """The mean with the half of its 95% interval, where there are several values."""
    if not values:
        return ""
    middle = statistics.mean(values)
    if len(values) < 2:
        return f"{middle:.2f}{unit} (one seed)"
    half = T[len(values)] * statistics.stdev(values) / len(values) ** 0.5
    return f"{middle:.2f}{unit} ± {half:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data/cifar10"))
    parser.add_argument("--work", type=Path, required=True, help="for images and checkpoints")
    parser.add_argument("--size", choices=list(SIZES), default="small")
    parser.add_argument("--log", type=Path, default=Path("benchmarks/results/vtp_cifar10.jsonl"))
    arguments = parser.parse_args()
    bench = Bench(arguments.size, arguments.data, arguments.work, arguments.log)
    for seed in SEEDS:
        bench.seed(seed)


if __name__ == "__main__":
    main()
