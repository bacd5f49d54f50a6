"""Train the small Vision Transformer that `vitailor demo` compresses.

    python scripts/train_digits.py

It learns scikit-learn's handwritten digits (8x8 pixels, shown to it at 32x32) on a CPU in a few minutes
and writes `digits_vit.safetensors` (float16) and `digits_vit.json` into the package. The test images
play no part before the last line: the last epoch's weights are the ones that are kept. The same seed and
versions on one thread give the same weights.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import safetensors.torch
import sklearn
import timm
import timm.optim
import timm.scheduler
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode, RandomAffine
from torchvision.transforms.functional import pil_to_tensor

from vitailor.digits import digit_images

ASSETS = Path(__file__).parents[1] / "src" / "vitailor" / "assets"
ARCHITECTURE: dict[str, Any] = {
    "model_name": "vit_tiny_patch16_224",
    "img_size": 32,
    "patch_size": 4,
    "embed_dim": 64,
    "depth": 6,
    "num_heads": 4,
    "num_classes": 10,
}
PREPROCESSING: dict[str, Any] = {
    "input_size": [3, 32, 32],
    "interpolation": "bilinear",
    "crop_pct": 1.0,
    "mean": [0.5, 0.5, 0.5],
    "std": [0.5, 0.5, 0.5],
}


def load(split: str) -> tuple[Tensor, Tensor]:
    """Images as uint8 at the model's size, one channel, and labels."""
    images, labels = digit_images(split)
    size = PREPROCESSING["input_size"][1:]
    resized = [Image.fromarray(i).resize(size, Image.Resampling.BILINEAR) for i in images]
    return torch.stack([pil_to_tensor(i) for i in resized]), torch.as_tensor(labels).long()


def normalize(images_uint8: Tensor) -> Tensor:
    """Three equal channels in [-1, 1], as PREPROCESSING says."""
    return (images_uint8.float() / 255 - 0.5).div(0.5).expand(-1, 3, -1, -1)


@torch.inference_mode()
def count_correct(model: nn.Module, images: Tensor, labels: Tensor) -> int:
    model.eval()
    return int((model(normalize(images)).argmax(1) == labels).sum())


def train(args: argparse.Namespace) -> nn.Module:
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    images, labels = load("train")
    model = timm.create_model(**ARCHITECTURE, drop_path_rate=args.drop_path)
    optimizer = timm.optim.create_optimizer_v2(model, "adamw", lr=args.lr, weight_decay=0.05)
    scheduler = timm.scheduler.CosineLRScheduler(
        optimizer, t_initial=args.epochs, lr_min=args.lr / 100, warmup_t=5, warmup_lr_init=1e-5
    )
    loss_function = nn.CrossEntropyLoss(label_smoothing=0.1)
    augment = RandomAffine(
        degrees=10,
        translate=(0.08, 0.08),
        scale=(0.9, 1.1),
        interpolation=InterpolationMode.BILINEAR,
    )
    began = time.perf_counter()
    for epoch in range(args.epochs):
        scheduler.step(epoch)
        model.train()
        total = 0.0
        for chosen in torch.randperm(len(images)).split(args.batch_size):
            batch = torch.stack([augment(images[i]) for i in chosen])
            loss = loss_function(model(normalize(batch)), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(chosen)
        seconds = time.perf_counter() - began
        print(f"epoch {epoch + 1:3d}  loss {total / len(images):.4f}  {seconds:4.0f} s", flush=True)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--drop-path", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=ASSETS)
    args = parser.parse_args()

    model = train(args)
    tensors = {name: tensor.half() for name, tensor in model.state_dict().items()}
    model.load_state_dict(tensors)  # what is measured is what is shipped
    images, labels = load("test")
    correct = count_correct(model, images, labels)
    facts = {
        "architecture": ARCHITECTURE,
        "preprocessing": PREPROCESSING,
        "class_names": [str(digit) for digit in range(10)],
        "test": {"top1": round(100 * correct / len(images), 2), "images": len(images)},
        "training": {
            name: getattr(args, name)
            for name in ("epochs", "batch_size", "lr", "drop_path", "seed", "threads")
        },
        "versions": {
            "torch": torch.__version__.split("+")[0],
            "timm": timm.__version__,
            "scikit-learn": sklearn.__version__,
        },
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "digits_vit.safetensors").write_bytes(safetensors.torch.save(tensors))
    (args.out / "digits_vit.json").write_text(json.dumps(facts, indent=1) + "\n")
    print(f"top-1 {facts['test']['top1']} % on {len(images)} test images")


if __name__ == "__main__":
    main()
