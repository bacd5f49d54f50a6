"""The page: self-contained, honest about what was not measured, safe against what names hold."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

import vitailor as vt
from conftest import build, images
from vitailor.artifact import load, save
from vitailor.errors import ArtifactError
from vitailor.evaluation import wilson_interval
from vitailor.hosts import shape_of
from vitailor.methods import METHODS, VTP
from vitailor.plan import BlockPlan, Plan
from vitailor.reporting import count, report, signed, write_page
from vitailor.runs import Accuracies, Run, method_label, read_run, run_of
from vitailor.surgery import apply
from vitailor.training import TrainConfig

LOADING = ("src", "href", "data", "srcset", "action", "poster", "background", "xlink:href")


class Page(HTMLParser):
    """Tags, attributes that load something, visible text and scripts of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loads: list[tuple[str, str, str | None]] = []
        self.metas: list[dict[str, str | None]] = []
        self.scripts: list[str] = []
        self.styles: list[str] = []
        self.titles: list[str] = []
        self.words: list[str] = []
        self._inside: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [(tag, name, value) for name, value in attrs if name in LOADING]
        if tag == "meta":
            self.metas.append(dict(attrs))
        self._inside.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self._inside and self._inside.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        where = self._inside[-1] if self._inside else ""
        kept = {"script": self.scripts, "style": self.styles, "title": self.titles}
        kept.get(where, self.words).append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


@pytest.fixture
def runs(vit) -> list[Run]:
    dense = shape_of(vit)
    first, *rest = dense.blocks
    small = dense.with_blocks((first.model_copy(update={"mlp_dim": 24}), *rest))
    measured = Accuracies(
        after=90.0,
        before=96.0,
        images=50,
        before_interval=(86.5, 98.9),
        after_interval=(78.6, 95.7),
        difference_interval=(-14.25, 2.5),
        data="digits:test",
    )
    both = {"macs_before": dense.macs, "params_before": dense.params, "dense": dense}
    return [
        Run(
            name="one",
            method="closed-form",
            budget="macs 0.6",
            macs=small.macs,
            params=small.params,
            shape=small,
            accuracy=measured,
            seconds=2.5,
            peak_memory_mb=120.0,
            preprocessing="24x24 px",
            conditions={"hardware": "An abacus", "versions": {"torch": "9.9"}},
            **both,
        ),
        Run(name="two", method="token-merge", budget="macs 0.4", macs=123456, params=7890),
    ]


def page_of(runs: list[Run], folder: Path, **texts: str) -> Page:
    return Page(write_page(runs, folder / "page.html", **texts).read_text("utf-8"))


def test_the_page_loads_nothing(runs, tmp_path):
    page = page_of(runs, tmp_path)
    assert page.loads == []
    assert {"link", "iframe", "object", "embed", "base", "img"}.isdisjoint(page.tags)
    assert not re.search(r"url\(|@import", " ".join(page.styles))
    (policy,) = [
        m["content"] for m in page.metas if m.get("http-equiv") == "Content-Security-Policy"
    ]
    # The browser itself refuses what the page should not do.
    assert policy.startswith("default-src 'none';")
    assert "http" not in policy
    assert "connect-src" not in policy


def test_plotly_is_there_once_and_only_with_a_chart(runs, tmp_path):
    page = page_of(runs, tmp_path)
    assert sum(len(script) > 10**6 for script in page.scripts) == 1
    bare = page_of(runs[1:], tmp_path)
    assert bare.scripts == []
    assert "Accuracy was not measured" in bare.text


def test_figures_stand_beside_their_n_and_interval(runs, tmp_path):
    text = page_of(runs, tmp_path).text
    assert "96.00% 95%: 86.50 to 98.90 n = 50" in text
    assert "90.00% 95%: 78.60 to 95.70 n = 50" in text
    assert "\N{MINUS SIGN}6.00 95%: \N{MINUS SIGN}14.25 to +2.50" in text
    assert "2.5 s peak 120 MiB" in text
    kept = runs[0].macs / runs[0].macs_before
    assert f"{count(runs[0].macs)} {kept:.3f} of before" in text
    for word in ("An abacus", "torch 9.9", "digits:test", "24x24 px"):
        assert word in text


def test_what_was_not_measured_is_said(runs, tmp_path):
    text = page_of(runs[1:], tmp_path).text
    assert text.count("not measured") >= 4  # before, after, difference, time
    assert "before not recorded" in text
    assert "Sizes were not recorded" in text
    assert "preprocessing not recorded" in text


def test_an_accuracy_without_its_interval_says_so(runs, tmp_path):
    bare = Accuracies(after=90.0)
    text = page_of([runs[0].model_copy(update={"accuracy": bare})], tmp_path).text
    assert "90.00% interval not recorded n not recorded" in text


def test_bars_show_every_block_of_every_dimension(runs, tmp_path):
    page = page_of(runs[:1], tmp_path)
    depth, text = runs[0].shape.depth, page.text
    for label in ("heads", "QK dim", "V dim", "MLP dim", "tokens out"):
        assert label in text
    titles = page.titles[1:]
    assert len(titles) == 5 * depth
    assert "block 0: 24 of 64" in titles
    assert "block 1: 64 of 64" in titles


def test_the_chart_has_points_and_error_bars(runs, tmp_path):
    page = page_of(runs, tmp_path)
    (script,) = [s for s in page.scripts if "var figure" in s]
    figure = json.loads(re.search(r"var figure = (\{.*\});", script)[1])
    dense, closed_form = figure["data"]
    assert dense["x"] == [runs[0].macs_before]
    assert dense["y"] == [96.0]
    assert closed_form["x"] == [runs[0].macs]
    assert closed_form["error_y"]["array"] == pytest.approx([5.7])
    assert closed_form["error_y"]["arrayminus"] == pytest.approx([11.4])


def test_names_cannot_break_the_page(runs, tmp_path):
    nasty = "</script><img src=x onerror=alert(1)>{{ 7*7 }}"
    run = runs[0].model_copy(update={"name": nasty, "method": nasty, "budget": nasty})
    plain = page_of([runs[0]], tmp_path, title="t", intro="i")
    page = page_of([run], tmp_path, title=nasty, intro=nasty)
    assert page.tags == plain.tags
    assert nasty in page.text


def test_a_failed_write_leaves_the_old_page(runs, tmp_path, monkeypatch):
    target = tmp_path / "page.html"
    target.write_text("old", "utf-8")

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space"):
        write_page(runs, target)
    monkeypatch.undo()
    assert target.read_text("utf-8") == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_report_of_artifacts(vit, tmp_path):
    save(vit, tmp_path / "run-a")
    written = report([tmp_path / "run-a"], tmp_path / "deep" / "report.html")
    assert written == tmp_path / "deep" / "report.html"
    text = Page(written.read_text("utf-8")).text
    assert "run-a" in text
    assert count(shape_of(vit).macs) in text
    assert "not measured" in text


def test_report_refuses_what_is_no_artifact(tmp_path):
    with pytest.raises(ArtifactError, match="no runs"):
        report([], tmp_path / "r.html")
    with pytest.raises(ArtifactError, match="nowhere"):
        report([tmp_path / "nowhere"], tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()


@pytest.mark.parametrize(
    "record",
    [
        {"top1": {"after": "high"}},
        {"top1": {"after": 90.0, "interval": [1]}},
        {"seconds": "many"},
        {"shape_before": {"depth": 3}},
    ],
)
def test_a_damaged_record_is_named(vit, tmp_path, record):
    save(vit, tmp_path / "a")
    (tmp_path / "a" / "record.json").write_text(json.dumps(record), "utf-8")
    with pytest.raises(ArtifactError, match=r"record\.json of .*a is not what"):
        report([tmp_path / "a"], tmp_path / "r.html")


def test_run_of_a_record(vit, tmp_path):
    save(vit, tmp_path / "a")
    known = load(tmp_path / "a").vitailor
    record = {
        "macs": {"before": 1000, "after": 600},
        "params": {"before": 50, "after": 40},
        "top1": {"before": 96.0, "after": 90.0, "interval": [-14.0, 2.0]},
        "images": 50,
        "seconds": 3.5,
        "shape_before": json.loads(shape_of(vit).to_json()),
    }
    run = run_of(known.model_copy(update={"record": record}), "a")
    assert run.macs_before == 1000
    assert run.params_before == 50
    assert run.dense == shape_of(vit)
    assert run.seconds == 3.5
    assert run.accuracy.difference_interval == (-14.0, 2.0)
    low, high = wilson_interval(45, 50)
    assert run.accuracy.after_interval == pytest.approx((100 * low, 100 * high))


def test_settings_that_are_not_defaults_name_a_run():
    training = TrainConfig(epochs=2, gate_lr=0.01)
    settings = VTP(l1=0.5, training=training).model_dump(mode="json")
    label = "vtp (l1=0.5, training.epochs=2, training.gate_lr=0.01)"
    assert method_label("vtp", settings) == label
    assert method_label("of another version", settings) == "of another version"


@pytest.mark.parametrize(("name", "method"), METHODS.items())
def test_defaults_are_not_told(name, method):
    assert method_label(name, json.loads(method().model_dump_json())) == name


def test_a_trained_model_says_so_and_shows_what_it_reads(tmp_path):
    model = build()
    plan = Plan(blocks=(BlockPlan(mlp_features=tuple(range(12))), BlockPlan()))
    small = apply(model, plan)
    data = [(images(model, 8), torch.arange(8) % 5)]
    config = TrainConfig(epochs=1, batch_size=8, hflip=0.0)
    run = read_run(vt.save(vt.train(small, data, config, val=data), tmp_path / "trained"))
    assert run.method == "training (epochs=1, batch_size=8, hflip=0.0)"
    assert run.accuracy is not None
    assert (run.accuracy.before, run.accuracy.images) == (None, 8)
    text = page_of([run], tmp_path).text
    assert "MLP reads" in text
    assert "attention reads" not in text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (999, "999"),
        (1000, "1.00k"),
        (12345, "12.3k"),
        (999_499, "999k"),
        (999_700, "1.00M"),
        (5_717_416, "5.72M"),
        (99_960_000, "100M"),
        (1_258_000_000, "1.26G"),
        (17_580_000_000, "17.6G"),
    ],
)
def test_counts_in_words(value, text):
    assert count(value) == text


def test_signed_numbers():
    assert [signed(v) for v in (1.5, -0.25, 0.0)] == ["+1.50", "\N{MINUS SIGN}0.25", "+0.00"]
