"""Learned importance gates of Vision Transformer Pruning (Zhu et al., arXiv 2104.08500).

A gate is a vector of learned scores, one for each feature a linear projection reads, multiplied onto these
features: X diag(a). It starts at 1, is trained with the weights under an L1 penalty, and what ends up small
is pruned. The paper gates four places of a block: the common input of Q, K and V, the input of the output
projection, the input of the MLP, and its hidden units (placement "inputs"). Published code gates the
outputs of Q, K and V instead, with one vector for all three, and the hidden units (placement "outputs").
Placement "hidden" gates the hidden units alone, for attention that is compressed by other means.

Since a gate multiplies what a linear map reads or writes, its values can be folded into that map's weights
without changing the function.

Shape suffixes: D embed_dim, H heads, K query/key dim, V value dim, F MLP hidden dim.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Literal, cast

import torch
from torch import Tensor, nn

from .criteria import Importance
from .errors import UnsupportedModelError, UsageError
from .hosts import Tensors, host_of
from .layers import Block

Placement = Literal["inputs", "outputs", "hidden"]
#: Where the gates of each placement sit: the projection, and whether its input or output is gated.
PLACES: dict[Placement, tuple[tuple[str, bool], ...]] = {
    "inputs": (("attn.qkv", True), ("attn.proj", True), ("mlp.fc1", True), ("mlp.fc2", True)),
    "outputs": (("attn.qkv", False), ("mlp.fc2", True)),
    "hidden": (("mlp.fc2", True),),
}


class Gated(nn.Module):
    """A projection with a gate on what it reads or on what it writes.

    Args:
        projection: any module from (..., in) to (..., out).
        size: length of the gate.
        on_input: whether it gates the input. On the output it is repeated to the output's length.

    The parameter `gate` (size,) starts at 1, which leaves the projection bit for bit as it is.
    """

    def __init__(self, projection: nn.Module, size: int, on_input: bool) -> None:
        super().__init__()
        self.projection, self.on_input = projection, on_input
        like = next(projection.parameters())
        self.gate = nn.Parameter(torch.ones(size, device=like.device, dtype=like.dtype))

    def forward(self, x: Tensor) -> Tensor:
        if self.on_input:
            return cast(Tensor, self.projection(x * self.gate))
        y = self.projection(x)
        return cast(Tensor, y * self.gate.repeat(y.shape[-1] // len(self.gate)))


def insert_gates(model: nn.Module, placement: Placement = "inputs") -> nn.Module:
    """A copy of the model with gates at 1, which computes the same.

    Args:
        model: any supported model.
        placement: "inputs" for the paper's four gates a block, "outputs" for one on Q, K and V's outputs
            and one on the hidden units, "hidden" for the latter alone.

    Raises:
        UnsupportedModelError: where Q, K and V are factored apart, and so have no common projection; and
            for "outputs" where their dims differ or are normalised, so that no vector fits all three.
    """
    host = host_of(model)
    shape = host.describe(model)
    gated = copy.deepcopy(model)
    for i, sizes in enumerate(shape.blocks):
        if sizes.ranks.factors_qkv and placement != "hidden":
            raise UnsupportedModelError(
                f"blocks.{i}: Q, K and V are factored apart, so they cannot share a gate.",
                "Multiply the factors out first (vitailor.merge_back).",
            )
        if placement == "outputs" and (sizes.qk_dim != sizes.v_dim or shape.qk_norm):
            raise UnsupportedModelError(
                f"blocks.{i}: one gate cannot fit Q, K and V: their dims differ, or Q and K are normalised.",
                "Gate the inputs instead.",
            )
        width = {
            "attn.qkv": shape.embed_dim if placement == "inputs" else sizes.num_heads * sizes.v_dim,
            "attn.proj": sizes.num_heads * sizes.v_dim,
            "mlp.fc1": shape.embed_dim,
            "mlp.fc2": sizes.mlp_dim,
        }
        block = host.block(gated, i)
        for name, on_input in PLACES[placement]:
            projection = block.get_submodule(name)
            _put(block, name, Gated(projection, width[name], on_input))
    return gated


def gates_of(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Name and values of every gate."""
    for name, module in model.named_modules():
        if isinstance(module, Gated):
            yield f"{name}.gate", module.gate


def l1(model: nn.Module) -> Tensor:
    """Sum of the absolute values of all gates, ||a||_1, to be added to the loss with a factor lambda.

    Raises:
        UsageError: when the model has no gates.
    """
    sums = [gate.abs().sum() for _, gate in gates_of(model)]
    if not sums:
        raise UsageError("The model has no gates.", "Insert them first (insert_gates).")
    return torch.stack(sums).sum()


@torch.no_grad()
def shrink(model: nn.Module, amount: float) -> None:
    """Proximal step of the L1 penalty, in place: every gate goes towards 0 by `amount`, and stops there.

    The alternative to `l1` in the loss; `amount` is the learning rate times lambda. Gates reach 0 exactly.
    """
    for _, gate in gates_of(model):
        gate.copy_(gate.sign() * (gate.abs() - amount).clamp_min(0))


def remove_gates(model: nn.Module) -> nn.Module:
    """A copy of a gated model without its gates, whatever their values."""
    plain = copy.deepcopy(model)
    for name, module in list(plain.named_modules()):
        if isinstance(module, Gated):
            _put(plain, name, module.projection)
    return plain


@torch.no_grad()
def fold_gates(model: nn.Module) -> nn.Module:
    """A copy of a gated model that computes the same without gates: their values are in the weights."""
    plain = remove_gates(model)
    host = host_of(plain)
    shape = host.describe(plain)
    for i in range(shape.depth):
        block = host.block(plain, i)
        tensors = host.read(block)
        folded = tensors | _folded(tensors, _values(host.block(model, i)))
        host.write(block, folded, shape.blocks[i].ranks)
    return plain


def importance(model: nn.Module) -> list[Importance]:
    """Absolute gate values of each block as scores; dims without a gate of their own all count 1."""
    plain = remove_gates(model)
    host = host_of(plain)
    found = []
    for i in range(host.describe(plain).depth):
        tensors, gates = host.read(host.block(plain, i)), _values(host.block(model, i))
        (heads, qk, _), v = tensors["q.weight"].shape, tensors["v.weight"].shape[1]
        ones = tensors["q.weight"].new_ones
        shared = gates.get(("attn.qkv", False))
        found.append(
            Importance(
                qk_dims=ones(heads, qk)
                if shared is None
                else shared.abs().unflatten(0, (heads, qk)),
                v_dims=gates.get(("attn.proj", True), ones(heads * v) if shared is None else shared)
                .abs()
                .unflatten(0, (heads, v)),
                neurons=gates[("mlp.fc2", True)].abs(),
                attn_features=_read(gates.get(("attn.qkv", True)), tensors.get("attn_features")),
                mlp_features=_read(gates.get(("mlp.fc1", True)), tensors.get("mlp_features")),
            )
        )
    return found


def _values(block: Block) -> dict[tuple[str, bool], Tensor]:
    """Detached gate values of a block by place."""
    return {
        (name, module.on_input): module.gate.detach()
        for name, module in block.named_modules()
        if isinstance(module, Gated)
    }


def _read(gate: Tensor | None, features: Tensor | None) -> Tensor | None:
    """Scores of the features that a projection reads, where it reads through an index."""
    if gate is None:
        return None
    return gate.abs() if features is None else gate.abs()[features]


def _folded(tensors: Tensors, gates: dict[tuple[str, bool], Tensor]) -> Tensors:
    """The canonical tensors that gates change, with their values multiplied in."""
    new: Tensors = {}
    heads, v, _ = tensors["v.weight"].shape
    for (name, on_input), gate in gates.items():
        if (name, on_input) == ("attn.qkv", True):
            read = gate[tensors["attn_features"]] if "attn_features" in tensors else gate
            new |= {f"{n}.weight": tensors[f"{n}.weight"] * read for n in "qkv"}
        elif name == "attn.qkv":
            rows = gate.unflatten(0, (heads, v))
            new |= {f"{n}.weight": tensors[f"{n}.weight"] * rows.unsqueeze(-1) for n in "qkv"}
            new |= {
                f"{n}.bias": tensors[f"{n}.bias"] * rows for n in "qkv" if f"{n}.bias" in tensors
            }
        elif name == "attn.proj":
            new["out.weight"] = tensors["out.weight"] * gate.unflatten(0, (heads, v))
        elif name == "mlp.fc1":
            read = gate[tensors["mlp_features"]] if "mlp_features" in tensors else gate
            new["fc1.weight"] = tensors["fc1.weight"] * read
        else:
            new["fc2.weight"] = tensors["fc2.weight"] * gate
    return new


def _put(root: nn.Module, name: str, module: nn.Module) -> None:
    """Replace the module of that name."""
    parent, _, leaf = name.rpartition(".")
    setattr(root.get_submodule(parent), leaf, module)
