"""First-order Taylor importance of every unit: |sum of activation x gradient of the loss|.

After Molchanov et al. (arXiv 1906.10771), on activations: what the loss would change by, to first order,
if the unit's activation were set to zero.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .calibrate import Batches, images_of
from .criteria import Importance
from .hosts import Tensors, host_of

#: Block, and "hidden" or the name of a projection.
Key = tuple[int, str]
Seen = dict[Key, Tensor]


def taylor(model: nn.Module, batches: Batches, use_labels: bool) -> list[Importance]:
    """Importance of the units of every block; query/key dims by their queries and keys together.

    Args:
        model: in eval mode; no gradient is left on it.
        batches: calibration images; with labels when `use_labels`.
        use_labels: the data's labels instead of the model's own predictions.
    """
    host = host_of(model)
    blocks = [host.block(model, i) for i in range(host.describe(model).depth)]
    seen: Seen = {}
    total: Seen = {}
    handles = []
    for i, block in enumerate(blocks):
        for name, child in block.attn.named_children():
            if name in ("qkv", "q", "k", "v"):
                handles.append(child.register_forward_hook(_remember_output(seen, (i, name))))
        fc2 = block.mlp.get_submodule("fc2")
        handles.append(fc2.register_forward_pre_hook(_remember_input(seen, (i, "hidden"))))
    device = next(model.parameters()).device
    try:
        for batch in batches:
            with torch.enable_grad():
                # Through the images, so that a frozen model has gradients too.
                logits = model(images_of(batch).to(device).detach().requires_grad_())
                labels = batch[1].to(device) if use_labels else logits.argmax(-1)
                loss = F.cross_entropy(logits, labels, reduction="sum")
                grads = torch.autograd.grad(loss, list(seen.values()))
            for (key, value), grad in zip(seen.items(), grads, strict=True):
                effect = (value.detach() * grad).sum(1).abs().sum(0).double()
                total[key] = total[key] + effect if key in total else effect
            seen.clear()
    finally:
        for handle in handles:
            handle.remove()
    return [_importance(host.read(block), total, i) for i, block in enumerate(blocks)]


def _remember_output(seen: Seen, key: Key) -> Callable[[nn.Module, object, Tensor], None]:
    def listen(_: nn.Module, __: object, output: Tensor) -> None:
        seen[key] = output

    return listen


def _remember_input(seen: Seen, key: Key) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def listen(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen[key] = args[0]

    return listen


def _importance(tensors: Tensors, total: Seen, i: int) -> Importance:
    heads, qk, _ = tensors["q.weight"].shape
    if (i, "qkv") in total:
        q, k, v = total[i, "qkv"].split(
            (heads * qk, heads * qk, heads * tensors["v.weight"].shape[1])
        )
    else:
        q, k, v = (total[i, name] for name in ("q", "k", "v"))
    return Importance(
        qk_dims=(q + k).unflatten(0, (heads, -1)),
        v_dims=v.unflatten(0, (heads, -1)),
        neurons=total[i, "hidden"],
    )
