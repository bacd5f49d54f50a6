"""The model card of an artifact."""

from __future__ import annotations

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from .. import __version__
from ..provenance import Provenance
from ..shape import Ranks


def model_card(known: Provenance) -> str:
    """README.md of an artifact: what it is, what it costs, how to load it, what was measured.

    Figures of the dense origin and accuracies are shown where `known.record` has them under the keys
    that `vitailor compress --json` prints: `macs`, `params` and `top1`, each with `before` and `after`;
    `evaluated_on` and `images` say on what they were measured.
    """
    shape, record = known.shape, known.record
    environment = Environment(
        loader=PackageLoader("vitailor", "templates"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # Markdown, and the values are the writer's own
    )
    rows = [
        {
            "sizes": block,
            "ranks": ", ".join(
                f"{name} {rank}"
                for name in Ranks.model_fields
                if (rank := getattr(block.ranks, name)) is not None
            ),
            "params": shape.block_param_count(i),
            "macs": shape.block_macs(i),
        }
        for i, block in enumerate(shape.blocks)
    ]
    return environment.get_template("model_card.md.j2").render(
        name=shape.name or "Vision Transformer",
        shape=shape,
        rows=rows,
        before={key: _before(record, key) for key in ("macs", "params")},
        accuracy=_accuracy(record.get("top1")),
        measured_on=_measured_on(record),
        steps=known.steps,
        training=_training(record.get("training")),
        preprocessing=known.preprocessing,
        version=__version__,
    )


def _training(facts: Any) -> dict[str, Any] | None:
    """How a model was trained after its compressions, where that is known."""
    names = ("epochs", "images", "source")
    known = isinstance(facts, dict) and all(name in facts for name in names)
    return {name: facts[name] for name in names} if known else None


def _before(record: dict[str, Any], key: str) -> int | None:
    pair = record.get(key)
    value = pair.get("before") if isinstance(pair, dict) else None
    return value if isinstance(value, int) else None


def _accuracy(top1: Any) -> dict[str, Any] | None:
    """`top1` of a record: a number, or before, after and the interval of the difference."""
    found = top1 if isinstance(top1, dict) else {"after": top1}
    if not _is_number(found.get("after")):
        return None
    interval = found.get("interval")
    paired = isinstance(interval, list | tuple) and len(interval) == 2
    return {
        "after": found["after"],
        "before": found["before"] if _is_number(found.get("before")) else None,
        "interval": interval if paired and all(map(_is_number, interval or ())) else None,
    }


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _measured_on(record: dict[str, Any]) -> str:
    data, images = record.get("evaluated_on"), record.get("images")
    if not isinstance(data, str):
        return ""
    return f"{data} ({images:,} images)" if isinstance(images, int) else data
