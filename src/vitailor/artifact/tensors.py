"""Tensors in safetensors files: hashed, written, and checked against a shape before they are read."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..errors import ArtifactError, VitailorError
from ..hosts import host_named, shape_of
from ..shape import ViTShape, revise

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
#: Structural buffers: which input features a projection reads, and by which tokens are compared.
INDICES = (".features", ".match_features")
#: These, and weights of places of tokens: what is stored, but no parameter.
BUFFERS = (*INDICES, ".token_weights")


@dataclass(frozen=True)
class Entry:
    """What is known of a tensor without reading it."""

    dtype: str
    shape: tuple[int, ...]


def entries_of(tensors: Mapping[str, Tensor]) -> dict[str, Entry]:
    """Dtypes and shapes of tensors, as their file would state them."""
    codes = {dtype: code for code, dtype in FLOATS.items()} | {torch.int64: "I64"}
    return {n: Entry(codes.get(t.dtype, str(t.dtype)), tuple(t.shape)) for n, t in tensors.items()}


def write_tensors(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Write tensors as they are, in their own dtypes.

    Raises:
        OSError: when the file cannot be written.
    """
    file.touch()
    usual = file.stat().st_mode  # the library would let nobody else read the file
    try:
        save_file({name: _own(tensor) for name, tensor in tensors.items()}, file, {"format": "pt"})
    except SafetensorError as error:
        # It passes on what the system said as text: "... (os error 28)".
        number = str(error).rpartition("(os error ")[2].rstrip(")")
        code = int(number) if number.isdigit() else 0
        raise OSError(code, os.strerror(code) if code else str(error)) from error
    file.chmod(usual)


def read_tensors(file: Path, shape: ViTShape) -> nn.Module:
    """The model of `shape` with the tensors of `file`, on the CPU, in evaluation mode.

    Names, shapes and dtypes are compared with what the shape needs before any tensor is read.

    Raises:
        ArtifactError: saying what does not fit.
    """
    try:
        # Opening reads the header only, and compares it with the size of the file.
        with safe_open(file, framework="pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            entries = {
                name: Entry(part.get_dtype(), tuple(part.get_shape()))
                for name, part in slices.items()
            }
            model = fitting_skeleton(shape, entries)
            # Copies, because the file may change while the model lives.
            tensors = {name: opened.get_tensor(name).clone() for name in entries}
    except (SafetensorError, OSError) as error:
        raise ArtifactError(
            f"{file} cannot be read: {error}.", "Get the artifact again."
        ) from error
    for name, tensor in tensors.items():
        if name.endswith(INDICES):
            _check_indices(name, tensor, shape.embed_dim)
    model.load_state_dict(tensors, assign=True)
    bare = [n for n, t in (*model.named_parameters(), *model.named_buffers()) if t.is_meta]
    if bare:
        raise ArtifactError(f"No tensor is stored for '{bare[0]}'.", "Upgrade vitailor.")
    return model.eval()


def fitting_skeleton(shape: ViTShape, entries: Mapping[str, Entry]) -> nn.Module:
    """A model of `shape` without storage, if its tensors are exactly `entries`.

    Raises:
        ArtifactError, PlanError: saying what does not fit.
    """
    stored = sum(prod(e.shape) for name, e in entries.items() if not name.endswith(BUFFERS))
    if stored != shape.params:
        raise ArtifactError(
            f"The shape has {shape.params:,} parameters, the tensors {stored:,}.",
            "The plan and the tensors are of different models.",
        )
    try:
        skeleton = host_named(shape.host).skeleton(shape)
        described = shape_of(skeleton)
    except VitailorError:
        raise
    except Exception as error:  # the host library was given arguments it never expected
        raise ArtifactError(
            f"{shape.host} cannot build the stored architecture: {type(error).__name__}.",
            "The plan is damaged.",
        ) from error
    expected = skeleton.state_dict()
    mismatch = describe_mismatch(
        {name: tuple(t.shape) for name, t in expected.items()},
        {name: entry.shape for name, entry in entries.items()},
    )
    if mismatch:
        raise ArtifactError(f"The tensors do not fit the shape: {mismatch}.")
    for name, tensor in expected.items():
        allowed = tuple(FLOATS) if tensor.is_floating_point() else ("I64",)
        if entries[name].dtype not in allowed:
            raise ArtifactError(
                f"'{name}' has dtype {entries[name].dtype}, not {' or '.join(allowed)}."
            )
    # What a newer describer says about architecture and name may differ in form; sizes may not.
    free: dict[str, Any] = {
        name: getattr(shape, name)
        for name in ("architecture", "name", "matching", "match_features", "weighs_tokens")
    }
    if "pools_prefix" not in shape.model_fields_set:  # which older artifacts do not tell
        free["pools_prefix"] = shape.pools_prefix
    if revise(described, **free) != shape:
        field = next(
            n
            for n in ViTShape.model_fields
            if n not in free and getattr(described, n) != getattr(shape, n)
        )
        raise ArtifactError(
            f"'{field}' of the stored shape is not that of the architecture it names.",
            "The plan is damaged.",
        )
    return skeleton


def describe_mismatch(
    expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]
) -> str:
    """How two sets of named sizes differ, in one line; empty when they do not."""
    missing = [f"'{name}'" for name in expected if name not in found]
    unexpected = [f"'{name}'" for name in found if name not in expected]
    wrong = [
        f"'{name}' is {found[name]} instead of {size}"
        for name, size in expected.items()
        if found.get(name, size) != size
    ]
    parts = ((missing, "missing"), (unexpected, "unexpected"), (wrong, "of another size"))
    return "; ".join(f"{len(n)} {what} ({_first(n)})" for n, what in parts if n)


def _first(items: Iterable[str], limit: int = 3) -> str:
    listed = list(items)
    return ", ".join(listed[:limit]) + (", ..." if len(listed) > limit else "")


def _check_indices(name: str, index: Tensor, limit: int) -> None:
    inside = len(index) > 0 and int(index[0]) >= 0 and int(index[-1]) < limit
    if not inside or not bool((index.diff() > 0).all()):
        raise ArtifactError(
            f"'{name}' must hold strictly increasing indices from 0 to {limit - 1}.",
            "The tensors are damaged.",
        )


def _own(tensor: Tensor) -> Tensor:
    """Contiguous on the CPU, with storage of its own: a file has no views."""
    tensor = tensor.detach().cpu().contiguous()
    shared = tensor.untyped_storage().nbytes() != tensor.nbytes
    return tensor.clone() if shared else tensor
