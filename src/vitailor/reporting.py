"""One HTML page that compares runs. Everything is inside it: no request leaves the reader's machine."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field

from .errors import ArtifactError, PlanError
from .provenance import Provenance
from .shape import BlockShape, Facts, ViTShape
from .training import TrainConfig

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


class Accuracies(Facts):
    """Top-1 before and after, in percent. Intervals are 95%.

    Attributes:
        images: how many both were measured on.
        before_interval, after_interval: of each accuracy.
        difference_interval: of after minus before, paired by image.
        data: what they were measured on, in words.
    """

    after: float
    before: float | None = None
    images: int | None = None
    before_interval: tuple[float, float] | None = None
    after_interval: tuple[float, float] | None = None
    difference_interval: tuple[float, float] | None = None
    data: str = ""


class Run(Facts):
    """One line of a page.

    Attributes:
        name: what the reader calls it, e.g. the folder.
        method: method with the settings that set it apart; runs of equal method share a colour.
        budget: as asked for.
        macs, params: after; `_before` where known.
        shape, dense: sizes after and before, where known.
        accuracy, seconds, peak_memory_mb: None means not measured.
        preprocessing: of the images, in words.
        conditions: what the measurements depend on.
    """

    name: str
    method: str
    budget: str
    macs: int
    params: int
    macs_before: int | None = None
    params_before: int | None = None
    shape: ViTShape | None = None
    dense: ViTShape | None = None
    accuracy: Accuracies | None = None
    seconds: float | None = None
    peak_memory_mb: float | None = None
    preprocessing: str = ""
    conditions: dict[str, Any] = Field(default_factory=dict)


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


# -- reading artifacts ---------------------------------------------------------------------------


def read_run(folder: str | os.PathLike[str]) -> Run:
    """What an artifact says about itself.

    Raises:
        ArtifactError: when the folder is no artifact, or its record is damaged.
    """
    from .artifact import load

    known: Provenance = load(folder).vitailor  # type: ignore[assignment]  # load puts it there
    try:
        return run_of(known, Path(folder).resolve().name)
    except (LookupError, TypeError, ValueError, PlanError) as error:
        why = " ".join(str(error).split())
        raise ArtifactError(
            f"record.json of {folder} is not what vitailor writes: {why}.", "Compress again."
        ) from error


def run_of(known: Provenance, name: str) -> Run:
    """One line of a page, from the record a compressed model carries."""
    record = known.record
    return Run(
        name=name,
        method=" + ".join(_labels(known)) or "dense",
        budget=" + ".join(step.budget for step in known.steps) or "none",
        macs=known.shape.macs,
        params=known.shape.params,
        macs_before=_number(record, "macs", "before"),
        params_before=_number(record, "params", "before"),
        shape=known.shape,
        dense=_shape(record.get("shape_before")),
        accuracy=_accuracies(record),
        seconds=record.get("seconds"),
        peak_memory_mb=record.get("peak_memory_mb"),
        preprocessing=_preprocessing(known),
        conditions=record.get("conditions") or {},
    )


def _labels(known: Provenance) -> list[str]:
    """What was done to a model: its compressions, and a training after them."""
    found = [method_label(step.method, step.settings) for step in known.steps]
    trained = known.record.get("training")
    settings = trained.get("settings") if isinstance(trained, dict) else None
    if isinstance(settings, dict):
        told = _changed(TrainConfig, settings)
        found.append(f"training ({', '.join(told)})" if told else "training")
    return found


def method_label(method: str, settings: dict[str, Any]) -> str:
    """The method, with the settings that are not its defaults."""
    from .methods import METHODS

    config = METHODS.get(method)
    changed = _changed(config, settings) if config is not None else []
    return f"{method} ({', '.join(changed)})" if changed else method


def _changed(config: type[BaseModel], settings: dict[str, Any], prefix: str = "") -> list[str]:
    """`field=value` for what is not the default, with a dot before fields of fields."""
    found = []
    for name, value in settings.items():
        field = config.model_fields.get(name)
        default = field.default if field is not None else value
        if isinstance(default, BaseModel) and isinstance(value, dict):
            found += _changed(type(default), value, f"{prefix}{name}.")
        elif value != default:
            text = value if isinstance(value, str) else json.dumps(value)
            found.append(f"{prefix}{name}={text}")
    return found


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


def _number(record: dict[str, Any], key: str, when: str) -> int | None:
    pair = record.get(key)
    value = pair.get(when) if isinstance(pair, dict) else None
    return value if isinstance(value, int) else None


def _shape(content: Any) -> ViTShape | None:
    return ViTShape.from_json(json.dumps(content)) if isinstance(content, dict) else None


def _accuracies(record: dict[str, Any]) -> Accuracies | None:
    """Accuracies of a record; an interval that is not recorded follows from the number of images."""
    from .evaluation import wilson_interval

    top1 = record.get("top1")
    if not isinstance(top1, dict) or top1.get("after") is None:
        return None
    images = record.get("images") or top1.get("images")

    def interval(percent: float | None) -> tuple[float, float] | None:
        if percent is None or not images:
            return None
        low, high = wilson_interval(round(percent / 100 * images), images)
        return 100 * low, 100 * high

    after, before, ends = top1["after"], top1.get("before"), top1.get("interval")
    return Accuracies(
        after=after,
        before=before,
        images=images,
        before_interval=interval(before),
        after_interval=interval(after),
        difference_interval=(ends[0], ends[1]) if ends else None,
        data=str(record.get("evaluated_on") or ""),
    )


def _preprocessing(known: Provenance) -> str:
    facts = known.preprocessing
    if facts is None:
        return ""
    _, height, width = facts.input_size
    return (
        f"{height}\N{MULTIPLICATION SIGN}{width} px, {facts.interpolation}, crop {facts.crop_pct:g}"
    )


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
