"""Dependence of all neurons of a real-sized model on its predictions, against the formula unit by unit.

    python benchmarks/dependence.py

The reference is written from the formula: for each unit the differences of all samples, five exponentials of their
squared distances, and the trace of a product of four matrices. A second one takes its distances from one product, as
`torch.cdist` does. All score the same features in the same run, block by block in turns. Weights and images are
random: neither matters to the time.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import timm
import torch
from torch import Tensor
from training_free import append

from vitailor.benchmarking import conditions
from vitailor.dependence import BANDWIDTHS, relevance

IMAGES = 128


def by_differences(x: Tensor) -> Tensor:
    return (x.unsqueeze(0) - x.unsqueeze(1)).square().sum(-1)


def by_product(x: Tensor) -> Tensor:
    return torch.cdist(x, x).square()


def unit_by_unit(x_UBN: Tensor, y_BC: Tensor, distances: Callable[[Tensor], Tensor]) -> Tensor:
    """tr(K H L H) / (n - 1)^2, one unit after the other."""
    n = len(y_BC)
    h = torch.eye(n, device=y_BC.device) - 1 / n
    target, scores = y_BC @ y_BC.T, []
    for x in x_UBN:
        far = distances(x)
        gram = sum(torch.exp(-far / (2 * s**2)) for s in BANDWIDTHS) / len(BANDWIDTHS)
        scores.append(torch.trace(gram @ h @ target @ h) / (n - 1) ** 2)
    return torch.stack(scores)


#: What is timed: ours, the formula, and the formula with fast distances.
RUNS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "ours": relevance,
    "formula": partial(unit_by_unit, distances=by_differences),
    "product": partial(unit_by_unit, distances=by_product),
}


@torch.inference_mode()
def measure(device: torch.device, name: str) -> dict:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=1000).eval().to(device)
    features: list[Tensor] = []
    handles = [
        block.mlp.fc2.register_forward_pre_hook(
            lambda _, args: features.append(args[0].permute(2, 1, 0).contiguous().mT)
        )
        for block in model.blocks
    ]
    predicted = model(torch.randn(IMAGES, 3, 224, 224, device=device)).softmax(-1)
    for handle in handles:
        handle.remove()
    seconds, worst = dict.fromkeys(RUNS, 0.0), 0.0
    for run in RUNS.values():
        run(features[0][:8], predicted)  # warm up
    for x in features:
        found, rows = {}, x.contiguous()
        for what, run in RUNS.items():
            began = clock(device)
            found[what] = run(x if what == "ours" else rows, predicted)
            seconds[what] += clock(device) - began
        exact = relevance(x.double(), predicted.double())
        worst = max(worst, float(((found["ours"] - exact) / exact).abs().max()))
    return {
        "model": name,
        "images": IMAGES,
        "neurons": sum(len(x) for x in features),
        "seconds": seconds,
        "ratios": {what: seconds[what] / seconds["ours"] for what in ("formula", "product")},
        "float32_error": worst,
        "conditions": conditions(device) | {"threads": torch.get_num_threads()},
    }


def clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="vit_tiny_patch16_224")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--log", type=Path, default=Path("benchmarks/results/dependence.jsonl"))
    arguments = parser.parse_args()
    row = measure(torch.device(arguments.device), arguments.model)
    append(arguments.log, row)
    print(row)


def page(rows: list[dict]) -> str:
    if not rows:
        return ""
    lines = [
        "## Dependence of neurons on predictions",
        "",
        "All neurons of a model scored on 128 images, against the formula evaluated unit by unit in the same",
        "run; and against the same with its distances from one product. Made by `python benchmarks/dependence.py`.",
        "",
        "| model | neurons | device | seconds | formula, unit by unit | ratio | distances by a product | ratio | "
        "relative error in float32 |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        known, seconds = row["conditions"], row["seconds"]
        where = f"{known['hardware']}, {known['threads']} threads"
        lines.append(
            f"| {row['model']} | {row['neurons']:,} | {where} | {seconds['ours']:.1f} | "
            f"{seconds['formula']:.1f} | {row['ratios']['formula']:.1f} | {seconds['product']:.1f} | "
            f"{row['ratios']['product']:.1f} | {row['float32_error']:.0e} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
