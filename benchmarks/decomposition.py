"""Every decomposition of the projections, plain and activation-aware, on a real model; and the hybrid.

    python benchmarks/decomposition.py --data ../shared/data --after pruned/
    python benchmarks/decomposition.py --part vit_base_patch16_224  # what it takes

Each row is appended to the log when it is done and not measured again. `--after` names an artifact that
VTP has pruned, to decompose as well. Nothing is trained here. Calibration sees unlabeled training images;
top-1 is of a fixed draw of 1,000 validation images, equally many of each class.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import get_args

import timm
import torch
from torch import nn
from training_free import append, outcomes, read, span

import vitailor as vt
from vitailor.benchmarking import conditions
from vitailor.calibrate import dense_sweep
from vitailor.data import ImageSet, loader, open_images
from vitailor.decompose import Decomposition
from vitailor.evaluation import paired_difference
from vitailor.factors import Inputs, weight_of
from vitailor.hosts import host_of, shape_of
from vitailor.methods import ClosedForm, Hybrid, LowRank, Method
from vitailor.methods.low_rank import inputs_of
from vitailor.models import open_model
from vitailor.plan import BlockPlan, Plan
from vitailor.preprocessing import resolve_preprocessing
from vitailor.provenance import weights_hash
from vitailor.ranks import Spectrum, at_share, with_ranks, within_budget
from vitailor.surgery import written

KEEPS = (0.9, 0.8, 0.7)
#: Of the MACs, for the hybrid and what it combines.
HYBRID_KEEPS = (0.8, 0.7, 0.6)
HYBRID: dict[str, Method] = {
    "hybrid, smaller heads": Hybrid(),
    "hybrid, two factors": Hybrid(form="factors"),
    "hybrid, smaller heads, without compensation": Hybrid(compensation=False),
    "low rank alone, all projections": LowRank(),
    "low rank alone, smaller heads": ClosedForm(dimensions=("qk", "v")),
    "hidden units alone": ClosedForm(dimensions=("neurons",)),
}
CALIBRATION, FEW = 512, 1000
COSTS = ("vit_base_patch16_224", "vit_large_patch16_224")


@dataclass(frozen=True)
class Ready:
    """A model that is to be decomposed, and what its projections read."""

    name: str
    model: nn.Module
    inputs: list[Inputs]
    spectra: dict[bool, list[Spectrum]]

    @classmethod
    def of(cls, name: str, model: nn.Module, images: ImageSet) -> Ready:
        host = host_of(model)
        sweep = dense_sweep(model, loader(images, batch_size=16), attention_input=True)
        inputs = [
            inputs_of(host.read(host.block(model, i)), moments) for i, moments in enumerate(sweep)
        ]
        unseen: list[Inputs] = [{} for _ in inputs]
        spectra = {
            aware: LowRank(activation_aware=aware).spectra(model, inputs if aware else unseen)
            for aware in (False, True)
        }
        return cls(name, model, inputs, spectra)

    def decomposed(self, kind: Decomposition, aware: bool, keep: float) -> tuple[nn.Module, float]:
        """The smaller model, and the seconds that its decomposition took, moments and spectra apart."""
        shape, spectra = shape_of(self.model), self.spectra[aware]
        choice = within_budget(shape, spectra, "params", int(keep * shape.params))
        target = with_ranks(shape, spectra, choice)
        plan = Plan(blocks=tuple(BlockPlan(ranks=block.ranks) for block in target.blocks))
        inputs: list[Inputs] = self.inputs if aware else [{} for _ in self.inputs]
        began = time.perf_counter()
        method = LowRank(decomposition=kind, activation_aware=aware)
        small = written(self.model, target, method.decompose(self.model, plan, inputs, 0)[0])
        return small, time.perf_counter() - began

    def errors(self, small: nn.Module, aware: bool) -> tuple[float, float]:
        """What is lost of the weights and of the outputs' variation, in the mean over the projections that
        are decomposed, as shares of what was there (of norms, not of squares).

        In the activation-aware form biases take up what is lost of the mean; in the plain form that is lost too.
        """
        host, lost = host_of(small), []
        for i, inputs in enumerate(self.inputs):
            was = host.read(host.block(self.model, i))
            now = host.read(host.block(small, i))
            for name, rank in shape_of(small).blocks[i].ranks:
                if rank is None:
                    continue
                old, new = (weight_of(tensors, name).double() for tensors in (was, now))
                own = inputs[name]
                seen = own.covariance if aware else own.second / own.count
                lost.append(
                    (
                        float((old - new).norm() / old.norm()),
                        float((_energy(old - new, seen) / _energy(old, own.covariance)).sqrt()),
                    )
                )
        weights, outputs = torch.tensor(lost).mean(0).tolist()
        return weights, outputs


def _energy(weight: torch.Tensor, moments: torch.Tensor) -> torch.Tensor:
    return (weight @ moments * weight).sum()


class Bench:
    """The models, their images, and where results go."""

    def __init__(self, data: Path, log: Path) -> None:
        self.log = log
        self.source = f"vit_tiny_patch16_224={data / 'vit_tiny_tinyimagenet200.safetensors'}"
        self.dense = open_model(self.source).model
        self.preprocessing = resolve_preprocessing(
            self.dense, crop_pct=1.0, interpolation="bilinear"
        )
        train = str(data / "tiny_imagenet/train")
        self.calibration = open_images(
            train, self.preprocessing, images=CALIBRATION, seed=0, split="train"
        )
        validation = open_images(
            str(data / "tiny_imagenet/validation"),
            self.preprocessing,
            num_classes=self.dense.num_classes,
            labels_needed=True,
        )
        self.few = validation.draw(FEW, 0)
        self.done = {(r["model"], r["row"], r["keep"]) for r in read(log)}
        self.weights = {r["model"]: r["weights"] for r in read(log) if "weights" in r}

    def record(self, model: str, row: str, keep: float, small: nn.Module, **facts: object) -> None:
        found = vt.evaluate(small, self.few)
        shape = shape_of(small)
        append(
            self.log,
            {
                "model": model,
                "row": row,
                "keep": keep,
                "macs": shape.macs,
                "params": shape.params,
                "top1": found.top1,
                "images": found.images,
                "correct": "".join("01"[hit] for hit in found.correct),
                **facts,
                "conditions": conditions(torch.device("cpu"))
                | {"threads": torch.get_num_threads()},
            },
        )
        print(f"{model} {row} {keep}: {found.top1:.2f} {facts.get('output_error', '')}", flush=True)

    def decompositions(self, name: str, model: nn.Module) -> None:
        """Every decomposition of one model."""
        weights = weights_hash(model)
        if self.weights.setdefault(name, weights) != weights:
            raise SystemExit(f"The log's rows of '{name}' are of another model: take another log.")
        todo = [key for key in rows() if (name, title(*key[:2]), key[2]) not in self.done]
        if (name, "as it is", 1.0) not in self.done:
            self.record(name, "as it is", 1.0, model, weights=weights)
        if not todo:
            return
        ready = Ready.of(name, model, self.calibration)
        for kind, aware, keep in todo:
            small, seconds = ready.decomposed(kind, aware, keep)
            lost = dict(
                zip(("weight_error", "output_error"), ready.errors(small, aware), strict=True)
            )
            self.record(name, title(kind, aware), keep, small, **lost, seconds=seconds)

    def hybrids(self) -> None:
        """The hybrid beside what it combines, at equal MACs."""
        for keep, (row, method) in product(HYBRID_KEEPS, HYBRID.items()):
            if ("dense", row, keep) in self.done:
                continue
            began = time.perf_counter()
            try:
                small = vt.compress(
                    self.dense,
                    method,
                    vt.Budget(macs=keep),
                    data=self.calibration,
                    seed=0,
                    source=self.source,
                    preprocessing=self.preprocessing,
                )
            except vt.BudgetError as error:
                append(self.log, {"model": "dense", "row": row, "keep": keep, "error": str(error)})
                continue
            self.record("dense", row, keep, small, seconds=time.perf_counter() - began)


# -- what it takes ---------------------------------------------------------------------------------


def takes(name: str, log: Path) -> None:
    """Seconds and memory for all projections of a model of this name, with random weights and images: these
    do not matter to either."""
    key = f"cost of {name}"
    if any(row["row"] == key for row in read(log)):
        return
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    shape, images = shape_of(model), [torch.randn(16, 3, 224, 224) for _ in range(2)]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    moments = dense_sweep(model, images, attention_input=True)
    host, method = host_of(model), LowRank()
    inputs = [inputs_of(host.read(host.block(model, i)), m) for i, m in enumerate(moments)]
    began = time.perf_counter()
    spectra = method.spectra(model, inputs)
    target = with_ranks(shape, spectra, at_share(spectra, 0.4))  # every projection
    plan = Plan(blocks=tuple(BlockPlan(ranks=block.ranks) for block in target.blocks))
    ranked = time.perf_counter()
    written(model, target, method.decompose(model, plan, inputs, 0)[0])
    ended = time.perf_counter()
    row = {
        "model": "cost",
        "row": key,
        "keep": target.params / shape.params,
        "params": shape.params,
        "decomposed": sum(r is not None for block in target.blocks for _, r in block.ranks),
        "spectra_seconds": ranked - began,
        "decomposition_seconds": ended - ranked,
        "memory_mib": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024,
        "conditions": conditions(torch.device("cpu")) | {"threads": torch.get_num_threads()},
    }
    append(log, row)
    print(row, flush=True)


# -- the page ------------------------------------------------------------------------------------


def page(found: list[dict]) -> str:
    by_model = {name: [r for r in found if r["model"] == name] for name in ("dense", "after VTP")}
    lines: list[str] = []
    for name, own in by_model.items():
        whole = next((row for row in own if row["row"] == "as it is"), None)
        if whole is None:
            continue
        what = "The dense model" if name == "dense" else "The model that VTP has pruned"
        lines += [
            f"### {what}, decomposed: {whole['top1']:.2f}, {whole['params'] / 1e6:.2f}M parameters",
            "",
            "| decomposition | keep | weight error | output error | top-1 | against it as it is | seconds |",
            "|---|---|---|---|---|---|---|",
        ]
        kinds = {title(kind, aware) for kind, aware, _ in rows()}
        for row in sorted(
            (r for r in own if r["row"] in kinds), key=lambda r: (-r["keep"], -r["top1"])
        ):
            lines.append(
                f"| {row['row']} | {row['keep']:g} | {row['weight_error']:.3f} | "
                f"{row['output_error']:.3f} | {row['top1']:.2f} | "
                f"{span(outcomes(row), outcomes(whole))} | {row['seconds']:.0f} |"
            )
        lines += ["", *finding(own), ""]
        if name == "dense":
            lines += READING if any(row["row"] in kinds for row in own) else []
            lines += hybrid_table(own, whole)
    if not lines:
        return ""
    head = [
        "## Matrix decomposition",
        "",
        "The ViT-Ti/16 on Tiny-ImageNet, all six projections of every block, nothing trained; ranks are",
        "shared out by water-filling so that the given share of all parameters stays, by the shares that SVD loses of each",
        "projection's outputs (activation-aware) or weights (plain). Errors are means over projections of what is",
        "lost of the weights' norm and of the outputs' root mean square variation, as shares; in the activation-aware",
        "form biases take up what is lost of the mean. Which projections stay dense depends on the spectra. Top-1 is of a",
        "fixed draw of 1,000 validation images, equally many of each class. Made by",
        "`python benchmarks/decomposition.py`; the rows are in `benchmarks/results/decomposition.jsonl`.",
        "",
    ]
    for row in (r for r in found if r["model"] == "cost"):
        lines += [
            f"{row['row'].removeprefix('cost of ')} ({row['params'] / 1e6:.0f}M parameters): activation-aware SVD "
            f"of {row['decomposed']} projections",
            f"takes {row['spectra_seconds'] + row['decomposition_seconds']:.0f} s on "
            f"{row['conditions']['threads']} CPU threads, calibration aside, and "
            f"{row['memory_mib'] / 1024:.1f} GiB above the model.",
            "",
        ]
    return "\n".join([*head, *lines]).rstrip() + "\n"


#: SVD, exactly and from a sketch.
SVDS = ("svd", "randomized-svd")


def finding(own: list[dict]) -> list[str]:
    """Whether the paper's choice, SVD, is the most accurate one."""
    by_key = {(row["row"], row["keep"]): row for row in own}
    told, ahead, behind = [], 0, 0
    for aware, words in ((True, "as inputs see the weights"), (False, "of the weights alone")):
        leads = []
        for keep in KEEPS:
            rows = {
                kind: by_key.get((title(kind, aware), keep)) for kind in get_args(Decomposition)
            }
            if any(row is None for row in rows.values()):
                return []  # not all is measured yet
            ours, rival = (
                max(kinds, key=lambda kind: rows[kind]["top1"])
                for kinds in (SVDS, [kind for kind in rows if kind not in SVDS])
            )
            both = outcomes(rows[ours]), outcomes(rows[rival])
            _, low, high = paired_difference(*both)
            ahead, behind = ahead + (low > 0), behind + (high < 0)
            leads.append(f"{span(*both)} over {rival} at {keep:g}")
        told.append(f"{words}, {', '.join(leads)}")
    cases = 2 * len(KEEPS)
    verdict = "is confirmed" if ahead and not behind else "is not confirmed"
    return [
        "The paper chooses SVD. SVD, exact or from a sketch, against the best of the others, paired:",
        f"{'; '.join(told)}.",
        f"By accuracy the choice {verdict}: SVD is ahead in {ahead} of these {cases} cases, behind in {behind}, and cannot",
        f"be told from the other in {cases - ahead - behind} (chance is 0.5).",
    ]


#: What the table of the dense model shows.
READING = [
    "That SVD has the least error of the weights is a theorem; but that error is no guide to accuracy, since the",
    "activation-aware forms lose more of the weights and far less of the outputs. Looking at the inputs is worth more",
    "than any choice of decomposition: activation-aware QR, ordered by importance, is more accurate than plain SVD.",
    "LU keeps rows and columns exactly and leaves errors larger than what it approximates. Without training no",
    "decomposition of all projections comes near to cutting hidden units with compensation (at equal MACs, below).",
    "",
]


def hybrid_table(own: list[dict], whole: dict) -> list[str]:
    here = [row for row in own if row["row"] in HYBRID]
    if not here:
        return []
    lines = [
        "### Attention by low rank, feed-forward by pruning, without training",
        "",
        "At equal MACs; tokens and heads stay. The hybrid with smaller heads is low rank for attention, of each head's",
        "two products, and pruned hidden units; the others are its parts alone, and the paper's form in two factors.",
        "",
        "| method | keep | MACs (M) | top-1 | against dense | hybrid against it | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for keep in HYBRID_KEEPS:
        level = [row for row in here if row["keep"] == keep]
        ours = next((r for r in level if r["row"] == next(iter(HYBRID)) and "top1" in r), None)
        for row in sorted(level, key=lambda r: -r.get("top1", -1)):
            if "error" in row:
                lines.append(f"| {row['row']} | {keep:g} | cannot go so low | | | | |")
                continue
            versus = ""
            if ours is not None and row is not ours:
                versus = span(outcomes(ours), outcomes(row))
            lines.append(
                f"| {row['row']} | {keep:g} | {row['macs'] / 1e6:.0f} | {row['top1']:.2f} | "
                f"{span(outcomes(row), outcomes(whole))} | {versus} | {row['seconds']:.0f} |"
            )
    return [*lines, ""]


def rows() -> Iterator[tuple[Decomposition, bool, float]]:
    for keep, aware, kind in product(KEEPS, (False, True), get_args(Decomposition)):
        yield kind, aware, keep


def title(kind: str, aware: bool) -> str:
    return f"{kind}, {'activation-aware' if aware else 'plain'}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--after", type=Path, help="artifact that VTP has pruned")
    parser.add_argument("--part", choices=["decompositions", "hybrid", "after", *COSTS])
    parser.add_argument("--log", type=Path, default=Path("benchmarks/results/decomposition.jsonl"))
    arguments = parser.parse_args()
    if arguments.part in COSTS:  # each in a process of its own, for its memory
        takes(arguments.part, arguments.log)
        return
    bench = Bench(arguments.data, arguments.log)
    if arguments.part in (None, "decompositions"):
        bench.decompositions("dense", bench.dense)
    if arguments.part in (None, "hybrid"):
        bench.hybrids()
    if arguments.part in (None, "after") and arguments.after is not None:
        bench.decompositions("after VTP", vt.load(arguments.after))


if __name__ == "__main__":
    main()
