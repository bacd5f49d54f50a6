"""Heads, neurons and tokens together, found by search.

"Multi-Dimensional Model Compression of Vision Transformer" (arXiv 2201.00043):

1. The units of each block are ranked by their statistical dependence on the predictions (`dependence`).
2. A Gaussian-process search with expected improvement looks for the ratios of neurons, heads and tokens that harm
   least within the budget (`policy`, `studies`). Every candidate meets the budget exactly. It is judged by how close
   its outputs are to the dense model's, or by its accuracy, on images that nothing else is done with before.
3. The model is cut. Tokens that get least class attention become one.
4. Optionally, weights are shared before the search (`sharing`), so that candidates are judged by weights that are
   used to being cut; and the model found is fine-tuned, mostly by distillation.

Beyond the paper: candidates are compensated in closed form, from moments that are collected once; query/key and
value dims and the ranks of the MLP's maps may take part; tokens may be merged instead.
"""

from __future__ import annotations

import copy
import json as as_json
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field
from torch import nn

from ..allocate import require_reachable
from ..budget import Budget
from ..calibrate import dense_sweep
from ..data import ImageSet
from ..dependence import BANDWIDTHS, REDUNDANCY, RELEVANCE, Estimator
from ..errors import UsageError
from ..orders import plan_for
from ..plan import Plan
from ..policy import Space, sized, token_blocks
from ..provenance import weights_hash
from ..reconstruct import cut
from ..shape import Matching, ViTShape, revise
from ..sizes import SearchDimension, Steps
from ..studies import Sampler
from ..surgery import apply
from ..training import TrainConfig
from . import candidates, judging, ranking, stages
from .base import Method, Outcome, Task, keeps_all, with_matching
from .candidates import Reward, Rules, Study, harm_space
from .closed_form import MATCH_SHARE, Sorted
from .judging import fingerprint, split
from .weight_sharing import share_weights

#: Rules by which tokens go: selection with a fused token, as published, or merging.
TokenRule = Literal["fuse", "fuse-dependence"] | Matching
#: A study's journal in the folder for checkpoints.
JOURNAL = "search.journal"
#: Settings that decide nothing before the search.
OF_SEARCH = {"trials", "initial", "sampler", "reward", "space", "storage", "training"}
#: Fine-tuning as published, for 8 GPUs with 128 images each; without drop-path and repeated augmentation.
RECIPE: dict[str, Any] = {
    "epochs": 300,
    "batch_size": 1024,
    "lr": 1e-3,
    "min_lr": 1e-5,
    "warmup_epochs": 5,
    "clip_grad": None,
    "label_smoothing": 0.1,
    "mixup": 0.8,
    "cutmix": 1.0,
    "scale": (0.08, 1.0),
    "rand_augment": "rand-m9-mstd0.5-inc1",
    "random_erasing": 0.25,
    "ema": 0.99996,
}
#: Settings by which images are opened, once for both trainings.
AUGMENTATION = ("scale", "rand_augment", "random_erasing")
#: Dimensions that weights can be shared over.
SHARED: tuple[SearchDimension, ...] = ("neurons", "heads", "tokens")


class MultiDim(Method):
    """Search for the sizes of every dimension, under one budget.

    Args:
        criterion: what units are ranked by: "dependence" as published, or "output_error" after
            compensation, as closed-form does. Query/key and value dims always by the latter.
        bandwidths, estimator: of dependence, see `dependence`.
        redundancy: what the mean dependence of a head on the others takes from its score.
        relevance: share of dependence in a neuron's score; the rest is its activity's.
        compensation: regress what was removed on what was kept, in every candidate and in the result.
        ridge: towards no compensation, as a fraction of the kept inputs' mean variance.
        dimensions: what may be cut: "neurons", "heads", "qk", "v", "ranks", "tokens". Query/key and value dims are the
            ranks of each head's products; "ranks" are those of the MLP's two maps, which become two layers each
            where that saves enough, by SVD as their inputs see them (with `compensation`; else of the weights).
            Tokens only where the budget is in MACs, since they have no parameters.
        tokens: how tokens go: "fuse" keeps those with most class attention and averages the others, as
            published; "fuse-dependence" multiplies attention by the dependence of their place; the rest are
            rules of merging, see `shape.Matching`.
        space: "ratios" as published, or "harm": weights on the harm of each cut, measured as closed-form does,
            whose allocation is the first candidate; `tokens` must then be a rule of merging, in any block.
        token_blocks: blocks, counted from 1, after whose attention they go; None for 4, 7 and 10 of twelve, as
            published, and like places in others.
        tokens_apart: give each of these blocks a ratio of tokens of its own; as published, they share one.
        stages: so many groups of blocks share their ratios; None gives each block its own, as published.
        most: the largest ratio of anything that goes.
        round_to: sizes are multiples of it, rounded down; 1 as published. None for the nearest multiples of
            what kernels like.
        trials: candidates that are judged.
        initial: of these, the ones that are spread out evenly beforehand; None for one more than there are free
            numbers.
        sampler: "gp", or "random" for comparison.
        reward: "divergence" from the dense outputs, or "accuracy", for which images need labels.
        reward_images: how many candidates are judged on, which nothing else is done with before fine-tuning; None
            for 256, at most half of the calibration images.
        storage: a journal file or the URL of a database, which several workers may share. By default a file
            beside the checkpoints, or memory where there are none.
        sharing: settings of training shared weights before the search; None for none.
        training: settings of fine-tuning; None for none.
    """

    name: ClassVar[str] = "multi-dim"

    criterion: Literal["dependence", "output_error"] = "dependence"
    bandwidths: (
        Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(min_length=1)]
        | Literal["median"]
    ) = BANDWIDTHS
    estimator: Estimator = "biased"
    redundancy: Annotated[float, Field(ge=0)] = REDUNDANCY
    relevance: Annotated[float, Field(ge=0, le=1)] = RELEVANCE
    compensation: bool = True
    ridge: Annotated[float, Field(gt=0)] = 1e-3
    dimensions: Annotated[tuple[SearchDimension, ...], Field(min_length=1)] = (
        "neurons",
        "heads",
        "tokens",
    )
    tokens: TokenRule = "fuse"
    space: Literal["ratios", "harm"] = "ratios"
    token_blocks: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)] | None = (
        None
    )
    tokens_apart: bool = False
    stages: Annotated[int, Field(ge=1)] | None = 3
    most: Annotated[float, Field(gt=0, lt=1)] = 0.9
    round_to: Annotated[int, Field(ge=1)] | None = None
    trials: Annotated[int, Field(ge=1)] = 40
    initial: Annotated[int, Field(ge=0)] | None = None
    sampler: Sampler = "gp"
    reward: Reward = "divergence"
    reward_images: Annotated[int, Field(ge=1)] | None = None
    storage: str | None = None
    sharing: TrainConfig | None = None
    training: TrainConfig | None = None

    @classmethod
    def paper(cls, **changes: Any) -> MultiDim:
        """As the paper has it: dependence decides on heads, neurons and tokens alike; a ratio for each block, sizes of
        single units, shared weights, rewards by accuracy, fine-tuning for 300 epochs with distillation; nothing is
        compensated.

        How long weights were shared is not known: that is by default settings, on images augmented alike. Of the
        published fine-tuning drop-path, which models bring along, and repeated augmentation are left out."""
        fields: dict[str, Any] = {
            "relevance": 1.0,
            "tokens": "fuse-dependence",
            "compensation": False,
            "stages": None,
            "most": 0.5,
            "round_to": 1,
            "trials": 200,
            "initial": 100,
            "reward": "accuracy",
            "sharing": TrainConfig(**{name: RECIPE[name] for name in AUGMENTATION}),
            "training": TrainConfig(**RECIPE, distill="soft", alpha=0.5),
        }
        return cls(**(fields | changes))

    @classmethod
    def released(cls, **changes: Any) -> MultiDim:
        """As its authors' code has it: activation decides on most of a neuron's score and class attention on tokens,
        no weights are shared, and fine-tuning is on labels alone."""
        fields: dict[str, Any] = {
            "relevance": RELEVANCE,
            "tokens": "fuse",
            "sharing": None,
            "training": TrainConfig(**RECIPE),
        }
        return cls.paper(**(fields | changes))

    @property
    def needs_labels(self) -> bool:
        return self.reward == "accuracy"

    @property
    def trains(self) -> TrainConfig | None:
        return self.training or self.sharing

    @property
    def trains_on_labels(self) -> bool:
        return any(c is not None and c.needs_labels for c in (self.training, self.sharing))

    @property
    def judges_on(self) -> int:
        return self.reward_images or judging.IMAGES

    def cuts_tokens(self, budget: Budget) -> bool:
        return "tokens" in self._allowed(budget.metric)

    def settings(self) -> dict[str, Any]:
        # Where candidates were kept decides nothing, and may hold the password of a database.
        return self.model_dump(mode="json", exclude={"storage"})

    @property
    def resumable(self) -> bool:
        return True

    def check(self, shape: ViTShape, budget: Budget) -> None:
        if budget.metric not in ("macs", "params"):
            raise UsageError(
                "The search is within a number of MACs or parameters, not a latency.",
                "Give the budget so, or take closed-form.",
            )
        if not self._allowed(budget.metric):
            raise UsageError(
                "Tokens have no parameters.", "Allow other dimensions, or give a budget in MACs."
            )
        if self.tokens == "fuse-dependence" and shape.merges_tokens:
            raise UsageError(
                "The model has fewer tokens in later blocks already, whose places have no dependence.",
                "Take another rule (tokens=fuse).",
            )
        if "qk" in self.dimensions and shape.qk_norm:
            raise UsageError(
                "The model normalises queries and keys, so their dims cannot be cut.",
                "Leave qk out of the dimensions.",
            )
        depends = self.criterion == "dependence" or self.tokens == "fuse-dependence"
        if depends and not shape.num_classes:
            raise UsageError(
                "Dependence on predictions needs a classifier.",
                "Take criterion=output_error and another rule for tokens.",
            )
        if self.reward == "accuracy" and not shape.num_classes:
            raise UsageError("There is no accuracy without a classifier.", "Take the divergence.")
        beyond = set(self.dimensions) - set(SHARED)
        if self.sharing is not None and beyond:
            raise UsageError(
                f"Weights cannot be shared over {' and '.join(sorted(beyond))}.",
                f"Cut {', '.join(SHARED)} alone, or leave sharing out.",
            )
        if self.space == "harm" and "ranks" in self.dimensions:
            raise UsageError(
                "The harm of lower ranks is not measured.", "Leave ranks out, or take space=ratios."
            )
        if self.space == "harm" and "tokens" in self.dimensions and self._fuses:
            raise UsageError(
                "The harm of fused tokens is not measured.", "Merge them (tokens=attention)."
            )
        if self.sharing is not None and self.training is not None:
            for name in AUGMENTATION:
                if getattr(self.sharing, name) != getattr(self.training, name):
                    raise UsageError(
                        f"sharing.{name} is {getattr(self.sharing, name)}, training.{name} "
                        f"{getattr(self.training, name)}, but both are of the same images.",
                        "Set them alike.",
                    )
        if self.sharing is not None and not keeps_all(budget, shape):
            # Weights are shared over ratios, whatever is searched.
            self._space(shape, budget.metric).require_reachable(budget.metric, budget.limit(shape))
        if self.space == "harm" and not keeps_all(budget, shape):
            limits = (budget.metric, budget.limit(shape))
            merging = self._merging(shape)
            measured = tuple(d for d in self._allowed(budget.metric) if d != "ranks")
            require_reachable(merging, *limits, measured, self._steps(shape))
        elif not keeps_all(budget, shape):
            self._space(shape, budget.metric).require_reachable(budget.metric, budget.limit(shape))

    def plan(self, task: Task) -> Plan:
        if keeps_all(task.budget, task.shape):
            return Plan.identity(task.shape)
        return self._found(*self._split(task))[1]

    def run(self, task: Task) -> Outcome:
        if keeps_all(task.budget, task.shape):
            return Outcome(copy.deepcopy(task.model), Plan.identity(task.shape))
        seeing, judged = self._split(task)
        if self.training is None:
            return self._cut(seeing, judged)
        identity = self._identity(seeing, judged, {"training", "storage"})
        made = stages.settled(seeing, self.training, identity, lambda: self._cut(seeing, judged))
        tuned = stages.finetune(seeing, self.training, made.model, identity)
        return replace(made, facts={**made.facts, "finetune": tuned})

    def _split(self, task: Task) -> tuple[Task, ImageSet]:
        """The task with the images to calibrate on, and those that candidates are judged by."""
        calibration, judged = split(task, self.reward_images)
        return replace(task, data=calibration), judged

    def _cut(self, task: Task, judged: ImageSet) -> Outcome:
        """Everything before fine-tuning."""
        model, plan, facts = self._found(task, judged)
        if self.compensation:
            small = cut(model, plan, task.batches(), self.ridge, task.model)
        else:
            small = apply(model, plan)
        return Outcome(small, plan, facts)

    def _found(self, task: Task, judged: ImageSet) -> tuple[nn.Module, Plan, dict[str, Any]]:
        """The model to cut, the best plan, and what the search saw."""
        ready = self._ranked(task)
        facts: dict[str, Any] = {}
        if self.sharing is not None:
            model, facts["sharing"] = self._shared(task, judged, ready)
            # The shared weights have moments of their own; their units keep their ranks.
            moments = dense_sweep(model, task.batches()) if self.compensation else []
            ready = replace(ready, model=model, moments=moments)
        best, seen = self._searched(task, judged, ready)
        return ready.model, plan_for(task.shape, best, ready.orders), facts | seen

    # -- the stages ------------------------------------------------------------------------------

    def _ranked(self, task: Task) -> Sorted:
        units, places = self.criterion == "dependence", self.tokens == "fuse-dependence"
        found = (
            ranking.unranked(task, self._sweeps)
            if units
            else ranking.by_output_error(task, self.ridge)
        )
        if not units and not places:
            return found
        return ranking.by_dependence(
            found,
            task,
            units=units,
            places=places,
            bandwidths=self.bandwidths,
            estimator=self.estimator,
            redundancy=self.redundancy,
            relevance=self.relevance,
        )

    def _shared(
        self, task: Task, judged: ImageSet, ready: Sorted
    ) -> tuple[nn.Module, dict[str, Any]]:
        """The model with weights trained at policies drawn evenly, one for each update."""
        assert self.sharing is not None
        space = self._space(task.shape, task.budget.metric)
        identity = self._identity(task, judged, OF_SEARCH)
        return share_weights(task, self.sharing, judged, ready, space, identity)

    def _searched(
        self, task: Task, judged: ImageSet, ready: Sorted
    ) -> tuple[ViTShape, dict[str, Any]]:
        """The sizes of the best candidate."""
        shape, metric = self._merging(task.shape), task.budget.metric
        rules = Rules(
            shape, self._allowed(metric), self.ridge if self.compensation else None, self.reward
        )
        space = (
            self._space(task.shape, metric)
            if self.space == "ratios"
            else harm_space(task, ready, rules, self._steps(task.shape))
        )
        study = Study(
            self._study(task, judged, ready.model),
            self.storage or _journal(task),
            self.sampler,
            self.trials,
            self.initial,
        )
        sizes, fuses, seen = candidates.best(task, judged, ready, rules, space, study)
        return sized(shape, sizes, fuses), seen

    # -- what follows from the settings ----------------------------------------------------------

    def _study(self, task: Task, judged: ImageSet, model: nn.Module) -> str:
        """A name that only the same search has. Rotated weights follow from the model and the images but for
        rounding, which differs by machine."""
        parts = (
            as_json.dumps(self._identity(task, judged, {"trials", "storage", "training"})),
            weights_hash(model) if self.sharing is not None else "",
        )
        return sha256("\n".join(parts).encode()).hexdigest()[:24]

    def _identity(self, task: Task, judged: ImageSet, free: set[str]) -> dict[str, Any]:
        """What an outcome depends on, but for the free settings. `task.data` are the images to calibrate on."""
        assert task.data is not None
        return {
            "model": weights_hash(task.model),
            "budget": str(task.budget),
            "settings": self.model_dump(mode="json", exclude=free),
            "seed": str(task.seed),
            "calibration": fingerprint(task.data),
            "judged": fingerprint(judged),
        }

    def _allowed(self, metric: str) -> tuple[SearchDimension, ...]:
        """The dimensions that a budget of this kind is met by."""
        return tuple(d for d in self.dimensions if metric != "params" or d != "tokens")

    def _space(self, shape: ViTShape, metric: str) -> Space:
        return Space(
            self._merging(shape),
            self._allowed(metric),
            None if self.stages is None else min(self.stages, shape.depth),
            token_blocks=self.token_blocks or token_blocks(shape.depth),
            tokens_apart=self.tokens_apart,
            most=self.most,
            steps=self._steps(shape),
            nearest=self.round_to is None,
            fused=self._fuses,
        )

    def _steps(self, shape: ViTShape) -> Steps:
        n = self.round_to
        return (
            Steps.for_shape(shape)
            if n is None
            else Steps(tokens=1, qk=n, v=n, neurons=n, heads=1, ranks=n)
        )

    def _merging(self, shape: ViTShape) -> ViTShape:
        """The shape with the rule by which tokens go."""
        matching, merges = shape.matching, False
        if self.tokens != "fuse" and self.tokens != "fuse-dependence":
            matching, merges = self.tokens, True
        compared = max(1, shape.embed_dim // MATCH_SHARE) if merges and self._sweeps else None
        weighs = self.tokens == "fuse-dependence"
        return revise(with_matching(shape, matching, compared), weighs_tokens=weighs)

    @property
    def _fuses(self) -> bool:
        return self.tokens.startswith("fuse")

    @property
    def _sweeps(self) -> bool:
        """Whether moments of the calibration images are needed."""
        dims = {"qk", "v"} & set(self.dimensions)
        return self.compensation or bool(dims) or self.criterion == "output_error"


def _journal(task: Task) -> Path | None:
    return None if task.folder is None else task.folder / JOURNAL
