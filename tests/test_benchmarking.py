"""Timing: rows and figures, pairing, what is left as it was."""

from __future__ import annotations

import json
import random

import pytest
import torch
from torch import Tensor, nn

import vitailor.benchmarking
from vitailor.benchmarking import BenchResult, bench, paired_speedup
from vitailor.errors import UnsupportedModelError, UsageError
from vitailor.hosts import shape_of

KEYS = [
    "model",
    "batch_size",
    "dtype",
    "threads",
    "runtime",
    "macs",
    "params",
    "latency_ms",
    "images_per_s",
    "peak_memory_mb",
    "speedup",
    "mac_ratio",
]


class Stub(nn.Module):
    """A model of another kind, which takes images of 8 pixels."""

    image_size = 8

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3 * 8 * 8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.flatten(1))


class Hungry(Stub):
    """Takes 64 MiB on top of its weights."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.ones(2**24)[0]


class Clock:
    """A clock that the models themselves advance: no test depends on the machine's speed."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[str] = []

    def perf_counter(self) -> float:
        return self.now


class Timed(Stub):
    def __init__(self, clock: Clock, name: str, *seconds: float) -> None:
        super().__init__()
        self.clock, self.name, self.seconds = clock, name, seconds
        self.calls = 0

    def __deepcopy__(self, memo: dict[int, object]) -> Timed:
        return self

    def forward(self, x: Tensor) -> Tensor:
        self.clock.now += self.seconds[self.calls % len(self.seconds)]
        self.clock.log.append(self.name)
        self.calls += 1
        return super().forward(x)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(vitailor.benchmarking.time, "perf_counter", found.perf_counter)
    # The runs that are not timed would count as well.
    monkeypatch.setattr(vitailor.benchmarking, "_try", lambda *_: None)
    monkeypatch.setattr(vitailor.benchmarking, "_peak_memory", lambda *_: None)
    monkeypatch.setattr(vitailor.benchmarking, "_macs", lambda *_: 1)
    return found


def test_rows_and_their_figures(make_vit):
    large, small = make_vit(depth=4), make_vit()
    result = bench([("large", large), ("small", small)], batch_sizes=(1, 3), runs=2, warmup=0)
    content = json.loads(result.to_json())
    assert set(content) == {"models", "conditions"}
    rows = content["models"]
    assert [(r["model"], r["batch_size"]) for r in rows] == [
        ("large", 1),
        ("small", 1),
        ("large", 3),
        ("small", 3),
    ]
    for row in rows:
        assert list(row) == KEYS
        assert set(row["latency_ms"]) == {"median", "iqr"}
        model = large if row["model"] == "large" else small
        assert row["macs"] == shape_of(model).macs
        assert row["params"] == sum(p.numel() for p in model.parameters())
        assert row["runtime"] == "pytorch-eager"
        assert row["dtype"] == "float32"
        rate = row["batch_size"] / row["latency_ms"]["median"] * 1000
        assert row["images_per_s"] == pytest.approx(rate)
    assert rows[0]["speedup"] == rows[0]["mac_ratio"] == 1
    assert rows[1]["mac_ratio"] == pytest.approx(rows[0]["macs"] / rows[1]["macs"])
    assert {"hardware", "versions", "date", "device"} <= set(content["conditions"])
    assert content["conditions"]["versions"]["torch"] == torch.__version__.split("+")[0]
    assert BenchResult.from_json(result.to_json()) == result


def test_models_take_turns_and_warm_up_does_not_count(clock):
    a, b = Timed(clock, "a", 9.0, 0.004), Timed(clock, "b", 9.0, 0.001)
    result = bench([("a", a), ("b", b)], batch_sizes=(2,), runs=1, warmup=1)
    assert clock.log == ["a", "b", "a", "b"]
    assert [r.latency_ms.median for r in result.models] == pytest.approx([4.0, 1.0])
    assert result.models[1].speedup == pytest.approx(4.0)
    assert result.models[1].images_per_s == pytest.approx(2000)


def test_spread_of_latency(clock):
    a = Timed(clock, "a", 0.001, 0.002, 0.003, 0.004, 0.005)
    (row,) = bench([("a", a)], batch_sizes=(1,), runs=5, warmup=0).models
    assert row.latency_ms.median == pytest.approx(3.0)
    assert row.latency_ms.iqr == pytest.approx(2.0)


def test_a_slow_spell_cancels_in_paired_speedups():
    slow = [1.0, 5.0, 1.0, 7.0, 1.0, 9.0, 5.0]
    assert paired_speedup([2 * s for s in slow], slow) == 2
    # Medians of each alone would be misled by noise that hits whole rounds and is shared.
    noisy = [s * random.Random(i).uniform(0.99, 1.01) for i, s in enumerate(slow)]
    assert paired_speedup(noisy, slow) == pytest.approx(1, abs=0.01)


def test_nothing_given_is_changed(vit):
    vit.train()
    vit.blocks[0].eval()
    flags = [m.training for m in vit.modules()]
    tensors = {n: t.clone() for n, t in vit.state_dict().items()}
    threads, random_state = torch.get_num_threads(), torch.get_rng_state()
    result = bench([("a", vit)], batch_sizes=(1,), dtype="bfloat16", threads=2, runs=1, warmup=0)
    assert result.models[0].threads == 2
    assert result.models[0].dtype == "bfloat16"
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [m.training for m in vit.modules()] == flags
    for name, tensor in vit.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, tensors[name])


def test_threads_are_restored_after_a_failure(vit):
    threads = torch.get_num_threads()

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bench([("a", vit)], threads=threads + 1, runs=1, progress=stop)
    assert torch.get_num_threads() == threads


def test_a_model_of_another_kind_is_counted_while_it_runs():
    (row,) = bench([("stub", Stub())], batch_sizes=(1,), runs=1, warmup=0).models
    assert row.macs == 3 * 8 * 8 * 4


def test_memory_of_a_forward_pass_on_the_cpu():
    plain, hungry = bench(
        [("plain", Stub()), ("hungry", Hungry())], batch_sizes=(1,), runs=1, warmup=0
    ).models
    if plain.peak_memory_mb is None:
        pytest.skip("this system does not tell the peak")
    assert hungry.peak_memory_mb == pytest.approx(64, abs=4)
    assert plain.peak_memory_mb < 4


def test_memory_that_cannot_be_measured_is_none(monkeypatch):
    monkeypatch.setattr(vitailor.benchmarking, "_reset_high_water_mark", lambda: False)
    (row,) = bench([("stub", Stub())], batch_sizes=(1,), runs=1, warmup=0).models
    assert row.peak_memory_mb is None
    assert json.loads(row.to_json())["peak_memory_mb"] is None


def test_progress_counts_rounds(vit):
    seen = []
    bench(
        [("a", vit)],
        batch_sizes=(1, 2),
        runs=2,
        warmup=1,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(i, 6) for i in range(1, 7)]


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"batch_sizes": ()}, "Batch sizes"),
        ({"batch_sizes": (1, 0)}, "Batch sizes"),
        ({"dtype": "int8"}, "int8"),
        ({"threads": 0}, "0 threads"),
        ({"runs": 0}, "0 runs"),
        ({"warmup": -1}, "-1 warm-up"),
        ({"device": "cuda:77"}, "cuda:77"),
        ({"device": "abacus"}, "abacus"),
    ],
)
def test_settings_out_of_range(vit, settings, named):
    with pytest.raises(UsageError, match=named) as caught:
        bench([("a", vit)], **settings)
    assert caught.value.fix


def test_no_models():
    with pytest.raises(UsageError, match="no models"):
        bench([])


def test_a_model_that_does_not_run_is_named():
    class Broken(Stub):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("shapes\ndo not fit")

    with pytest.raises(UnsupportedModelError, match=r"broken does not run .*: shapes do not fit"):
        bench([("broken", Broken())], runs=1)
