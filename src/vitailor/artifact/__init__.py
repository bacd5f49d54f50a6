"""The artifact: a folder that holds a compressed model, loads without its dense origin, and runs no code.

plan.json           format version, shape, preprocessing, class names, provenance (`steps`)
model.safetensors   the tensors
record.json         what was measured, on what data, under which conditions
README.md           a model card
"""

from .hub import from_pretrained, push_to_hub
from .store import is_artifact, load, save
from .tensors import describe_mismatch

__all__ = [
    "describe_mismatch",
    "from_pretrained",
    "is_artifact",
    "load",
    "push_to_hub",
    "save",
]
