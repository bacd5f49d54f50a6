"""Heads, neurons and tokens together, found by search.

"Multi-Dimensional Model Compression of Vision Transformer" (arXiv 2201.00043):

1. The units of each block are ranked by their statistical dependence on the predictions (`dependence`).
2. A Gaussian-process search with expected improvement looks for the ratios of neurons, heads and tokens that harm
   least within the budget (`policy`, `studies`). Every candidate meets the budget exactly. It is judged by how close
   its outputs are to the dense model's, or by its accuracy, on images that nothing else is done with.
3. The model is cut. Tokens that get least class attention become one.
4. Optionally, weights are shared before the search (`sharing`), so that candidates are judged by weights that are
   used to being cut; and the model found is fine-tuned, mostly by distillation.

Beyond the paper: candidates are compensated in closed form, from moments that are collected once; query/key and
value dims may take part; tokens may be merged instead.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import nn

from .. import dependence
from ..allocate import require_reachable
from ..budget import Budget
from ..calibrate import Batches, dense_sweep
from ..criteria import Order
from ..data import ImageSet
from ..dependence import BANDWIDTHS, REDUNDANCY, RELEVANCE, Estimator
from ..errors import UsageError
from ..harm import measure
from ..harm_space import HarmSpace
from ..orders import plan_for
from ..plan import Plan
from ..policy import Space, token_blocks
from ..provenance import weights_hash
from ..reconstruct import cut
from ..shape import BlockShape, Matching, ViTShape, revise
from ..sharing import resize, share, unshare
from ..simulate import Simulator
from ..sizes import FIELDS, Dimension, Steps
from ..studies import Finished, Result, Sampler, search
from ..surgery import apply
from ..training import TrainConfig, fit
from . import stages
from .base import Method, Outcome, Task, keeps_all, with_matching
from .closed_form import MATCH_SHARE, ClosedForm, Sorted
from .judging import fingerprint, split, without

#: Rules by which tokens go: selection with a fused token, as published, or merging.
TokenRule = Literal["fuse", "fuse-dependence"] | Matching
#: Dependence is estimated within batches of so many images, as published.
BATCH = 128
#: A study's journal in the folder for checkpoints.
JOURNAL = "search.journal"
#: Images on which single cuts are measured.
HARM_IMAGES = 64
#: Settings that decide nothing before the search.
OF_SEARCH = {"trials", "initial", "sampler", "reward", "space", "storage", "training"}
#: Dimensions that weights can be shared over.
SHARED: tuple[Dimension, ...] = ("neurons", "heads", "tokens")


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
        dimensions: what may be cut; tokens only where the budget is in MACs, since they have no parameters.
        tokens: how tokens go: "fuse" keeps those with most class attention and averages the others, as
            published; "fuse-dependence" multiplies attention by the dependence of their place; the rest are
            rules of merging, see `shape.Matching`.
        space: "ratios" as published, or "harm": weights on the harm of each cut, measured as closed-form does,
            whose allocation is the first candidate; tokens are then merged, in any block.
        token_blocks: blocks, counted from 1, after whose attention they go; None for 4, 7 and 10 of twelve, as
            published, and like places in others.
        stages: so many groups of blocks share their ratios; None gives each block its own, as published.
        most: the largest ratio of anything that goes.
        round_to: sizes are multiples of it, rounded down; 1 as published. None for the nearest multiples of
            what kernels like.
        trials: candidates that are judged.
        initial: of these, the ones that are spread out evenly beforehand; None for one more than parameters.
        sampler: "gp", or "random" for comparison.
        reward: "divergence" from the dense outputs, or "accuracy", for which images need labels.
        reward_images: how many candidates are judged on, which nothing else is done with; None for 256, at most
            half of the calibration images.
        storage: a journal file or the URL of a database, which several workers may share. By default a file
            beside the checkpoints, or memory where there are none.
        sharing: settings of training shared weights before the search; None for none.
        training: settings of fine-tuning; None for none.
    """

    name: ClassVar[str] = "multi-dim"

    criterion: Literal["dependence", "output_error"] = "dependence"
    bandwidths: tuple[Annotated[float, Field(gt=0)], ...] | Literal["median"] = BANDWIDTHS
    estimator: Estimator = "biased"
    redundancy: Annotated[float, Field(ge=0)] = REDUNDANCY
    relevance: Annotated[float, Field(ge=0, le=1)] = RELEVANCE
    compensation: bool = True
    ridge: Annotated[float, Field(gt=0)] = 1e-3
    dimensions: Annotated[tuple[Dimension, ...], Field(min_length=1)] = (
        "neurons",
        "heads",
        "tokens",
    )
    tokens: TokenRule = "fuse"
    space: Literal["ratios", "harm"] = "ratios"
    token_blocks: tuple[Annotated[int, Field(ge=1)], ...] | None = None
    stages: Annotated[int, Field(ge=1)] | None = 3
    most: Annotated[float, Field(gt=0, lt=1)] = 0.9
    round_to: Annotated[int, Field(ge=1)] | None = None
    trials: Annotated[int, Field(ge=1)] = 40
    initial: Annotated[int, Field(ge=0)] | None = None
    sampler: Sampler = "gp"
    reward: Literal["divergence", "accuracy"] = "divergence"
    reward_images: Annotated[int, Field(ge=1)] | None = None
    storage: str | None = None
    sharing: TrainConfig | None = None
    training: TrainConfig | None = None

    @classmethod
    def paper(cls, **changes: Any) -> MultiDim:
        """As the paper has it: a ratio for each block, sizes of single units, shared weights, rewards by accuracy,
        fine-tuning by distillation; nothing is compensated."""
        fields: dict[str, Any] = {
            "compensation": False,
            "stages": None,
            "most": 0.5,
            "round_to": 1,
            "trials": 200,
            "initial": 100,
            "reward": "accuracy",
            "sharing": TrainConfig(),
            "training": TrainConfig(distill="soft", alpha=0.5),
        }
        return cls(**(fields | changes))

    @classmethod
    def released(cls, **changes: Any) -> MultiDim:
        """As its authors' code has it: the same without shared weights, fine-tuned on labels alone."""
        return cls.paper(**({"sharing": None, "training": TrainConfig()} | changes))

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
    def searches(self) -> bool:
        return True

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
        if self.space == "harm" and "tokens" in self.dimensions and self.tokens.startswith("fuse"):
            raise UsageError(
                "The harm of fused tokens is not measured.", "Merge them (tokens=attention)."
            )
        if self.space == "harm" and not keeps_all(budget, shape):
            limits = (budget.metric, budget.limit(shape))
            merging = self._merging(shape)
            require_reachable(merging, *limits, self._allowed(budget.metric), self._steps(shape))
        elif not keeps_all(budget, shape):
            self._space(shape, budget.metric).require_reachable(budget.metric, budget.limit(shape))

    def plan(self, task: Task) -> Plan:
        if keeps_all(task.budget, task.shape):
            return Plan.identity(task.shape)
        return self._found(task)[1]

    def run(self, task: Task) -> Outcome:
        if keeps_all(task.budget, task.shape):
            return Outcome(copy.deepcopy(task.model), Plan.identity(task.shape))
        if self.training is None:
            return self._cut(task)
        calibration, judged = split(task, self.reward_images)
        seeing = _images(task, calibration)
        identity = self._identity(seeing, judged, {"training", "storage"})
        made = stages.settled(task, self.training, identity, lambda: self._cut(task))
        tuned = stages.finetune(task, self.training, made.model, identity)
        return replace(made, facts={**made.facts, "finetune": tuned})

    def _cut(self, task: Task) -> Outcome:
        """Everything before fine-tuning."""
        model, plan, facts = self._found(task)
        if self.compensation:
            small = cut(
                model,
                plan,
                _images(task, split(task, self.reward_images)[0]).batches(),
                self.ridge,
                task.model,
            )
        else:
            small = apply(model, plan)
        return Outcome(small, plan, facts)

    # -- 1. ranking ------------------------------------------------------------------------------

    def _found(self, task: Task) -> tuple[nn.Module, Plan, dict[str, Any]]:
        """The model to cut, the best plan, and what the search saw."""
        calibration, judged = split(task, self.reward_images)
        seeing = _images(task, calibration)
        ready = self._ranked(seeing)
        facts: dict[str, Any] = {}
        if self.sharing is not None:
            model, facts["sharing"] = self._shared(seeing, judged, ready)
            # The shared weights have moments of their own; their units keep their ranks.
            moments = dense_sweep(model, seeing.batches()) if self.compensation else []
            ready = replace(ready, model=model, moments=moments)
        best, trials = self._search(seeing, judged, ready)
        return ready.model, plan_for(task.shape, best, ready.orders), facts | trials

    def _ranked(self, task: Task) -> Sorted:
        """The model, in bases in which dims of heads can be cut, with moments and orders of its units."""
        if self._sweeps:
            found = ClosedForm(ridge=self.ridge).sort(task)
        else:
            found = Sorted(task.model, [], [_as_they_are(block) for block in task.shape.blocks])
        weighs = self.tokens == "fuse-dependence"
        if self.criterion == "output_error" and not weighs:
            return found
        assert task.data is not None
        # Batches of nearly equal size: a small last one could not tell.
        count = max(1, len(task.data) // BATCH)
        scores = dependence.score(
            task.model,
            task.batches(size=-(-len(task.data) // count)),
            bandwidths=self.bandwidths,
            estimator=self.estimator,
            redundancy_weight=self.redundancy,
            tokens=weighs,
        )
        pairs = zip(found.orders, scores, strict=True)
        orders = [replace(order, token_weights=own.tokens) for order, own in pairs]
        if self.criterion == "dependence":
            orders = [
                replace(
                    order,
                    heads=own.heads.argsort(descending=True, stable=True),
                    neurons=own.neurons(self.relevance).argsort(descending=True, stable=True),
                )
                for order, own in zip(orders, scores, strict=True)
            ]
        return replace(found, orders=orders)

    # -- 2. weight sharing -----------------------------------------------------------------------

    def _shared(
        self, task: Task, judged: ImageSet, ready: Sorted
    ) -> tuple[nn.Module, dict[str, Any]]:
        """The model with weights trained at policies drawn evenly, one for each update."""
        assert self.sharing is not None
        metric, limit = task.budget.metric, task.budget.limit(task.shape)
        space = self._space(task.shape, metric)
        names = space.names
        config = stages.seeded(self.sharing, task)

        def drawn(step: int) -> ViTShape:
            values = np.random.default_rng((config.seed, step)).random(len(names))
            return space.on_budget(dict(zip(names, values.tolist(), strict=True)), metric, limit)

        cuts_tokens = "tokens" in space.dimensions
        places = [block - 1 for block in space.token_blocks] if cuts_tokens else []
        shared = share(ready.model, space.dense, ready.orders, places)
        found = fit(
            shared,
            config,
            without(stages.images(task), judged),
            teacher=task.taught_by,
            folder=stages.folder(task, "sharing"),
            resume=task.resume,
            before_update=lambda one, step: resize(one, drawn(step), ready.orders),
            identity=self._identity(task, judged, OF_SEARCH),
            on_event=stages.told(task, "weight sharing"),
            device=task.device,
        )
        return unshare(shared, ready.model), {
            "losses": found.losses,
            "images_per_s": found.images_per_s,
        }

    # -- 3. search -------------------------------------------------------------------------------

    def _search(
        self, task: Task, judged: ImageSet, ready: Sorted
    ) -> tuple[ViTShape, dict[str, Any]]:
        metric, limit = task.budget.metric, task.budget.limit(task.shape)
        space = (
            self._space(task.shape, metric)
            if self.space == "ratios"
            else self._harms(task, ready, metric)
        )
        simulator = self._simulator(_images(task, judged).batches(), task, ready, whole=True)

        def reward(direction: dict[str, float]) -> tuple[float, dict[str, Any]]:
            shape = space.on_budget(direction, metric, limit)
            value = (
                simulator.accuracy(shape)
                if self.reward == "accuracy"
                else -simulator.trial(shape, 0).harm
            )
            sizes = {
                FIELDS[d]: [getattr(b, FIELDS[d]) for b in shape.blocks]
                for d in self._allowed(metric)
            }
            return value, {"macs": shape.macs, "params": shape.params, "policy": sizes}

        def tell(trial: Finished, so_far: Result) -> None:
            task.progress(len(so_far.trials), self.trials)
            if task.on_trial is not None:
                task.on_trial(len(so_far.trials), self.trials, so_far.best.reward)

        task.progress(0, self.trials)
        result = search(
            reward,
            space.names,
            trials=self.trials,
            study=self._study(task, judged, ready.model),
            storage=self.storage or _journal(task),
            sampler=self.sampler,
            seed=task.seed,
            initial=self.initial,
            first=space.first,
            on_trial=tell,
        )
        trials = [
            {
                "number": one.number,
                "reward": one.reward,
                **one.facts,
                "seconds": round(one.seconds, 3),
            }
            for one in result.trials
        ]
        facts = {
            "best": result.best.number,
            "trials": trials,
            "own_trials": len(result.own),
            "overhead_seconds": round(result.overhead_seconds, 3),
            "reward_images": len(judged),
        }
        # As they were judged: measured harms, if directions are weights on these, differ by machine.
        return self._shape(task.shape, result.best.facts["policy"]), facts

    def _shape(self, dense: ViTShape, policy: dict[str, list[int]]) -> ViTShape:
        """The shape of these sizes."""
        rule, blocks = self._merging(dense), []
        tokens = dense.num_tokens
        for i, block in enumerate(rule.blocks):
            sizes = {name: values[i] for name, values in policy.items()}
            left = min(sizes.get("num_tokens_out", block.num_tokens_out), tokens)
            more = left < min(tokens, block.num_tokens_out)
            sizes |= {"num_tokens_in": tokens, "num_tokens_out": left}
            fuses = block.fuses or (more and self.tokens.startswith("fuse"))
            blocks.append(block.model_copy(update=sizes | {"fuses": fuses and left < tokens}))
            tokens = left
        return rule.with_blocks(tuple(blocks))

    def _simulator(self, batches: Batches, task: Task, ready: Sorted, whole: bool) -> Simulator:
        """Measures candidates, `whole`, or single cuts."""
        rule = self._merging(task.shape)
        return Simulator(
            ready.model,
            ready.moments,
            ready.orders,
            batches,
            self.ridge if self.compensation else None,
            rule.matching,
            rule.match_features,
            any_start=not whole,
            reference=task.model,
            weighs_tokens=rule.weighs_tokens,
            remember=not whole,
        )

    def _harms(self, task: Task, ready: Sorted, metric: str) -> HarmSpace:
        """Weights on what single cuts harm, measured on calibration images."""
        single = self._simulator(task.batches(HARM_IMAGES), task, ready, whole=False)
        steps = self._steps(task.shape)
        dimensions = self._allowed(metric)
        return HarmSpace(measure(single, dimensions, steps), dimensions, steps)

    def _study(self, task: Task, judged: ImageSet, model: nn.Module) -> str:
        """A name that only the same search has. Rotated weights follow from the model and the images but for
        rounding, which differs by machine."""
        parts = (
            *self._identity(task, judged, {"trials", "storage", "training"}).values(),
            weights_hash(model) if self.sharing is not None else "",
        )
        return sha256("\n".join(parts).encode()).hexdigest()[:24]

    def _identity(self, task: Task, judged: ImageSet, free: set[str]) -> dict[str, str]:
        """What an outcome depends on, but for the free settings. `task.data` are the images to calibrate on."""
        assert task.data is not None
        return {
            "model": weights_hash(task.model),
            "budget": str(task.budget),
            "settings": self.model_dump_json(exclude=free),
            "seed": str(task.seed),
            "calibration": fingerprint(task.data),
            "judged": fingerprint(judged),
        }

    def _allowed(self, metric: str) -> tuple[Dimension, ...]:
        """The dimensions that a budget of this kind is met by."""
        return tuple(d for d in self.dimensions if metric != "params" or d != "tokens")

    def _space(self, shape: ViTShape, metric: str) -> Space:
        return Space(
            self._merging(shape),
            self._allowed(metric),
            None if self.stages is None else min(self.stages, shape.depth),
            token_blocks=self.token_blocks or token_blocks(shape.depth),
            most=self.most,
            steps=self._steps(shape),
            nearest=self.round_to is None,
            fused=self.tokens.startswith("fuse"),
        )

    def _steps(self, shape: ViTShape) -> Steps:
        n = self.round_to
        return (
            Steps.for_shape(shape) if n is None else Steps(tokens=1, qk=n, v=n, neurons=n, heads=1)
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
    def _sweeps(self) -> bool:
        """Whether moments of the calibration images are needed."""
        dims = {"qk", "v"} & set(self.dimensions)
        return self.compensation or bool(dims) or self.criterion == "output_error"


def _as_they_are(block: BlockShape) -> Order:
    """Units in their old order."""
    heads, qk, v = block.num_heads, block.qk_dim, block.v_dim
    return Order(
        heads=torch.arange(heads),
        qk_dims=torch.arange(qk).expand(heads, -1),
        v_dims=torch.arange(v).expand(heads, -1),
        neurons=torch.arange(block.mlp_dim),
    )


def _images(task: Task, images: ImageSet) -> Task:
    """The task with these as its calibration images."""
    return replace(task, data=images)


def _journal(task: Task) -> Path | None:
    return None if task.folder is None else task.folder / JOURNAL
