"""One HTML page that compares runs. Everything is inside it: no request leaves the reader's machine."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .errors import ArtifactError
from .runs import Accuracies, Run, read_run
from .shape import BlockShape, ViTShape

#: Colours that also people with colour vision deficiencies tell apart (after Okabe and Ito).
COLOURS = ("#2f7fd1", "#e0641b", "#1a9e77", "#b65fb0", "#c99700", "#4aa8c9", "#8a7a66", "#d1495b")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "star", "hexagon", "x")
DIMENSIONS = (
    ("num_heads", "heads"),
    ("qk_dim", "QK dim"),
    ("v_dim", "V dim"),
    ("mlp_dim", "MLP dim"),
    ("num_tokens_out", "tokens out"),
)
#: Features that projections read, shown where any reads fewer than there are.
READS = {"attn_features": "attention reads", "mlp_features": "MLP reads"}


def report(runs: Sequence[str | os.PathLike[str]], path: str | os.PathLike[str]) -> Path:
    """Write a page that compares artifacts.

    Args:
        runs: artifact folders.
        path: the HTML file, which is replaced when the page is complete.

    Returns:
        the file.

    Raises:
        ArtifactError: when a folder is no artifact, or there are none.
    """
    if not runs:
        raise ArtifactError("There are no runs to compare.", "Name at least one artifact folder.")
    return write_page([read_run(folder) for folder in runs], path)


def write_page(
    runs: Sequence[Run],
    path: str | os.PathLike[str],
    *,
    title: str = "Compressed Vision Transformers",
    intro: str = "",
) -> Path:
    """Write the page of these runs; the old file stays until the new one is complete.

    Args:
        runs: what to show, in this order.
        path: the HTML file. Missing folders are made.
        title, intro: heading, and a paragraph below it.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from plotly.offline import get_plotlyjs

    environment = Environment(
        loader=PackageLoader("vitailor", "templates"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=True,
    )
    environment.filters |= {"count": count, "signed": signed, "short": _short}
    methods = list(dict.fromkeys(run.method for run in runs))
    figure = _scatter(runs, methods)
    text = environment.get_template("report.html.j2").render(
        title=title,
        intro=intro,
        runs=[_view(run, methods) for run in runs],
        legend=[
            (method, COLOURS[i % len(COLOURS)])
            for i, method in enumerate(methods)
            if any(run.accuracy is not None for run in runs if run.method == method)
        ],
        dense_known=any(
            run.accuracy is not None and run.accuracy.before is not None for run in runs
        ),
        figure=_inline_json(figure) if figure else None,
        plotly=get_plotlyjs() if figure else "",
        conditions=_conditions(runs),
    )
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        draft.write_text(text, encoding="utf-8")
        draft.replace(target)
    finally:
        draft.unlink(missing_ok=True)
    return target


# -- numbers and words ---------------------------------------------------------------------------


def count(value: int | float) -> str:
    """Three significant digits with a suffix: 1.26G, 5.72M, 860k."""
    for size, suffix in ((10**12, "T"), (10**9, "G"), (10**6, "M"), (10**3, "k")):
        # 999,700 is 1.00M, not 1000k.
        if value >= size * 0.9995:
            scaled = value / size
            digits = 2 if scaled < 9.995 else 1 if scaled < 99.95 else 0
            return f"{scaled:.{digits}f}{suffix}"
    return str(round(value))


def signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "\N{MINUS SIGN}")


def _short(value: float) -> str:
    """At most one decimal: 173.3, 64."""
    return f"{value:.1f}".removesuffix(".0")


# -- the page ------------------------------------------------------------------------------------


def _view(run: Run, methods: list[str]) -> dict[str, Any]:
    """A run as the template wants it."""
    return {
        "facts": run,
        "colour": COLOURS[methods.index(run.method) % len(COLOURS)],
        "macs_kept": run.macs / run.macs_before if run.macs_before else None,
        "params_kept": run.params / run.params_before if run.params_before else None,
        "panels": _panels(run.shape, run.dense) if run.shape is not None else [],
    }


def _panels(shape: ViTShape, dense: ViTShape | None) -> list[dict[str, Any]]:
    """One bar chart for each dimension: a bar a block, heights as fractions of the tallest."""
    before: Sequence[BlockShape | None] = (
        dense.blocks if dense is not None else [None] * shape.depth
    )
    panels = []
    reads = [field for field in READS if any(getattr(b, field) is not None for b in shape.blocks)]
    for field, label in (*DIMENSIONS, *((field, READS[field]) for field in reads)):
        pairs = [
            (_size(shape, new, field), _size(shape, old, field) if old is not None else None)
            for new, old in zip(shape.blocks, before, strict=True)
        ]
        panels.append(_panel(label, pairs))
    for field in type(shape.blocks[0].ranks).model_fields:
        ranks = [getattr(block.ranks, field) for block in shape.blocks]
        if any(rank is not None for rank in ranks):
            panels.append(_panel(f"rank of {field}", [(rank or 0, None) for rank in ranks]))
    return panels


def _size(shape: ViTShape, block: BlockShape, field: str) -> int:
    """A size of a block; what reads all features reads as many as the model is wide."""
    size: int | None = getattr(block, field)
    return shape.embed_dim if size is None else size


def _panel(label: str, pairs: list[tuple[int, int | None]]) -> dict[str, Any]:
    tallest = max(max(new, old or 0) for new, old in pairs) or 1
    width = 100 / len(pairs)
    known = [old for _, old in pairs if old is not None]
    return {
        "label": label,
        "changed": [new for new, _ in pairs] != known,
        "mean": sum(new for new, _ in pairs) / len(pairs),
        "mean_before": sum(known) / len(known) if known else None,
        "bars": [
            {
                "x": round(i * width + 0.12 * width, 3),
                "width": round(0.76 * width, 3),
                "height": round(48 * new / tallest, 3),
                "dense": round(48 * old / tallest, 3) if old is not None else None,
                "title": f"block {i}: {new}" + (f" of {old}" if old is not None else ""),
            }
            for i, (new, old) in enumerate(pairs)
        ],
    }


def _scatter(runs: Sequence[Run], methods: list[str]) -> dict[str, Any] | None:
    """Accuracy against MACs as a plotly figure; None when no accuracy was measured."""
    measured = [run for run in runs if run.accuracy is not None]
    if not measured:
        return None
    dense: dict[tuple[int, float], Run] = {}
    for run in measured:
        if run.macs_before is not None and run.accuracy and run.accuracy.before is not None:
            dense.setdefault((run.macs_before, run.accuracy.before), run)
    traces = []
    if dense:
        points = [
            (
                macs,
                top1,
                run.accuracy.before_interval,
                _hover("dense", macs, top1, run.accuracy, True),
            )
            for (macs, top1), run in dense.items()
            if run.accuracy is not None
        ]
        traces.append(_trace("dense", points, "dense", "star", "markers"))
    for i, method in enumerate(methods):
        points = sorted(
            (
                run.macs,
                run.accuracy.after,
                run.accuracy.after_interval,
                _hover(f"{run.name}: {method}", run.macs, run.accuracy.after, run.accuracy, False),
            )
            for run in measured
            if run.method == method and run.accuracy is not None
        )
        if points:
            colour, symbol = COLOURS[i % len(COLOURS)], SYMBOLS[i % len(SYMBOLS)]
            traces.append(_trace(method, points, colour, symbol, "lines+markers"))
    return {"data": traces}


def _trace(
    name: str,
    points: list[tuple[int, float, tuple[float, float] | None, str]],
    colour: str,
    symbol: str,
    mode: str,
) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": mode,
        "name": name,
        "x": [macs for macs, _, _, _ in points],
        "y": [top1 for _, top1, _, _ in points],
        "text": [text for _, _, _, text in points],
        "hovertemplate": "%{text}<extra></extra>",
        "line": {"width": 1.5, "color": colour},
        "marker": {"size": 13 if symbol == "star" else 9, "symbol": symbol, "color": colour},
        "error_y": {
            "type": "data",
            "symmetric": False,
            "array": [ends[1] - top1 if ends else None for _, top1, ends, _ in points],
            "arrayminus": [top1 - ends[0] if ends else None for _, top1, ends, _ in points],
            "thickness": 1.2,
            "width": 4,
            "color": colour,
        },
    }


def _hover(name: str, macs: int, top1: float, found: Accuracies, before: bool) -> str:
    """Escaped twice over: plotly reads a few tags in it."""
    from html import escape

    ends = found.before_interval if before else found.after_interval
    lines = [escape(name), f"{count(macs)} MACs", f"top-1 {top1:.2f}%"]
    if ends:
        lines.append(f"95% interval {ends[0]:.2f} to {ends[1]:.2f}")
    lines.append(f"n = {found.images:,}" if found.images else "number of images not recorded")
    return "<br>".join(lines)


def _conditions(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """What the figures depend on, once for all runs that share it."""
    groups: dict[str, dict[str, Any]] = {}
    for run in runs:
        facts = {name: _words(value) for name, value in run.conditions.items() if value is not None}
        if run.accuracy is not None and run.accuracy.data:
            facts["accuracy measured on"] = run.accuracy.data
        if run.preprocessing:
            facts["preprocessing"] = run.preprocessing
        key = json.dumps(facts, sort_keys=True)
        groups.setdefault(key, {"facts": facts, "runs": []})["runs"].append(run.name)
    return [group for group in groups.values() if group["facts"]]


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_words(part)}" for name, part in value.items())
    if isinstance(value, list):
        return ", ".join(_words(part) for part in value)
    return str(value)


def _inline_json(content: Any) -> str:
    """JSON that may stand inside a script element whatever it holds."""
    text = json.dumps(content, allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
