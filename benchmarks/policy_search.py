"""Gaussian-process search against random search, the uniform policy and closed-form's own allocation.

    python benchmarks/policy_search.py --data ../shared/data --work ../runs

On the ViT-Ti/16 for Tiny-ImageNet at half of the MACs, training-free, 40 candidates, three seeds, with and without
compensation. Rewards are on training images; validation images are used once, for the figures. Each row is appended
to the log when it is done and not measured again, and searches go on from their journals. `--backwards` is for a second
process with the same log.

    python benchmarks/policy_search.py --part workers --work ../runs

times one worker, two workers that share a study, and one worker with two threads.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from datetime import datetime
from itertools import pairwise, product
from pathlib import Path

import torch
from training_free import FEW, append, outcomes, read, span

import vitailor as vt
from vitailor.benchmarking import conditions
from vitailor.data import ImageSet, open_images
from vitailor.models import open_model
from vitailor.preprocessing import resolve_preprocessing

KEEP, TRIALS, SEEDS = 0.5, 40, (0, 1, 2)
IMAGES, REWARD_IMAGES = 512, 128
ALL = {
    "criterion": "output_error",
    "dimensions": ("neurons", "heads", "qk", "v", "tokens"),
    "tokens": "attention",
}
#: What is cut, by which order of units and rule for tokens: as published, and with everything vitailor has.
SPACES: dict[str, dict] = {
    "published": {},
    "all dimensions": ALL | {"token_blocks": tuple(range(1, 12))},
    "weights on harms": ALL | {"space": "harm"},
    # As many images to calibrate on, and to compare whole allocations on, as closed-form has.
    "weights on harms, more images": ALL | {"space": "harm", "reward_images": 384},
}
#: Images in all, where they are not `IMAGES`.
MORE = {"weights on harms, more images": 896}


class Bench:
    """The model, its images, and where results go."""

    def __init__(self, data: Path, work: Path, log: Path) -> None:
        self.work, self.log = work, log
        self.source = "vit_tiny_tinyimagenet200.safetensors"
        self.dense = open_model(f"vit_tiny_patch16_224={data / self.source}").model
        self.preprocessing = resolve_preprocessing(
            self.dense, crop_pct=1.0, interpolation="bilinear"
        )
        self.train = str(data / "tiny_imagenet/train")
        self.validation = open_images(
            str(data / "tiny_imagenet/validation"),
            self.preprocessing,
            num_classes=self.dense.num_classes,
            labels_needed=True,
        ).draw(FEW, 0)

    def calibration(self, space: str | None = None) -> ImageSet:
        """Images to calibrate on, and of a search to judge on."""
        count = MORE.get(space or "", IMAGES)
        return open_images(self.train, self.preprocessing, images=count, seed=0, split="train")

    def rows(self, backwards: bool) -> None:
        jobs = [("dense", None, None, None, lambda: (self.dense, {}))]
        for compensation in (True, False):
            for space in SPACES:
                if space in MORE and not compensation:
                    continue
                even = self.uniform(space, compensation)
                jobs.append(("uniform", space, compensation, None, even))
                for seed, sampler in product(SEEDS, ("gp", "random")):
                    run = self.searched(space, compensation, sampler, seed)
                    jobs.append((sampler, space, compensation, seed, run))
        jobs.append(("closed-form", None, True, None, self.closed_form))
        for job in reversed(jobs) if backwards else jobs:
            self.measure(*job)

    def measure(self, row: str, space: str | None, compensation: bool | None, seed, run) -> None:
        facts = {"row": row, "space": space, "compensation": compensation, "seed": seed}
        # Another process may have come from the other end.
        if key(facts) in {key(known) for known in read(self.log) if known["part"] == "search"}:
            return
        model, told = run()
        found = vt.evaluate(model, self.validation, preprocessing=self.preprocessing)
        shape = vt.shape_of(model)
        facts |= {
            "part": "search",
            "top1": found.top1,
            "images": found.images,
            "correct": "".join("01"[hit] for hit in found.correct),
            "macs": shape.macs,
            "conditions": conditions(torch.device("cpu")) | {"threads": torch.get_num_threads()},
            **told,
        }
        append(self.log, facts)
        print(
            f"{row} {space} compensation {compensation} seed {seed}: {found.top1:.2f}", flush=True
        )

    def method(self, space: str, compensation: bool, **more) -> vt.MultiDim:
        fields = {"compensation": compensation, "reward_images": REWARD_IMAGES}
        return vt.MultiDim(**(fields | SPACES[space] | more))

    def uniform(self, space: str, compensation: bool):
        """The first point of the design: everything cut alike."""
        method = self.method(space, compensation, trials=1, initial=1)
        return lambda: (self.search(space, method, 0, None).model, {})

    def searched(self, space: str, compensation: bool, sampler: str, seed: int):
        def run():
            name = f"{space}-{compensation}-{sampler}-{seed}".replace(" ", "-")
            method = self.method(space, compensation, trials=TRIALS, sampler=sampler)
            found = self.search(space, method, seed, self.work / name)
            seconds = sum(trial["seconds"] for trial in found.trials) / len(found.trials)
            own = found.model.vitailor.record["facts"]["own_trials"]
            return found.model, {
                "reward": found.best["reward"],
                "rewards": [trial["reward"] for trial in found.trials],
                "seconds_per_trial": seconds,
                # Of the trials that this process did; a search that was cut off tells of its last part.
                "overhead": found.overhead_seconds / (own * seconds) if own else None,
            }

        return run

    def search(self, space: str, method: vt.MultiDim, seed: int, folder: Path | None):
        return vt.search(
            self.dense,
            vt.Budget(macs=KEEP),
            data=self.calibration(space),
            method=method,
            seed=seed,
            folder=folder,
            source=self.source,
            preprocessing=self.preprocessing,
        )

    def closed_form(self):
        small = vt.compress(
            self.dense,
            vt.ClosedForm(),
            vt.Budget(macs=KEEP),
            data=self.calibration(),
            source=self.source,
            preprocessing=self.preprocessing,
        )
        return small, {}


def key(row: dict) -> tuple:
    return row["row"], row["space"], row["compensation"], row["seed"]


# -- several workers -----------------------------------------------------------------------------

#: Trials of each run of `workers`.
SHARED_TRIALS = 24


def workers(data: Path, work: Path, log: Path) -> None:
    """Trials a minute of one worker with one thread, of two such, and of one with two threads."""
    speeds = {}
    for name, count, threads in (("one", 1, 1), ("two", 2, 1), ("one, two threads", 1, 2)):
        storage = work / f"{name.replace(' ', '-').replace(',', '')}-{time.time_ns()}.journal"
        command = [
            *(sys.executable, "-m", "vitailor.cli", "search", "vit_tiny_patch16_224"),
            *("--weights", str(data / "vit_tiny_tinyimagenet200.safetensors"), "--keep", str(KEEP)),
            *("--calibrate", str(data / "tiny_imagenet/train"), "--images", "128"),
            *("--trials", str(SHARED_TRIALS), "--sampler", "random", "--storage", str(storage)),
            *("--crop-pct", "1.0", "--interpolation", "bilinear", "--json"),
        ]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        started = [
            subprocess.Popen(
                [*command, "-o", f"{storage}-{i}"], env=environment, stdout=subprocess.DEVNULL
            )
            for i in range(count)
        ]
        if any(process.wait() for process in started):
            raise SystemExit(f"{name}: a worker failed")
        speeds[name] = rate(storage)
        print(f"{name}: {speeds[name]:.1f} trials a minute", flush=True)
    row = {
        "part": "workers",
        "trials_per_minute": speeds,
        "conditions": conditions(torch.device("cpu")),
    }
    append(log, row)


def rate(storage: Path) -> float:
    """Trials a minute, from the first trial's beginning to the last one's end; what each worker does before, it
    does once."""
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    place = JournalStorage(JournalFileBackend(str(storage)))
    (name,) = optuna.get_all_study_names(place)
    trials = optuna.load_study(study_name=name, storage=place).trials
    done = [trial for trial in trials if trial.datetime_complete is not None]
    begun = all_at_work(done)
    ends = [trial.datetime_complete for trial in done]
    within = [end for end in ends if end > begun]
    return 60 * len(within) / (max(ends) - begun).total_seconds()


def all_at_work(trials) -> datetime:
    """When the second worker came: with the first trial that overlaps another; or the first of all."""
    trials = sorted(trials, key=lambda trial: trial.datetime_start)
    later = [
        trial.datetime_start
        for before, trial in pairwise(trials)
        if trial.datetime_start < before.datetime_complete
    ]
    return later[0] if later else trials[0].datetime_start


# -- the page ------------------------------------------------------------------------------------


def page(rows: list[dict]) -> str:
    found = [row for row in rows if row["part"] == "search"]
    dense = next((row for row in found if row["row"] == "dense"), None)
    if dense is None:
        return ""
    lines = [
        "## Search over policies",
        "",
        f"The ViT-Ti/16 for Tiny-ImageNet at {KEEP:g} of the MACs, nothing trained: {TRIALS} candidates judged on",
        f"{REWARD_IMAGES} training images, {IMAGES - REWARD_IMAGES} others to calibrate on (more images: 384 and 512, as",
        "closed-form's; it may use the same ones for both). Uniform is the first candidate: everything cut alike, or",
        "the allocation that follows from harms as they were measured, which closed-form goes on from. Top-1 is on the",
        f"draw of {FEW:,} validation images, mean over seeds (dense {dense['top1']:.2f}). Made by",
        "`python benchmarks/policy_search.py`; the rows are in `benchmarks/results/policy_search.jsonl`.",
        "",
        "| space | compensation | policy | top-1 by seed | mean | against closed-form by seed, paired 95% | best reward, mean | s a trial | overhead |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    ours = next((row for row in found if row["row"] == "closed-form"), None)
    if ours is not None:
        lines.append(f"| | yes | closed-form's allocation | | {ours['top1']:.2f} | | | | |")
    for space in SPACES:
        for compensation in (True, False):
            for name in ("gp", "random", "uniform"):
                own = [r for r in found if key(r)[:3] == (name, space, compensation)]
                if own:
                    lines.append(line(own, ours, space, compensation, name))
    lines += ["", *why(found)]
    for row in rows:
        if row["part"] == "workers":
            speeds = row["trials_per_minute"]
            lines += [
                "",
                f"Trials a minute: one worker with one thread {speeds['one']:.1f}, two such "
                f"{speeds['two']:.1f} ({speeds['two'] / speeds['one']:.2f} times), one worker with two threads "
                f"{speeds['one, two threads']:.1f}.",
            ]
    return "\n".join(lines) + "\n"


def why(found: list[dict]) -> list[str]:
    """What the space alone makes of the difference from closed-form."""
    even = {r["space"]: r["top1"] for r in found if r["row"] == "uniform" and r["compensation"]}
    if not {"published", "all dimensions"} <= set(even):
        return []
    return [
        "The published space begins lower: before any search, cutting everything alike leaves",
        f"{even['published']:.1f} there, and {even['all dimensions']:.1f} where tokens are merged in every block, query/key"
        " and value dims may go,",
        "and units are ordered by output error. Which of these matters was not measured, nor how far a search over all",
        "dimensions comes.",
    ]


def line(own: list[dict], ours: dict | None, space: str, compensation: bool, name: str) -> str:
    values = [row["top1"] for row in own]
    versus = ""
    if ours is not None:
        versus = "; ".join(span(outcomes(row), outcomes(ours)) for row in own)
    searched = "rewards" in own[0]
    reward = f"{statistics.mean(row['reward'] for row in own):.3f}" if searched else ""
    seconds = f"{statistics.mean(row['seconds_per_trial'] for row in own):.1f}" if searched else ""
    told = [row["overhead"] for row in own if row.get("overhead") is not None]
    overhead = f"{statistics.mean(told):.0%}" if told else ""
    return (
        f"| {space} | {'yes' if compensation else 'no'} | {name} | {', '.join(f'{v:.1f}' for v in values)} | "
        f"{statistics.mean(values):.2f} | {versus} | {reward} | {seconds} | {overhead} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--work", type=Path, required=True, help="folder for journals")
    parser.add_argument("--log", type=Path, default=Path("benchmarks/results/policy_search.jsonl"))
    parser.add_argument(
        "--backwards", action="store_true", help="beside a process that goes forward"
    )
    parser.add_argument("--part", choices=("search", "workers"), default="search")
    arguments = parser.parse_args()
    if arguments.part == "workers":
        workers(arguments.data, arguments.work, arguments.log)
    else:
        Bench(arguments.data, arguments.work, arguments.log).rows(arguments.backwards)


if __name__ == "__main__":
    main()
