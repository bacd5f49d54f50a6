"""The main job on what comes with the install: a small ViT, real images, every method, one page."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from torch import nn

from .artifact import save
from .budget import Budget
from .compression import compress
from .data import open_images
from .errors import BudgetError
from .evaluation import evaluate
from .methods import METHODS, VTP, ClosedForm, Hybrid, Method, MultiDim
from .preprocessing import Preprocessing
from .reporting import write_page
from .runs import Run, read_run
from .training import TrainConfig

#: Fractions of the MACs that are kept.
KEEPS = (0.6, 0.4)
CALIBRATION_IMAGES = 64
#: For methods that train, which must not take all of a minute.
TRAINING_IMAGES = 256
#: Candidates of a search.
TRIALS = 4
INTRO = (
    "A small Vision Transformer that reads handwritten digits, cut by every method at two budgets. "
    f"Each method saw {CALIBRATION_IMAGES} unlabeled training images and trained nothing, except vtp, which "
    f"trains for two epochs on {TRAINING_IMAGES} labeled ones; accuracy is on 500 images that neither training nor calibration saw. The task "
    "is easy: this shows that everything works here, not what to expect on your model."
)


@dataclass(frozen=True)
class Entry:
    """One compressed model of the demo: method, fraction of the MACs asked for, and what came out."""

    method: str
    keep: float
    run: Run


@dataclass(frozen=True)
class Demo:
    """What a demo made: its models, the page that compares them, and which budgets were out of reach.

    Attributes:
        out_of_reach: (method, fraction of the MACs) where no plan of the method meets the budget.
    """

    entries: tuple[Entry, ...]
    report: Path
    out_of_reach: tuple[tuple[str, float], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """`rows`, the dense model first, and `report`; top-1 in percent."""
        first = self.entries[0].run
        dense = {"method": "dense", "keep": 1.0, "macs": first.macs_before}
        dense |= {"params": first.params_before, "top1": _top1(first, "before")}
        rows = [
            {
                "method": entry.method,
                "keep": entry.keep,
                "macs": entry.run.macs,
                "params": entry.run.params,
                "top1": _top1(entry.run, "after"),
            }
            for entry in self.entries
        ]
        return {"rows": [dense, *rows], "report": str(self.report)}


def demo(
    out: str | os.PathLike[str] = "vitailor-demo",
    *,
    device: str | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Demo:
    """Compress the embedded model by every method at two budgets, evaluate, and write the page.

    Args:
        out: folder for the compressed models and the page, `report.html`; earlier ones are replaced.
        device: where to run; the CPU by default.
        seed: of the draw of calibration images and of the methods.
        progress: called with the runs done and their total.
    """
    out = Path(out)
    model, preprocessing = digits_model()
    calibration = open_images("digits:train", preprocessing, images=CALIBRATION_IMAGES, seed=seed)
    train = open_images("digits:train", preprocessing, images=TRAINING_IMAGES, seed=seed)
    test = open_images("digits:test", preprocessing, labels_needed=True)
    before = evaluate(model, test, device=device)
    tasks = [(keep, name, method) for keep in KEEPS for name, method in contenders().items()]
    entries, out_of_reach = [], []
    for done, (keep, name, method) in enumerate(tasks):
        if progress is not None:
            progress(done, len(tasks))
        try:
            small = compress(
                model,
                method,
                Budget(macs=keep),
                data=calibration,
                train=train if method.trains else None,
                evaluate=test,
                before=before,
                device=device,
                seed=seed,
                source="the embedded digits model",
                preprocessing=preprocessing,
            )
        except BudgetError:
            out_of_reach.append((name, keep))
            continue
        run = read_run(save(small, out / f"{name}-{keep:g}", overwrite=True))
        entries.append(Entry(name, keep, run))
    note = "".join(
        f" No plan of {name} keeps as little as {keep:g}." for name, keep in out_of_reach
    )
    page = write_page(
        [entry.run for entry in entries],
        out / "report.html",
        title="vitailor demo",
        intro=INTRO + note,
    )
    return Demo(tuple(entries), page, tuple(out_of_reach))


def contenders() -> dict[str, Method]:
    """Every method, with its defaults, as short a training as shows what it does, or in its faster form;
    and for comparison what pruning usually means: the smallest weights go, the same share everywhere, and
    nothing makes up for them."""
    usual = ClosedForm(criterion="magnitude", compensation=False, allocation="uniform")
    # Mirrored digits are no digits, and few updates need a large step of the gates.
    short = TrainConfig(epochs=1, batch_size=32, gate_lr=2e-2, hflip=0.0)
    chosen = {
        "closed-form": ClosedForm(tune_images=0),
        "vtp": VTP(training=short),
        "hybrid": Hybrid(form="factors"),
        "multi-dim": MultiDim(trials=TRIALS),
    }
    methods = {name: kind() for name, kind in METHODS.items()}
    return methods | chosen | {"magnitude-uniform": usual}


def digits_model() -> tuple[nn.Module, Preprocessing]:
    """The embedded Vision Transformer for scikit-learn's digits, and its preprocessing."""
    assets = resources.files("vitailor") / "assets"
    facts = json.loads((assets / "digits_vit.json").read_text(encoding="utf-8"))
    tensors = safetensors.torch.load((assets / "digits_vit.safetensors").read_bytes())
    with torch.random.fork_rng(devices=[]):
        model = timm.create_model(**facts["architecture"])
    model.load_state_dict(tensors)
    return model.eval(), Preprocessing.from_json(json.dumps(facts["preprocessing"]))


def _top1(run: Run, when: str) -> float | None:
    value: float | None = getattr(run.accuracy, when, None)
    return value
