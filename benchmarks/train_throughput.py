"""Training throughput against a plain timm loop: same model, images, augmentation and precision, in turns.

python benchmarks/train_throughput.py --images ../shared/data/tiny_imagenet/train --precision bf16
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import nn
from torch.utils.data import DataLoader

from vitailor.benchmarking import conditions
from vitailor.data import ImageSet, open_images
from vitailor.preprocessing import resolve_preprocessing
from vitailor.training import Augmentation, TrainConfig, fit


def ours(model: nn.Module, images: ImageSet, config: TrainConfig) -> float:
    """Images per second of one epoch, everything around the loop included."""
    student, started = copy.deepcopy(model), time.perf_counter()
    fit(student, config, images)
    return len(images) / (time.perf_counter() - started)


def plain(model: nn.Module, images: ImageSet, config: TrainConfig) -> float:
    """The loop that one writes by hand with timm's parts, as `ours` does it: flips, clipping, cosine."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    student, started = copy.deepcopy(model), time.perf_counter()
    student.to(device).train()
    optimizer = create_optimizer_v2(
        student, opt=config.optimizer, lr=config.lr, weight_decay=config.weight_decay
    )
    loader: Any = DataLoader(
        images,
        batch_size=config.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=config.workers,
    )
    scheduler, _ = create_scheduler_v2(
        optimizer, sched="cosine", num_epochs=1, step_on_epochs=False, updates_per_epoch=len(loader)
    )
    kinds = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}
    kind = kinds[config.precision]
    for update, (x, y) in enumerate(loader):
        flip = torch.rand(len(x)) < config.hflip
        x = torch.where(flip[:, None, None, None], x.flip(-1), x).to(device)
        with torch.autocast(device.type, dtype=kind, enabled=kind is not None):
            logits = student(x)
        loss = F.cross_entropy(logits.float(), y.to(device))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        scheduler.step_update(update)
    loss.item()  # waits for a GPU
    return len(images) / (time.perf_counter() - started)


def page(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return ""
    lines = [
        "## Training throughput",
        "",
        "Images per second of `vitailor train` and of a loop written by hand with timm's parts, in turns; everything",
        "around the loop counts. In the order in which they were measured; since the third, an update of the optimiser",
        "is one kernel. Made by `python benchmarks/train_throughput.py`.",
        "",
        "| model | precision | images a round | where | vitailor | plain loop | ratio, median of rounds | least, most |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        known, speed = row["conditions"], row["images_per_s"]
        where = f"{known['hardware']}, {known['threads']} threads, {known['date'][:10]}"
        lines.append(
            f"| {row['model']} | {row['precision'].replace('no', 'float32')} | {row['images']} | {where} | "
            f"{speed['vitailor']:.1f} | {speed['plain timm loop']:.1f} | {row['ratio']:.2f} | "
            f"{min(row['ratios']):.2f}, {max(row['ratios']):.2f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", required=True, help="a folder with one subfolder a class")
    parser.add_argument("--model", default="vit_tiny_patch16_224")
    parser.add_argument("--count", type=int, default=256, help="images for each round")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--precision", choices=("no", "bf16", "fp16"), default="bf16")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--log", type=Path, default=Path("benchmarks/results/train_throughput.jsonl")
    )
    arguments = parser.parse_args()
    torch.manual_seed(0)
    classes = sum(1 for entry in Path(arguments.images).iterdir() if entry.is_dir())
    model = timm.create_model(arguments.model, pretrained=False, num_classes=classes)
    config = TrainConfig(
        epochs=1,
        batch_size=arguments.batch_size,
        precision=arguments.precision,
        workers=arguments.workers,
    )
    preprocessing = Augmentation.of(resolve_preprocessing(model), config)
    images = open_images(arguments.images, preprocessing, images=arguments.count, split="train")
    contenders = {"vitailor": ours, "plain timm loop": plain}
    speeds: dict[str, list[float]] = {name: [] for name in contenders}
    for round_ in range(arguments.rounds + 1):
        for name, run in contenders.items():
            found = run(model, images, config)
            if round_:  # the first warms up
                speeds[name].append(found)
    ratios = [a / b for a, b in zip(*speeds.values(), strict=True)]
    row = {
        "model": arguments.model,
        "precision": arguments.precision,
        "batch_size": arguments.batch_size,
        "images": arguments.count,
        "images_per_s": {name: statistics.median(found) for name, found in speeds.items()},
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "conditions": conditions(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        | {"threads": torch.get_num_threads()},
    }
    arguments.log.parent.mkdir(parents=True, exist_ok=True)
    with arguments.log.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps({key: row[key] for key in ("images_per_s", "ratio", "ratios")}))


if __name__ == "__main__":
    main()
