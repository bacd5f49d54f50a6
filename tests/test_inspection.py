"""What `inspect` tells, for JSON and for people."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console
from torch import nn

import vitailor as vt
from conftest import block, build, shape
from vitailor import inspection, surgery
from vitailor.errors import UnsupportedModelError
from vitailor.hosts import shape_of
from vitailor.plan import BlockPlan, Plan
from vitailor.shape import Ranks

PLAN = Plan(blocks=(BlockPlan(heads=(0,), num_tokens_out=6), BlockPlan(ranks=Ranks(q=3, fc2=5))))


def test_keys_are_exactly_the_promised_ones():
    model = surgery.apply(build(), PLAN)
    found = json.loads(json.dumps(inspection.inspect(model)))
    assert list(found) == ["macs", "params", "embed_dim", "num_prefix_tokens", "blocks"]
    dense = dict.fromkeys(("q", "k", "v", "out", "fc1", "fc2"))
    assert found["blocks"] == [
        {
            "num_heads": 1,
            "qk_dim": 8,
            "v_dim": 8,
            "mlp_dim": 64,
            "ranks": dense,
            "num_tokens_in": 10,
            "num_tokens_out": 6,
        },
        {
            "num_heads": 2,
            "qk_dim": 8,
            "v_dim": 8,
            "mlp_dim": 64,
            "ranks": dense | {"q": 3, "fc2": 5},
            "num_tokens_in": 6,
            "num_tokens_out": 6,
        },
    ]
    assert found["macs"] == shape_of(model).macs
    assert found["params"] == sum(p.numel() for p in model.parameters())
    assert (found["embed_dim"], found["num_prefix_tokens"]) == (16, 1)


def test_a_shape_is_as_good_as_its_model():
    model = build()
    assert inspection.inspect(shape_of(model)) == inspection.inspect(model)


def drawn(table: object) -> str:
    output = io.StringIO()
    Console(file=output, width=120).print(table)
    return output.getvalue()


def test_table_shows_every_block_and_sums_up():
    one = shape(
        block(num_tokens_out=6),
        block(num_tokens_in=6, num_tokens_out=6, ranks=Ranks(q=3, fc2=5)),
        name="small",
    )
    table = inspection.table(one)
    text = drawn(table)
    assert table.row_count == 4
    for part in ("small", "width 16", "5 outputs", "10 > 6", "q 3 fc2 5", "dense"):
        assert part in text
    for number in (
        one.params,
        one.macs,
        one.outer_macs,
        one.block_macs(0),
        one.block_param_count(1),
    ):
        assert f"{number:,}" in text
    params = [int(cell.replace(",", "")) for cell in table.columns[-2].cells]
    macs = [int(cell.replace(",", "")) for cell in table.columns[-1].cells]
    assert sum(params[:-1]) == params[-1] == one.params
    assert sum(macs[:-1]) == macs[-1] == one.macs


def test_what_was_saved_remembers_its_name(tmp_path):
    small = vt.compress(build(), vt.TokenMerge(), vt.Budget(macs=0.8))
    vt.save(small, tmp_path / "small")
    assert "vit_tiny_patch16_224: width 16" in drawn(inspection.table(vt.load(tmp_path / "small")))


def test_unknown_models_are_refused():
    for function in (inspection.inspect, inspection.table):
        with pytest.raises(UnsupportedModelError):
            function(nn.Linear(1, 1))


def test_selections_of_features_are_told_where_there_are_any():
    plan = Plan(blocks=(BlockPlan(mlp_features=tuple(range(12))), BlockPlan()))
    cut = surgery.apply(build(), plan)
    found = inspection.inspect(cut)["blocks"]
    assert [(b["attn_features"], b["mlp_features"]) for b in found] == [(None, 12), (None, None)]
    text = drawn(inspection.table(cut))
    assert "16, 12" in text
    assert "reads" in text
    assert "reads" not in drawn(inspection.table(build()))
