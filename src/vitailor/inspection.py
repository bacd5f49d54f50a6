"""What a model is made of and what each part costs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from .hosts import shape_of
from .provenance import provenance_of
from .shape import Ranks, ViTShape

if TYPE_CHECKING:
    from rich.table import Table

CAPTION = "QK and V dims are per head; MACs are for one image"
FIELDS = ("num_heads", "qk_dim", "v_dim", "mlp_dim", "ranks", "num_tokens_in", "num_tokens_out")
#: Told of where any block reads fewer features than there are.
READS = ("attn_features", "mlp_features")


def inspect(model_or_shape: nn.Module | ViTShape) -> dict[str, Any]:
    """Sizes and cost of a model, ready for JSON.

    Returns:
        `macs` (multiply-adds for one image), `params`, `embed_dim`, `num_prefix_tokens`, and for each of
        `blocks` its `num_heads`, `qk_dim` and `v_dim` per head, `mlp_dim`, `ranks` by projection (None
        is dense), `num_tokens_in`, `num_tokens_out`; where any block reads a selection of the features,
        also how many its attention and its MLP read (`attn_features`, `mlp_features`; None is all).

    Raises:
        UnsupportedModelError: naming the module that cannot be accounted for.
    """
    shape = _shape(model_or_shape)
    blocks = []
    for block in shape.blocks:
        facts = block.model_dump()
        blocks.append(
            {name: facts[name] for name in (*FIELDS, *(READS if _selects(shape) else ()))}
        )
    return {
        "macs": shape.macs,
        "params": shape.params,
        "embed_dim": shape.embed_dim,
        "num_prefix_tokens": shape.num_prefix_tokens,
        "blocks": blocks,
    }


def table(model_or_shape: nn.Module | ViTShape) -> Table:
    """The same for people: a row for each block, one for what is around them, and the totals."""
    from rich.table import Table

    shape = _shape(model_or_shape)
    reads = _selects(shape)
    name = shape.name or _recorded_name(model_or_shape) or "model"
    title = f"{name}: width {shape.embed_dim}, {shape.num_classes:,} outputs"
    view = Table(
        title=title, caption=CAPTION + "; reads: features that attention and MLP read" * reads
    )
    names = (
        "block",
        "heads",
        "QK dim",
        "V dim",
        "MLP dim",
        *(["reads"] if reads else []),
        "tokens",
    )
    for name in names:
        view.add_column(name, justify="right")
    view.add_column("ranks")
    for name in ("params", "MACs"):
        view.add_column(name, justify="right")
    for i, b in enumerate(shape.blocks):
        merges = b.num_tokens_out < b.num_tokens_in
        tokens = f"{b.num_tokens_in} > {b.num_tokens_out}" if merges else f"{b.num_tokens_in}"
        tokens += " fused" if b.fuses else ""
        read = [f"{b.attn_features or shape.embed_dim}, {b.mlp_features or shape.embed_dim}"]
        widths = (b.num_heads, b.qk_dim, b.v_dim, b.mlp_dim, *(read if reads else []))
        sizes = (i, *widths, tokens, _ranks(b.ranks))
        costs = (f"{shape.block_param_count(i):,}", f"{shape.block_macs(i):,}")
        view.add_row(*map(str, sizes), *costs)
    view.add_section()
    empty = [""] * len(names)
    view.add_row("rest", *empty, f"{shape.outer_params:,}", f"{shape.outer_macs:,}")
    view.add_row("total", *empty, f"{shape.params:,}", f"{shape.macs:,}", style="bold")
    return view


def _recorded_name(model_or_shape: nn.Module | ViTShape) -> str:
    """What a model that was saved remembers of its name."""
    known = None if isinstance(model_or_shape, ViTShape) else provenance_of(model_or_shape)
    return "" if known is None else known.shape.name


def _selects(shape: ViTShape) -> bool:
    return any(getattr(block, name) is not None for block in shape.blocks for name in READS)


def _ranks(ranks: Ranks) -> str:
    factored = {name: rank for name, rank in ranks.model_dump().items() if rank is not None}
    return " ".join(f"{name} {rank}" for name, rank in factored.items()) or "dense"


def _shape(model_or_shape: nn.Module | ViTShape) -> ViTShape:
    return model_or_shape if isinstance(model_or_shape, ViTShape) else shape_of(model_or_shape)
