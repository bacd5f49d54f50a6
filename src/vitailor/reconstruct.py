"""Closed-form compensation: what was removed is regressed on what was kept and written into the next weights.

Two forms. `compensate` needs only the moments of the dense sweep and treats one block at a time; it makes
candidates comparable during allocation. `sequential_sweep` then walks through the blocks of the
compressed model, each fed by the compressed blocks before it, and fits its output projections to the
dense model's residual stream, so that later blocks repair what earlier ones lost.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from . import tokens
from .calibrate import Batches, BlockMoments, images_of
from .hosts import Tensors, host_of
from .layers import Block, BlockStack
from .linalg import add_ridge, regress_on_kept
from .plan import BlockPlan
from .surgery import select


def compensate(
    tensors: Tensors, plan: BlockPlan, moments: BlockMoments, ridge: float
) -> Tensors:
    """Canonical tensors of a block after its plan, with output projections refitted.

    The removed inputs x_R of the out and fc2 projections are predicted from the kept ones by the affine
    map of least mean square error, x_R ~ A x_K + a, and W_R A and W_R a are added to weight and bias.

    Args:
        tensors: canonical tensors of the dense block.
        moments: of the dense block.
        ridge: towards no compensation, as a fraction of the mean variance of the kept inputs.
    """
    small = select(tensors, plan)
    if plan.v_dims is not None or plan.heads is not None:
        heads, v, _ = tensors["v.weight"].shape
        kept_heads = plan.heads if plan.heads is not None else tuple(range(heads))
        dims = plan.v_dims if plan.v_dims is not None else (tuple(range(v)),) * len(kept_heads)
        kept = [h * v + d for h, row in zip(kept_heads, dims, strict=True) for d in row]
        weight, bias = _refit(tensors, "out", kept, moments.mixed.mean, moments.mixed.covariance, ridge)
        small["out.weight"] = weight.unflatten(1, (len(kept_heads), -1))
        if bias is not None:
            small["out.bias"] = bias
    if plan.neurons is not None:
        mean, covariance = moments.hidden.mean, moments.hidden.covariance
        weight, bias = _refit(tensors, "fc2", list(plan.neurons), mean, covariance, ridge)
        small["fc2.weight"] = weight
        if bias is not None:
            small["fc2.bias"] = bias
    return small


def _refit(
    tensors: Tensors, name: str, kept: list[int], mean: Tensor, covariance: Tensor, ridge: float
) -> tuple[Tensor, Tensor | None]:
    old = tensors[f"{name}.weight"]
    weight = old.double().flatten(1)
    index = torch.tensor(kept, device=weight.device)
    new = regress_on_kept(weight, covariance, index, ridge)
    bias = tensors.get(f"{name}.bias")
    if bias is not None:
        bias = (bias.double() + weight @ mean - new @ mean[index]).to(old.dtype)
    return new.to(old.dtype), bias


@torch.inference_mode()
def sequential_sweep(dense: nn.Module, small: nn.Module, batches: Batches, ridge: float) -> None:
    """Refit the output projections of `small` in place, block by block, to follow `dense`.

    For each block, with inputs x of the compressed model and the dense residual stream y after the same
    half block (averaged over the tokens that were merged), weight and bias of the out projection get
    the correction that brings x + out(z) closest to y in mean square; likewise fc2. Tokens count as
    often as they have members. Memory: the tokens of all images at one block, for both models.

    Args:
        dense: the model to follow.
        small: the compressed model; it must have the same number of blocks.
        batches: calibration images, iterated once.
        ridge: towards no correction, as a fraction of the mean variance of the projection's inputs.
    """
    host = host_of(small)
    shape = host.describe(small)
    device = next(small.parameters()).device
    truth = [host.embed(dense, images_of(batch).to(device)) for batch in batches]
    states = [tokens.start(x) for x in truth]
    stack = small.blocks if isinstance(small.blocks, BlockStack) else None
    for i in range(shape.depth):
        block, reference = host.block(small, i), host.block(dense, i)
        truth = [reference.attend(x) for x in truth]
        _fit_half(block, "attn.proj", states, truth, ridge)
        states = [s.replace(block.attend(s.x, tokens.attention_bias(s))) for s in states]
        if stack is not None:
            states = [stack.reduce(i, s) for s in states]
        truth = [reference.feed(x) for x in truth]
        _fit_half(block, "mlp.fc2", states, truth, ridge)
        states = [s.replace(block.feed(s.x)) for s in states]


def _fit_half(
    block: Block, name: str, states: Sequence[tokens.Tokens], truth: Sequence[Tensor], ridge: float
) -> None:
    projection = block.get_submodule(name)
    if not isinstance(projection, nn.Linear):
        return  # factored layers keep their factors
    scale = getattr(block.ls1 if name == "attn.proj" else block.ls2, "gamma", None)
    seen: list[Tensor] = []
    handle = projection.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    n_in, n_out = projection.in_features, projection.out_features
    gram = projection.weight.new_zeros(n_in + 1, n_in + 1, dtype=torch.float64)
    cross = projection.weight.new_zeros(n_out, n_in + 1, dtype=torch.float64)
    count = 0.0
    try:
        for state, target in zip(states, truth, strict=True):
            seen.clear()
            if name == "attn.proj":
                got = block.attend(state.x, tokens.attention_bias(state))
            else:
                got = block.feed(state.x)
            miss = tokens.average(state, target) - got
            if scale is not None:
                miss = miss / scale
            size = state.size if state.size is not None else miss.new_ones(miss.shape[:2])
            z = torch.cat([seen[0].flatten(0, 1), miss.new_ones(miss.numel() // n_out, 1)], dim=1)
            weighted = z * size.flatten().unsqueeze(1)
            gram += (weighted.T @ z).double()
            cross += (miss.flatten(0, 1).T @ weighted).double()
            count += float(size.sum())
    finally:
        handle.remove()
    gram, cross = gram / count, cross / count
    mean = gram[-1, :-1]
    covariance = add_ridge(gram[:-1, :-1] - torch.outer(mean, mean), ridge)
    offset = cross[:, -1]
    change = torch.linalg.solve(covariance, (cross[:, :-1] - torch.outer(offset, mean)).mT).mT
    projection.weight += change.to(projection.weight.dtype)
    if projection.bias is not None:
        projection.bias += (offset - change @ mean).to(projection.bias.dtype)
