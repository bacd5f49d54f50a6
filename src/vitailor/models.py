"""Opening a model as users name it: a timm or T2T-ViT name, an artifact folder, or NAME=FILE."""

from __future__ import annotations

import difflib
import os
import re
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from . import t2t
from .artifact import describe_mismatch, is_artifact, load
from .errors import UnsupportedModelError, UsageError, WeightsError
from .hosts import shape_of

#: Where training scripts put the tensors in their checkpoints; averaged weights come first.
WRAPPERS = ("state_dict_ema", "model_ema", "ema", "state_dict", "model", "module")
#: What data-parallel training and compilation put before every name.
PREFIXES = ("module.", "_orig_mod.")
OTHER_HOSTS = re.compile(r"(transformers|torchvision):", re.IGNORECASE)


@dataclass(frozen=True)
class OpenedModel:
    """A model in evaluation mode on the CPU, and what the user called it."""

    model: nn.Module
    source: str


def open_model(
    spec: str | os.PathLike[str],
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    pretrained: bool = True,
) -> OpenedModel:
    """Open a model. The global random state is not touched.

    Args:
        spec: a name of timm's or of T2T-ViT's, an artifact folder (which wins over a name), or `NAME=FILE`.
        weights: file of tensors for the model, the same as `NAME=FILE`; nothing is downloaded then.
            `.safetensors`, or a `.pth` of tensors, which may be wrapped as training scripts do.
        num_classes: outputs of the head; by default what the weights have, or the usual for the name.
        pretrained: whether a name without `weights` gets its pretrained weights. T2T-ViT's are not for
            download by name.

    Raises:
        UsageError: when the arguments contradict each other.
        UnsupportedModelError: when the name is unknown, or the architecture cannot be accounted for.
        WeightsError: when the weights cannot be had, cannot be read or do not fit.
        ArtifactError, PlanError: when the folder is no artifact or is damaged.
    """
    name, file = _split(os.fspath(spec), None if weights is None else os.fspath(weights))
    source = name if file is None else f"{name}={file}"
    if is_artifact(name) or (_is_path(name) and not _is_name(name)):
        model = load(name)
        if file is not None:
            fill(model, read_weights(file), file, name)
        have = shape_of(model).num_classes
        if num_classes not in (None, have):
            raise UsageError(f"{name} has {have} outputs, not {num_classes}.", "Leave it out.")
        return OpenedModel(model, source)
    _require_known(name)
    with torch.random.fork_rng(devices=[]):
        _require_supported(name)
        if file is None:
            model = _pretrained(name, num_classes) if pretrained else _build(name, num_classes)
        else:
            tensors = read_weights(file)
            classes = _num_classes(tensors) if num_classes is None else num_classes
            model = _build(name, classes)
            fill(model, tensors, file, name)
    shape_of(model)
    return OpenedModel(model.eval(), source)


def read_weights(file: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Tensors by name from a `.safetensors` file, or from a `.pth` file without running its code.

    Raises:
        WeightsError: when there is no such file or it does not hold named tensors.
    """
    path = Path(file).expanduser()
    if not path.is_file():
        raise WeightsError(f"There is no file {path}.", "Check the path of the weights.")
    try:
        if path.suffix == ".safetensors":
            content: Any = load_file(path)
        else:
            # Training scripts put their command line beside the tensors: plain attributes, no code.
            known = torch.serialization.get_safe_globals()
            with torch.serialization.safe_globals([] if Namespace in known else [Namespace]):
                content = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path} cannot be read: {error}.", "Get the file again.") from error
    except Exception as error:  # unpickling fails in many ways
        raise WeightsError(
            f"{path} cannot be read as tensors: it is damaged, or holds Python objects, which are not "
            "loaded because that could run their code.",
            "Store the state dict alone, best as .safetensors.",
        ) from error
    tensors = _unwrap(content)
    if not tensors:
        raise WeightsError(
            f"{path} holds no tensors by name.", "Store the model's state dict in it."
        )
    return tensors


@torch.no_grad()
def fill(model: nn.Module, tensors: Mapping[str, Tensor], file: str, name: str) -> None:
    """Copy tensors into a model, which keeps its dtype.

    Raises:
        WeightsError: naming the first tensors that are missing, unexpected or of another size.
    """
    expected = model.state_dict()
    mismatch = describe_mismatch(
        {n: tuple(t.shape) for n, t in expected.items()},
        {n: tuple(t.shape) for n, t in tensors.items()},
    )
    if mismatch:
        raise WeightsError(
            f"{file} does not fit {name}: {mismatch}.",
            "Name the architecture the weights are of, and their number of classes (--num-classes).",
        )
    for n, tensor in tensors.items():
        if tensor.is_floating_point() != expected[n].is_floating_point():
            raise WeightsError(
                f"'{n}' in {file} has dtype {tensor.dtype}, the model's {expected[n].dtype}.",
                "Give weights that are not quantized.",
            )
    model.load_state_dict(dict(tensors))


def _split(spec: str, weights: str | None) -> tuple[str, str | None]:
    """Name and file of weights; a folder whose name holds a "=" is a folder."""
    if "=" not in spec or Path(spec).expanduser().is_dir():
        return spec, weights
    if weights is not None:
        raise UsageError(
            f"Weights are given twice: in '{spec}' and as {weights}.", "Give them once."
        )
    name, _, file = spec.partition("=")
    if not name or not file:
        raise UsageError(
            f"'{spec}' is not NAME=FILE.", "Give both, e.g. deit_tiny_patch16_224=w.pth."
        )
    return name, file


def _is_path(name: str) -> bool:
    written_as_path = name.startswith((".", "~", os.sep)) or name.endswith(os.sep)
    return written_as_path or Path(name).exists()


def _require_known(name: str) -> None:
    if OTHER_HOSTS.match(name):
        raise UnsupportedModelError(
            f"'{name}' is a model of a host library that this version does not support.",
            "Use a timm name, e.g. vit_tiny_patch16_224, a T2T-ViT name, e.g. t2t_vit_14, or an artifact "
            "folder.",
        )
    if name in t2t.VARIANTS:
        return
    architecture, _, tag = name.partition(".")
    candidates = [*t2t.VARIANTS, *timm.list_models()]
    if timm.is_model(architecture):
        candidates = timm.list_models(f"{architecture}.*", pretrained=True)
        if not tag or name in candidates:
            return
    close = difflib.get_close_matches(_plain(name), candidates, n=3, cutoff=0.5)
    known = f"See timm.list_models(), or use {', '.join(t2t.VARIANTS)}."
    hint = f"Did you mean {' or '.join(close)}?" if close else known
    raise UnsupportedModelError(
        f"'{name}' is neither a timm or T2T-ViT model nor an artifact folder.", hint
    )


def _is_name(name: str) -> bool:
    return name in t2t.VARIANTS or timm.is_model(name)


def _plain(name: str) -> str:
    """A name as code would write it."""
    return name.lower().replace("-", "_")


def _require_supported(name: str) -> None:
    """Refuse an architecture before its weights are downloaded."""
    try:
        with torch.device("meta"):
            bare = _build(name, None)
    except Exception:  # not every model can be built without storage; the real one is checked too
        return
    shape_of(bare)


def _build(name: str, num_classes: int | None) -> nn.Module:
    if name in t2t.VARIANTS:
        return t2t.create(name, num_classes)
    return timm.create_model(name, num_classes=num_classes)


def _pretrained(name: str, num_classes: int | None) -> nn.Module:
    if name in t2t.VARIANTS:
        raise WeightsError(
            f"Cannot get the pretrained weights of {name}: they are released as files only.",
            f"Get such a file and give it as local weights (--weights FILE or {name}=FILE).",
        )
    try:
        return timm.create_model(name, pretrained=True, num_classes=num_classes)
    except Exception as error:  # of the hub, of HTTP libraries, of timm
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise WeightsError(
            f"Cannot get the pretrained weights of {name}: {reason}.",
            f"Check the network, or give local weights (--weights FILE or {name}=FILE).",
        ) from error


def _unwrap(content: Any) -> dict[str, Tensor]:
    """The tensors of a checkpoint, without wrappers and prefixes."""
    while isinstance(content, Mapping):
        inner = next((content[k] for k in WRAPPERS if isinstance(content.get(k), Mapping)), None)
        if inner is None:
            break
        content = inner
    if not isinstance(content, Mapping):
        return {}
    tensors = {str(k): v for k, v in content.items() if isinstance(v, Tensor)}
    for prefix in PREFIXES * 2:  # either may be outside
        if tensors and all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors


def _num_classes(tensors: Mapping[str, Tensor]) -> int:
    """Outputs of the head that the weights have; 0 without a head."""
    head = tensors.get("head.weight")
    return 0 if head is None else head.shape[0]
