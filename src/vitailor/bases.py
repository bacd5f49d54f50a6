"""Rotate attention into bases sorted by importance, without changing what the model computes.

Logits depend on queries and keys only through q^T k, and the output on values only through W_o z, so
each head is free to choose its bases. Sorted so that the first dims matter most, any cut of QK or V dims
is then a plain selection of the leading ones.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from .calibrate import BlockMoments, Moments
from .hosts import Tensors, host_of
from .linalg import balanced_bases


@torch.no_grad()
def rotate(model: nn.Module, moments: list[BlockMoments]) -> tuple[nn.Module, list[BlockMoments]]:
    """An equivalent model whose QK and V dims are sorted, and the moments in its coordinates.

    QK dims are sorted by activation-aware SVD of each head's bilinear form (q and k moments), V dims by
    that of each head's map through the output projection. The key bias, which softmax ignores, becomes
    zero, and the value bias moves into the output bias, since attention rows sum to one.

    The outputs equal those of `model` up to rounding. Queries and keys that are normalised are left.
    """
    host = host_of(model)
    shape = host.describe(model)
    rotated = copy.deepcopy(model)
    after = []
    for i, found in enumerate(moments):
        block = host.block(rotated, i)
        tensors = {name: tensor.double() for name, tensor in host.read(block).items()}
        new = copy.copy(found)
        if not shape.qk_norm:
            _rotate_queries_keys(tensors, found, new)
        _rotate_values(tensors, found, new, block.gains()[0])
        _write_back(host.read(block), tensors)
        host.write(block, tensors, shape.blocks[i].ranks)
        after.append(new)
    return rotated, after


def _rotate_queries_keys(tensors: Tensors, found: BlockMoments, new: BlockMoments) -> None:
    to_q, to_k = balanced_bases(found.query, found.key)
    tensors["q.weight"] = to_q.mT @ tensors["q.weight"]
    tensors["k.weight"] = to_k.mT @ tensors["k.weight"]
    if "q.bias" in tensors:
        tensors["q.bias"] = (to_q.mT @ tensors["q.bias"].unsqueeze(-1)).squeeze(-1)
        tensors["k.bias"] = torch.zeros_like(tensors["k.bias"])
    new.query = to_q.mT @ found.query @ to_q
    new.key = to_k.mT @ found.key @ to_k


def _rotate_values(
    tensors: Tensors, found: BlockMoments, new: BlockMoments, gain: Tensor | None
) -> None:
    heads, v, _ = tensors["v.weight"].shape
    out_DHV = tensors["out.weight"]
    covariance = found.mixed.covariance.unflatten(0, (heads, v)).unflatten(2, (heads, v))
    own_HVV = torch.stack([covariance[h, :, h] for h in range(heads)])
    seen_DHV = out_DHV if gain is None else out_DHV * gain.double()[:, None, None]
    gram_HVV = torch.einsum("dhv,dhw->hvw", seen_DHV, seen_DHV)
    to_out, to_v = balanced_bases(gram_HVV, own_HVV)
    shift = torch.zeros(heads, v, dtype=torch.float64, device=out_DHV.device)
    if "v.bias" in tensors and "out.bias" in tensors:
        shift = tensors["v.bias"]
        tensors["out.bias"] = tensors["out.bias"] + torch.einsum("dhv,hv->d", out_DHV, shift)
        tensors["v.bias"] = torch.zeros_like(shift)
    elif "v.bias" in tensors:
        tensors["v.bias"] = torch.einsum("hvw,hv->hw", to_v, tensors["v.bias"])
    tensors["v.weight"] = to_v.mT @ tensors["v.weight"]
    tensors["out.weight"] = torch.einsum("dhv,hvw->dhw", out_DHV, to_out)
    new.mixed = _transform(found.mixed, torch.block_diag(*to_v), shift.flatten())


def _transform(moments: Moments, basis: Tensor, shift: Tensor) -> Moments:
    """Moments of basis^T (x - shift)."""
    n, total = moments.count, moments.total
    centred = moments.second - torch.outer(shift, total) - torch.outer(total, shift)
    centred = centred + n * torch.outer(shift, shift)
    return Moments(n, basis.mT @ (total - n * shift), basis.mT @ centred @ basis)


def _write_back(before: Tensors, tensors: Tensors) -> None:
    """Give the new tensors the dtype of the old ones."""
    for name, tensor in before.items():
        tensors[name] = tensors[name].to(tensor.dtype)
