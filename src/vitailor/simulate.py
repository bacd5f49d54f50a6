"""What a change of sizes does to the outputs, measured on a few calibration images.

Runs the model with compensated blocks of any sizes without rebuilding it. The tokens entering each
block of the dense model are remembered, so that a change in block i costs only the blocks from i on.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import inf

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import tokens
from .calibrate import Batches, BlockMoments, images_of
from .criteria import Order
from .factors import gain_of
from .hosts import host_of
from .layers import Block
from .mlp_ranks import set_ranks
from .orders import block_plan, match_features, token_weights
from .reconstruct import compensate
from .shape import BlockShape, Matching, ViTShape, resized, revise
from .surgery import select

#: A trial is given up when, on at least so many images, it harms so many times as much as its rival.
GIVE_UP_AFTER, BEHIND = 64, 1.1
#: At which classes are compared. Models are often sure of calibration images, since they were trained on them;
#: their class distributions then hardly move until a cut changes the decision, and hide what it does to
#: images of which the model is less sure.
TEMPERATURE = 4.0


@dataclass(frozen=True)
class Trial:
    """Outcome of a change: the sizes tried, what they do to the outputs, and its sum over each batch."""

    shape: ViTShape
    harm: float
    sums: tuple[float, ...] = ()


class Simulator:
    """Measures the harm of changing a model's sizes.

    Args:
        model: the dense model, in sorted bases.
        moments, orders: of each of its blocks.
        batches: the images to measure on.
        ridge: for compensation; None for none.
        matching: rule by which tokens are paired.
        compared: by how many features they are compared; None for all.
        weighs_tokens: whether selection weighs attention by place, see `Order.token_weights`.
        any_start: hold the dense tokens before every block in memory, so that trials may start at any;
            else at the first block only.
        reference: whose outputs are the measure; None for the model's own.
        remember: whether blocks that were cut are kept for later trials of the same sizes; without, only
            while a trial runs.

    Harm is the mean `divergence` of the outputs from the reference's.
    """

    def __init__(
        self,
        model: nn.Module,
        moments: Sequence[BlockMoments],
        orders: Sequence[Order],
        batches: Batches,
        ridge: float | None,
        matching: Matching = "ward",
        compared: int | None = None,
        any_start: bool = True,
        reference: nn.Module | None = None,
        weighs_tokens: bool = False,
        remember: bool = True,
    ) -> None:
        self.remember = remember
        self.model, self.moments, self.orders, self.ridge = model, moments, orders, ridge
        self.host = host_of(model)
        own = self.host.describe(model)
        if not own.merges_tokens:
            own = revise(own, matching=matching, match_features=compared)
        self.dense = own
        self.evaluations = 0
        device = next(model.parameters()).device
        self._weights = [self.host.read(self.host.block(model, i)) for i in range(self.dense.depth)]
        features = match_features(own, own, orders)
        places = token_weights(own, revise(own, weighs_tokens=weighs_tokens), orders)
        like = next(model.parameters())
        self._places = None if places is None else like.new_tensor(places)
        self._features = None if features is None else torch.tensor(features, device=device)
        self._halves: dict[tuple[int, str, BlockShape], nn.Module] = {}
        self._states: list[list[tokens.Tokens]] = []
        self._truth: list[Tensor] = []
        self._labels: list[Tensor] = []
        blocks = [self._block(i, self.dense.blocks[i]) for i in range(self.dense.depth)]
        with torch.inference_mode():
            for batch in batches:
                x = images_of(batch).to(device)
                state = tokens.start(self.host.embed(model, x))
                states = [state]
                if any_start or reference is None:
                    for i, block in enumerate(blocks):
                        state = self._step(block, state, self.dense, i)
                        states.append(state)
                self._states.append(states if any_start else states[:1])
                if reference is None:
                    self._truth.append(self.host.finish(model, tokens.unmerge(state)))
                else:
                    self._truth.append(reference(x))
                if isinstance(batch, tuple | list):
                    self._labels.append(batch[1].to(device))

    def trial(self, shape: ViTShape, first: int, rival: Trial | None = None) -> Trial:
        """Harm of going to `shape`, which differs from the dense sizes in no block before `first`.

        Args:
            rival: a trial to beat. As soon as the new one is clearly behind it on the same images, it is
                given up, with infinite harm.
        """
        sums: list[float] = []
        count = 0
        with torch.inference_mode():
            for outputs, truth in zip(self._outputs(shape, first), self._truth, strict=True):
                sums.append(float(divergence(outputs, truth, self.dense.num_classes).sum()))
                count += len(truth)
                if rival is None or count < GIVE_UP_AFTER:
                    continue
                if sum(sums) > BEHIND * sum(rival.sums[: len(sums)]):
                    return Trial(shape, inf, tuple(sums))
        return Trial(shape, sum(sums) / count, tuple(sums))

    def accuracy(self, shape: ViTShape) -> float:
        """Top-1 in percent at these sizes, on batches that came with labels."""
        hits = [
            (outputs.argmax(-1) == labels).float()
            for outputs, labels in zip(self._outputs(shape, 0), self._labels, strict=True)
        ]
        return 100 * float(torch.cat(hits).mean())

    @torch.inference_mode()
    def _outputs(self, shape: ViTShape, first: int) -> Iterator[Tensor]:
        """The model's outputs at these sizes, batch by batch."""
        self.evaluations += 1
        blocks = [self._block(i, shape.blocks[i]) for i in range(first, shape.depth)]
        if not self.remember:
            self._halves.clear()
        for states in self._states:
            state = states[first]
            for i, block in enumerate(blocks, first):
                state = self._step(block, state, shape, i)
            yield self.host.finish(self.model, tokens.unmerge(state))

    def _step(self, block: Block, state: tokens.Tokens, shape: ViTShape, i: int) -> tokens.Tokens:
        num_out = shape.blocks[i].num_tokens_out
        state = block.attend_and_merge(
            state, num_out, shape.num_prefix_tokens, shape.matching, shape.pools_prefix
        )
        return state.replace(block.feed(state.x))

    def _block(self, i: int, want: BlockShape) -> Block:
        """A block of the wanted sizes; its halves are remembered apart."""
        dense = self.dense.blocks[i]
        width = self.dense.embed_dim
        sizes = {n: getattr(want, n) for n in ("num_heads", "qk_dim", "v_dim")}
        attn_key = resized(width, dense, sizes)
        mlp_key = resized(width, dense, {"mlp_dim": want.mlp_dim})
        mlp_key = set_ranks(mlp_key, fc1=want.ranks.fc1, fc2=want.ranks.fc2)
        block = copy.copy(self.host.block(self.model, i))
        block._modules = dict(block._modules)
        if attn_key != dense:
            block.attn = self._half(i, "attn", attn_key)
        if mlp_key != dense:
            block.mlp = self._half(i, "mlp", mlp_key)
        if want.num_tokens_out < want.num_tokens_in:
            self.host.resize_block(block, self.dense, want)  # attention that merging can ask
            if self._features is not None:
                block._buffers = dict(block._buffers) | {"match_features": self._features[i]}
            if self._places is not None:
                block._buffers = dict(block._buffers) | {"token_weights": self._places[i]}
        return block

    def _half(self, i: int, name: str, want: BlockShape) -> nn.Module:
        key = (i, name, want)
        if key not in self._halves:
            block = copy.deepcopy(self.host.block(self.model, i))
            self.host.resize_block(block, self.dense, want)
            plan = block_plan(self.dense.blocks[i], want, self.orders[i])
            if self.ridge is None:
                small = select(self._weights[i], plan)
            else:
                gain = gain_of(self.host.block(self.model, i), "fc2")
                small = compensate(self._weights[i], plan, self.moments[i], self.ridge, gain)
            self.host.write(block, small, want.ranks)
            self._halves[key] = block.get_submodule(name)
        return self._halves[key]


def divergence(outputs: Tensor, truth: Tensor, num_classes: int) -> Tensor:
    """(B,) KL(truth || outputs) of the class distributions at `TEMPERATURE`, times its square, in nats; or
    relative squared error of features, for a model without a classifier."""
    if num_classes > 1:
        got, want = ((x.float() / TEMPERATURE).log_softmax(-1) for x in (outputs, truth))
        kl = F.kl_div(got, want, log_target=True, reduction="none").sum(-1)
        return kl * TEMPERATURE**2
    error = (outputs - truth).flatten(1).square().sum(1)
    return error / truth.flatten(1).square().sum(1).clamp_min(1e-12)
