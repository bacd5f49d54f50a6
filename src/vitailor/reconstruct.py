"""Closed-form compensation: what was removed is regressed on what was kept and written into the next weights.

Two forms. `compensate` needs only the moments of the dense sweep and treats one block at a time; it makes
candidates comparable during allocation. `sequential_sweep` then walks through the blocks of the
compressed model and compensates each on the inputs it really gets, from the compressed blocks before.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from . import tokens
from .calibrate import Batches, BlockMoments, Moments, images_of, wide
from .factors import factored, gain_of, read_by_mlp
from .hosts import Tensors, host_of
from .layers import Block, BlockStack
from .linalg import regress_on_kept
from .plan import BlockPlan, Plan
from .surgery import apply, select

States = list[tokens.Tokens]


def compensate(
    tensors: Tensors,
    plan: BlockPlan,
    moments: BlockMoments,
    ridge: float,
    gain: Tensor | None = None,
) -> Tensors:
    """Canonical tensors of a block after its plan, with output projections refitted.

    The removed inputs x_R of the out and fc2 projections are predicted from the kept ones by the affine
    map of least mean square error, x_R ~ A x_K + a, and W_R A and W_R a are added to weight and bias. The maps of
    the MLP that the plan factors are then those nearest for what they read.

    Args:
        tensors: canonical tensors of the dense block.
        moments: of the dense block.
        ridge: towards no compensation, as a fraction of the mean variance of the kept inputs.
        gain: by which rows of fc2 count if it is factored, see `factors.gain_of`.
    """
    small = select(tensors, plan)
    if plan.v_dims is not None or plan.heads is not None:
        small |= compensate_out(tensors, plan, moments.mixed, ridge)
    small |= factor_fc1(tensors, plan, moments.mlp_input)
    if plan.neurons is not None or plan.ranks.fc2 is not None:
        small |= compensate_fc2(tensors, plan, moments.hidden, ridge, gain)
    return small


def compensate_out(tensors: Tensors, plan: BlockPlan, mixed: Moments, ridge: float) -> Tensors:
    """Refitted `out.weight` and `out.bias` for the kept heads and V dims."""
    heads, v, _ = tensors["v.weight"].shape
    kept_heads = plan.heads if plan.heads is not None else tuple(range(heads))
    dims = plan.v_dims if plan.v_dims is not None else (tuple(range(v)),) * len(kept_heads)
    kept = [h * v + d for h, row in zip(kept_heads, dims, strict=True) for d in row]
    refit = _refit(tensors, "out", kept, mixed, ridge)
    refit["out.weight"] = refit["out.weight"].unflatten(1, (len(kept_heads), -1))
    return refit


def factor_fc1(tensors: Tensors, plan: BlockPlan, given: Moments) -> Tensors:
    """fc1 of the kept neurons in two factors, if the plan wants that, nearest for what it reads.

    Args:
        given: moments of what the MLP is given.
    """
    if plan.ranks.fc1 is None:
        return {}
    read = read_by_mlp(tensors, given)
    if plan.mlp_features is not None:
        read = _part(read, list(plan.mlp_features))
    return factored(select(tensors, plan), "fc1", plan.ranks.fc1, inputs=read)


def compensate_fc2(
    tensors: Tensors, plan: BlockPlan, hidden: Moments, ridge: float, gain: Tensor | None = None
) -> Tensors:
    """Refitted `fc2.weight` and `fc2.bias` for the kept neurons, in two factors where the plan wants that.

    Args:
        hidden: moments of the dense block's hidden activations.
        gain: by which rows of factors count, see `factors.gain_of`.
    """
    if plan.neurons is None:
        return _at_rank(tensors, plan, hidden, gain)
    kept = list(plan.neurons)
    new = _refit(tensors, "fc2", kept, hidden, ridge)
    return _at_rank(new, plan, _part(hidden, kept), gain)


def compensate_hidden(
    tensors: Tensors, plan: BlockPlan, seen: Moments, ridge: float, gain: Tensor | None
) -> Tensors:
    """The same where hidden activations are other ones than the dense block's: what is lost of the MLP's output is
    regressed on them.

    Args:
        seen: moments of the hidden activations that there are, (F), followed by those of what the dense MLP writes
            beyond what the kept weights make of these, (D).
    """
    kept = select(tensors, plan)["fc2.weight"]
    beyond = torch.eye(len(kept), dtype=kept.dtype, device=kept.device)
    both = {**tensors, "fc2.weight": torch.cat([kept, beyond], 1)}
    units = list(range(kept.shape[1]))
    new = _refit(both, "fc2", units, seen, ridge)
    return _at_rank(new, plan, _part(seen, units), gain)


def _at_rank(tensors: Tensors, plan: BlockPlan, read: Moments, gain: Tensor | None) -> Tensors:
    """fc2 in two factors, if the plan wants that."""
    if plan.ranks.fc2 is None:
        return tensors
    return factored(tensors, "fc2", plan.ranks.fc2, inputs=read, gain=gain)


def _part(moments: Moments, kept: list[int]) -> Moments:
    return moments.select(torch.tensor(kept, device=moments.total.device))


def _refit(tensors: Tensors, name: str, kept: list[int], inputs: Moments, ridge: float) -> Tensors:
    old = tensors[f"{name}.weight"]
    weight = old.double().flatten(1)
    index = torch.tensor(kept, device=weight.device)
    bias = tensors.get(f"{name}.bias")
    # Without a bias that takes up the means, the weights must fit these too.
    second = inputs.covariance if bias is not None else inputs.second / inputs.count
    new = regress_on_kept(weight, second, index, ridge)
    refit = {f"{name}.weight": new.to(old.dtype)}
    if bias is not None:
        shift = weight @ inputs.mean - new @ inputs.mean[index]
        refit[f"{name}.bias"] = (bias.double() + shift).to(bias.dtype)
    return refit


def cut(
    model: nn.Module, plan: Plan, batches: Batches, ridge: float, dense: nn.Module
) -> nn.Module:
    """Apply a plan and compensate: by `sequential_sweep`, then by `match_mean_outputs`.

    Args:
        model: what the plan is for.
        batches: calibration images, iterated twice.
        ridge: see `compensate`.
        dense: whose mean outputs are matched: the model that `model` was made from.
    """
    small = apply(model, plan)
    sequential_sweep(model, small, plan, batches, ridge)
    match_mean_outputs(dense, small, batches)
    return small


@torch.inference_mode()
def sequential_sweep(
    dense: nn.Module, small: nn.Module, plan: Plan, batches: Batches, ridge: float
) -> None:
    """Compensate every block of `small` in place, each on the inputs it really gets.

    Block by block, the dense block is fed the tokens that the compressed blocks before it produce; the
    moments of its inner activations there, not those of the dense model, decide the compensation.
    Tokens count as often as they have members. Memory: the tokens of all images at one block.

    The target is what the dense block makes of the same input. Fitting the dense model's own stream
    instead, so that a block repairs what earlier ones lost, was measured and harms: the few prefix
    tokens that the head reads get a correction that suits the many patch tokens.

    Args:
        dense: the model `plan` was made for.
        small: `dense` cut by `plan`.
        batches: calibration images, iterated once.
        ridge: see `compensate`.
    """
    host = host_of(small)
    shape = host.describe(small)
    device = next(small.parameters()).device
    states = [tokens.start(host.embed(small, images_of(batch).to(device))) for batch in batches]
    stack = small.blocks if isinstance(small.blocks, BlockStack) else None
    for i, cut in enumerate(plan.blocks):
        block, reference = host.block(small, i), host.block(dense, i)
        weights = host.read(reference)
        if cut.v_dims is not None or cut.heads is not None:
            seen = _moments_at(reference.attn.get_submodule("proj"), _attend, reference, states)
            refit = compensate_out(weights, cut, seen, ridge)
            host.write(block, host.read(block) | refit, shape.blocks[i].ranks)
        states = _attend(block, states) if stack is None else [stack.attend(i, s) for s in states]
        if cut.ranks.fc1 is not None:
            given = _moments_at(reference.mlp, _feed, reference, states)
            refit = factor_fc1(weights, cut, given)
            host.write(block, host.read(block) | refit, shape.blocks[i].ranks)
            seen = _hidden_and_lost(block, reference, weights, cut, states)
            refit |= compensate_hidden(weights, cut, seen, ridge, gain_of(reference, "fc2"))
            host.write(block, host.read(block) | refit, shape.blocks[i].ranks)
        elif cut.neurons is not None or cut.ranks.fc2 is not None:
            seen = _moments_at(reference.mlp.get_submodule("fc2"), _feed, reference, states)
            refit = compensate_fc2(weights, cut, seen, ridge, gain_of(reference, "fc2"))
            host.write(block, host.read(block) | refit, shape.blocks[i].ranks)
        states = _feed(block, states)


@torch.inference_mode()
def match_mean_outputs(dense: nn.Module, small: nn.Module, batches: Batches) -> None:
    """Shift the logits of `small`, in place, so that their means over the images are the dense model's.

    Freer maps of features or logits (scales, ridge regression) were measured and overfit the images.
    """
    host, device = host_of(small), next(small.parameters()).device
    if not host.describe(small).num_classes:
        return
    total, count = torch.zeros((), dtype=torch.float64, device=device), 0
    for batch in batches:
        x = images_of(batch).to(device)
        total = total + (dense(x) - small(x)).double().sum(0)
        count += len(x)
    host.shift_outputs(small, total / count)


def _attend(block: Block, states: States) -> States:
    return [s.replace(block.attend(s.x, tokens.attention_bias(s))) for s in states]


def _feed(block: Block, states: States) -> States:
    return [s.replace(block.feed(s.x)) for s in states]


def _hidden_and_lost(
    block: Block, reference: Block, weights: Tensors, plan: BlockPlan, states: States
) -> Moments:
    """What `compensate_hidden` needs of a block whose fc1 is factored already.

    Args:
        reference: the dense block.
        weights: its canonical tensors.
    """
    kept, full = (wide(t["fc2.weight"]) for t in (select(weights, plan), weights))
    ends = [one.mlp.get_submodule("fc2") for one in (block, reference)]
    reads: dict[nn.Module, Tensor] = {}

    def listen(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        reads[module] = wide(args[0])

    found = Moments.zero(kept.shape[1] + len(kept), kept)
    handles = [module.register_forward_pre_hook(listen) for module in ends]
    try:
        for state in states:
            for one in (block, reference):
                one.feed(state.x)
            own, wanted = (reads[module] for module in ends)
            found.add(torch.cat([own, wanted @ full.mT - own @ kept.mT], -1), state.size)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _moments_at(
    projection: nn.Module, run: Callable[[Block, States], States], block: Block, states: States
) -> Moments:
    """Moments of what `projection` reads while `run` takes the states through a half of its block."""
    found: Moments | None = None
    size: Tensor | None = None

    def listen(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        nonlocal found
        if found is None:
            found = Moments.zero(args[0].shape[-1], args[0])
        found.add(args[0], size)

    handle = projection.register_forward_pre_hook(listen)
    try:
        for state in states:
            size = state.size
            run(block, [state])
    finally:
        handle.remove()
    assert found is not None  # the calibration set is not empty: the dense sweep checked
    return found
