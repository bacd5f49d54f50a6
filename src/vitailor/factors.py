"""A projection of a block in two factors, of the rank and by the decomposition asked for, such that what the block
writes to the residual stream stays near."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from .calibrate import Moments
from .decompose import Decomposition, decompose
from .hosts import Tensors
from .layers import Block

#: Layer scale of a row counts at least this share of the mean one: rows that count nothing could not be had back.
LEAST_GAIN = 1e-3
#: Moments of what each projection of a block reads.
Inputs = Mapping[str, Moments]


def factored(
    tensors: Tensors,
    name: str,
    rank: int,
    kind: Decomposition = "svd",
    *,
    inputs: Moments | None = None,
    gain: Tensor | None = None,
    seed: int = 0,
) -> Tensors:
    """Factors of a projection, the weight that they make, and a bias that takes up what is lost of the mean.

    Args:
        tensors: canonical tensors of a block.
        name: which projection, e.g. "fc1".
        rank, kind, seed: see `decompose`.
        inputs: moments of what it reads; None for decomposing the weights alone.
        gain: (out,) what each row counts, see `gain_of`.

    Returns:
        What replaces its tensors.
    """
    key = f"{name}.weight"
    old, bias = weight_of(tensors, name).double(), bias_of(tensors, name)
    second = second_of(inputs, centred=bias is not None)
    found = decompose(scaled(old, gain), rank, kind, moments=second, seed=seed)
    up = found.up if gain is None else found.up / gain.double().unsqueeze(1)
    dtype = tensors[key].dtype
    up, down = up.to(dtype), found.down.to(dtype)
    nearest = up.double() @ down.double()
    new = {
        f"{name}.up": up,
        f"{name}.down": down,
        key: nearest.to(dtype).reshape(tensors[key].shape),
    }
    if bias is not None and inputs is not None:
        shifted = bias.double().flatten() + (old - nearest) @ inputs.mean
        new[f"{name}.bias"] = shifted.reshape(bias.shape).to(bias.dtype)
    return new


def gain_of(block: Block, name: str) -> Tensor | None:
    """(out,) by how much the block's residual stream takes what a projection writes, where it is scaled."""
    gain = dict(zip(("out", "fc2"), block.gains(), strict=True)).get(name)
    if gain is None:
        return None
    size: Tensor = gain.abs()
    floored: Tensor = size.clamp_min(float(LEAST_GAIN * size.mean()) or 1.0)
    return floored


def scaled(weight: Tensor, gain: Tensor | None) -> Tensor:
    """Rows as they count."""
    return weight if gain is None else weight * gain.double().unsqueeze(1)


def weight_of(tensors: Tensors, name: str) -> Tensor:
    """(out, in) weights of a projection, heads flattened."""
    weight = tensors[f"{name}.weight"]
    if weight.dim() == 2:
        return weight
    return weight.flatten(1) if name == "out" else weight.flatten(0, 1)


def bias_of(tensors: Tensors, name: str) -> Tensor | None:
    return tensors.get(f"{name}.bias")


def second_of(moments: Moments | None, centred: bool) -> Tensor | None:
    """What counts of the inputs: their covariance where a bias takes up the mean, else second moments."""
    if moments is None:
        return None
    return moments.covariance if centred else moments.second / moments.count


def read_by_mlp(tensors: Tensors, given: Moments) -> Moments:
    """Moments of what fc1 reads, which may be a part of what the MLP is given."""
    return given.select(tensors["mlp_features"]) if "mlp_features" in tensors else given


def lost(
    tensors: Tensors, new: Tensors, name: str, inputs: Moments | None, gain: Tensor | None
) -> float:
    """What factors lose, as a share of the outputs' root mean square (without moments: of the weights' norm).

    Args:
        tensors, new: before and after `factored`, the rest as there.
    """
    second = second_of(inputs, centred=bias_of(tensors, name) is not None)
    weight = scaled(weight_of(tensors, name).double(), gain)
    nearest = scaled(new[f"{name}.up"].double() @ new[f"{name}.down"].double(), gain)

    def size(w: Tensor) -> float:
        return float(w.norm() if second is None else (w @ second * w).sum().clamp_min(0).sqrt())

    return size(weight - nearest) / max(size(weight), 1e-300)
