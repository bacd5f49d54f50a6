"""The dense sweep: second moments of what each projection reads, over unlabeled images, in bounded memory.

Shape suffixes: D embed_dim, H heads, K query/key dim, V value dim, F MLP hidden dim.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .errors import DataError
from .hosts import Host, Tensors, host_of

#: Re-iterable batches of images (B, 3, H, W), alone or with labels.
Batches = Iterable[Tensor | tuple[Tensor, Tensor]]


@dataclass
class Moments:
    """First and second moments of a vector over calibration tokens.

    Attributes:
        count: number of vectors.
        total: (n,) their sum.
        second: (n, n) sum of their outer products.
    """

    count: float
    total: Tensor
    second: Tensor

    @classmethod
    def zero(cls, size: int, like: Tensor) -> Moments:
        new = like.new_zeros
        return cls(0.0, new(size, dtype=torch.float64), new(size, size, dtype=torch.float64))

    def add(self, x: Tensor, weight: Tensor | None = None) -> None:
        """Add vectors x (..., n), optionally weighted by (...)."""
        flat = wide(x).flatten(0, -2)
        weighted = flat if weight is None else flat * weight.flatten().unsqueeze(-1)
        self.count += float(flat.shape[0] if weight is None else weight.sum())
        self.total += weighted.sum(0).double()
        self.second += (weighted.T @ flat).double()

    def select(self, index: Tensor) -> Moments:
        """Moments of these coordinates."""
        return Moments(self.count, self.total[index], self.second[index][:, index])

    @property
    def mean(self) -> Tensor:
        return self.total / self.count

    @property
    def covariance(self) -> Tensor:
        """(n, n) centred second moment."""
        return self.second / self.count - torch.outer(self.mean, self.mean)


@dataclass
class BlockMoments:
    """What the dense sweep keeps of one block.

    Attributes:
        query: (H, K, K) second moment of queries, bias included.
        key: (H, K, K) second moment of keys, centred within each image: a shift common to all keys of
            an image cancels in softmax.
        mixed: moments of the attention-weighted values of all heads, (H V).
        mlp_input: moments of what the MLP reads, (D).
        hidden: moments of the MLP's hidden activations, (F).
        attn_input: moments of what the attention's projections read, (D or fewer); None unless asked for.
    """

    query: Tensor
    key: Tensor
    mixed: Moments
    mlp_input: Moments
    hidden: Moments
    attn_input: Moments | None = None


def wide(x: Tensor) -> Tensor:
    """In single precision at least: squares of half precision overflow, and distances are mostly rounding."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def images_of(batch: Tensor | tuple[Tensor, Tensor] | list[Tensor]) -> Tensor:
    return batch if isinstance(batch, Tensor) else batch[0]


@torch.inference_mode()
def dense_sweep(
    model: nn.Module, batches: Batches, attention_input: bool = False
) -> list[BlockMoments]:
    """Moments of every block of the dense model.

    Args:
        model: any supported model, on the device to run on; its mode is restored.
        batches: calibration images.
        attention_input: whether moments of what the attention reads are wanted too.

    Raises:
        DataError: when there are no images.
    """
    host = host_of(model)
    shape = host.describe(model)
    device = next(model.parameters()).device
    weights = [host.read(host.block(model, i)) for i in range(shape.depth)]
    found = [_empty(tensors, attention_input) for tensors in weights]
    was_training = model.training
    model.eval()
    handles = [
        handle
        for i in range(shape.depth)
        for handle in _listen(host, model, i, weights[i], found[i])
    ]
    try:
        for batch in batches:
            model(images_of(batch).to(device))
    finally:
        for handle in handles:
            handle.remove()
        model.train(was_training)
    if not found[0].hidden.count:
        raise DataError("There are no calibration images.", "Give a folder with images.")
    for block in found:
        block.query /= block.mixed.count
        block.key /= block.mixed.count
    return found


def _empty(tensors: Tensors, attention_input: bool) -> BlockMoments:
    heads, qk, _ = tensors["q.weight"].shape
    v, hidden = tensors["v.weight"].shape[1], tensors["fc2.weight"].shape[1]
    like = tensors["q.weight"]
    return BlockMoments(
        query=like.new_zeros(heads, qk, qk, dtype=torch.float64),
        key=like.new_zeros(heads, qk, qk, dtype=torch.float64),
        mixed=Moments.zero(heads * v, like),
        mlp_input=Moments.zero(tensors["out.weight"].shape[0], like),
        hidden=Moments.zero(hidden, like),
        attn_input=Moments.zero(tensors["q.weight"].shape[2], like) if attention_input else None,
    )


def _listen(
    host: Host, model: nn.Module, index: int, weights: Tensors, found: BlockMoments
) -> Iterator[RemovableHandle]:
    """Temporary hooks that add what a block's projections read to its moments."""
    block = host.block(model, index)

    def on_attention(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        x_BND = wide(args[0])
        if "attn_features" in weights:
            x_BND = x_BND[..., weights["attn_features"]]
        if found.attn_input is not None:
            found.attn_input.add(x_BND)
        for name, into in (("q", found.query), ("k", found.key)):
            y_BHNK = torch.einsum("bnd,hkd->bhnk", x_BND, wide(weights[f"{name}.weight"]))
            if name == "q" and "q.bias" in weights:
                y_BHNK = y_BHNK + wide(weights["q.bias"]).unsqueeze(1)
            if name == "k":
                y_BHNK = y_BHNK - y_BHNK.mean(2, keepdim=True)
            into += torch.einsum("bhnk,bhnl->hkl", y_BHNK, y_BHNK).double()

    def on_out(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        found.mixed.add(args[0])

    def on_mlp(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        found.mlp_input.add(args[0])

    def on_fc2(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        found.hidden.add(args[0])

    attn, mlp = block.attn, block.mlp
    yield attn.register_forward_pre_hook(on_attention)
    yield attn.get_submodule("proj").register_forward_pre_hook(on_out)
    yield mlp.register_forward_pre_hook(on_mlp)
    yield mlp.get_submodule("fc2").register_forward_pre_hook(on_fc2)
