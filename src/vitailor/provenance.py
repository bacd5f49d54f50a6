"""Where a compressed model comes from: the read-only record it carries as `model.vitailor`."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from pydantic import Field
from torch import nn

from .plan import Plan
from .preprocessing import Preprocessing
from .shape import Facts, ViTShape


class Step(Facts):
    """One compression that led to a model.

    Attributes:
        source: what was compressed, as the user named it.
        weights_hash: SHA-256 over the source's tensors.
        method, settings: the method's name and its configuration.
        budget: as asked for, e.g. "macs 0.6".
        seed: seed of everything random.
        versions: of the libraries that matter.
        plan: kept indices, ranks and counts, relative to the source.
    """

    source: str
    weights_hash: str
    method: str
    settings: dict[str, Any]
    budget: str
    seed: int
    versions: dict[str, str]
    plan: Plan


class Provenance(Facts):
    """What a model knows about itself.

    Attributes:
        shape: per-block sizes when it was made.
        steps: the compressions it went through, oldest first.
        record: what was measured, on what data, under which conditions.
        preprocessing: how its input images are prepared.
        class_names: names of its outputs, if known.
    """

    shape: ViTShape
    steps: tuple[Step, ...] = ()
    record: dict[str, Any] = Field(default_factory=dict)
    preprocessing: Preprocessing | None = None
    class_names: tuple[str, ...] | None = None


def provenance_of(model: nn.Module) -> Provenance | None:
    """The record a model carries, or None for a model vitailor did not make."""
    known = getattr(model, "vitailor", None)
    return known if isinstance(known, Provenance) else None


def weights_hash(model: nn.Module) -> str:
    """SHA-256 in hex over the model's tensors: sorted names, dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()
