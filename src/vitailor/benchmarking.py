"""Latency, throughput and memory of several models, timed in turns so that noise hits all of them alike."""

from __future__ import annotations

import copy
import ctypes
import gc
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from . import __version__
from .errors import UnsupportedModelError, UsageError
from .hosts import shape_of
from .preprocessing import resolve_preprocessing
from .shape import Facts

DType = Literal["float32", "float16", "bfloat16"]
Progress = Callable[[int, int], None]
MIB = 2**20


class Latency(Facts):
    """Time of one forward pass of a whole batch, in milliseconds: median and interquartile range."""

    median: float
    iqr: float


class BenchRow(Facts):
    """One model at one batch size.

    Attributes:
        runtime: what ran the model, e.g. "pytorch-eager".
        macs: multiply-adds for one image.
        images_per_s: batch size over median latency.
        peak_memory_mb: weights plus the most that one forward pass takes on top, in MiB; None where the
            system cannot tell.
        speedup: median over rounds of (first model's time / this model's time) in the same round.
        mac_ratio: the first model's MACs over this model's: what the speed-up would be if time were MACs.
    """

    model: str
    batch_size: int
    dtype: DType
    threads: int
    runtime: str
    macs: int
    params: int
    latency_ms: Latency
    images_per_s: float
    peak_memory_mb: float | None
    speedup: float
    mac_ratio: float


class BenchResult(Facts):
    """Rows, one for each combination, and the conditions they were measured under."""

    models: tuple[BenchRow, ...]
    conditions: dict[str, Any]


def bench(
    models: Sequence[tuple[str, nn.Module]],
    *,
    batch_sizes: Sequence[int] = (1, 8),
    dtype: str = "float32",
    threads: int | None = None,
    device: str | torch.device | None = None,
    runs: int = 30,
    warmup: int = 3,
    seed: int = 0,
    progress: Progress | None = None,
) -> BenchResult:
    """Time models against the first of them.

    For each batch size the models run in turns (A, B, C, A, B, C, ...), each on random images of its own
    input size. The models given, the thread count and the random state are afterwards as before.

    Args:
        models: names and models; the first is the reference.
        batch_sizes: images at a time.
        dtype: precision of weights and images: float32, float16 or bfloat16.
        threads: CPU threads; None leaves torch's number.
        device: where to run; None means where the first model is.
        runs: rounds that count. warmup: rounds before them that do not.
        progress: called with the rounds done and their total.

    Raises:
        UsageError: when an argument is out of range or the device does not exist.
        UnsupportedModelError: when a model does not run on images of its input size.
    """
    if not models:
        raise UsageError("There are no models to time.", "Give at least one.")
    check_settings(batch_sizes, dtype, threads, runs, warmup)
    target = _device(device, models[0][1])
    total, done = len(batch_sizes) * (runs + warmup), 0
    rows: list[BenchRow] = []
    with (
        _threads(threads),
        torch.random.fork_rng(devices=[target] if target.type == "cuda" else []),
    ):
        ready = [(name, _prepare(model, target, dtype)) for name, model in models]
        sizes = [resolve_preprocessing(model).input_size for _, model in models]
        for (name, model), size in zip(ready, sizes, strict=True):
            _try(name, model, torch.zeros(1, *size).to(target, getattr(torch, dtype)))
        macs = [_macs(model, size) for (_, model), size in zip(models, sizes, strict=True)]
        for batch in batch_sizes:
            generator = torch.Generator().manual_seed(seed)
            images = [
                torch.randn(batch, *size, generator=generator).to(target, getattr(torch, dtype))
                for size in sizes
            ]
            pairs = [(model, x) for (_, model), x in zip(ready, images, strict=True)]
            for (name, model), x in zip(ready, images, strict=True):
                _try(name, model, x)
            memory = [_peak_memory(model, x) for model, x in pairs]
            times: list[list[float]] = [[] for _ in pairs]
            with _no_gc():
                for turn in range(warmup + runs):
                    for taken, (model, x) in zip(times, pairs, strict=True):
                        seconds = _time(model, x)
                        if turn >= warmup:
                            taken.append(seconds)
                    done += 1
                    if progress is not None:
                        progress(done, total)
            for i, (name, model) in enumerate(ready):
                rows.append(
                    BenchRow(
                        model=name,
                        batch_size=batch,
                        dtype=dtype,  # type: ignore[arg-type]  # checked above
                        threads=torch.get_num_threads(),
                        runtime="pytorch-eager",
                        macs=macs[i],
                        params=sum(p.numel() for p in model.parameters()),
                        latency_ms=_latency(times[i]),
                        images_per_s=batch / statistics.median(times[i]),
                        peak_memory_mb=memory[i],
                        speedup=paired_speedup(times[0], times[i]),
                        mac_ratio=macs[0] / macs[i],
                    )
                )
    return BenchResult(
        models=tuple(rows),
        conditions=conditions(target) | {"rounds": runs, "warmup_rounds": warmup, "seed": seed},
    )


def paired_speedup(reference: Sequence[float], times: Sequence[float]) -> float:
    """Median over rounds of reference time / time; a slow spell that hits a whole round cancels."""
    return statistics.median(a / b for a, b in zip(reference, times, strict=True))


def conditions(device: torch.device) -> dict[str, Any]:
    """What a measurement depends on: hardware, operating system, versions, and when it was made."""
    versions = {"vitailor": __version__, "python": platform.python_version()}
    versions |= {package: version(package) for package in ("torch", "timm")}
    on_gpu = device.type == "cuda"
    return {
        "device": device.type,
        "hardware": torch.cuda.get_device_name(device) if on_gpu else _cpu_name(),
        "cpu_cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": versions,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


# -- arguments -----------------------------------------------------------------------------------


def check_settings(
    batch_sizes: Sequence[int], dtype: str, threads: int | None, runs: int, warmup: int
) -> None:
    """Raise a `UsageError` for a setting of `bench` that is out of range."""
    if not batch_sizes or min(batch_sizes) < 1:
        raise UsageError(
            f"Batch sizes {list(batch_sizes)} are not all positive.", "Give 1 or more."
        )
    if dtype not in get_args(DType):
        raise UsageError(f"Unknown dtype '{dtype}'.", f"Choose {', '.join(get_args(DType))}.")
    if threads is not None and threads < 1:
        raise UsageError(f"Cannot run on {threads} threads.", "Give 1 or more.")
    if runs < 1 or warmup < 0:
        raise UsageError(
            f"{runs} runs after {warmup} warm-up runs measure nothing.", "Give at least one run."
        )


def _device(device: str | torch.device | None, model: nn.Module) -> torch.device:
    if device is None:
        return next((p.device for p in model.parameters()), torch.device("cpu"))
    try:
        target = torch.device(device)
        torch.empty(0, device=target)
    except (RuntimeError, AssertionError) as error:
        why = " ".join(str(error).split()).partition(". ")[0].rstrip(".")
        raise UsageError(
            f"Device '{device}' cannot be used: {why}.", "Choose cpu, or a device this machine has."
        ) from None
    return target


# -- one model -----------------------------------------------------------------------------------


def _prepare(model: nn.Module, device: torch.device, dtype: str) -> nn.Module:
    return copy.deepcopy(model).eval().to(device, getattr(torch, dtype))


def _macs(model: nn.Module, input_size: tuple[int, int, int]) -> int:
    """Closed form where the model is known, else counted while it runs once."""
    try:
        return shape_of(model).macs
    except UnsupportedModelError:
        counter = FlopCounterMode(display=False)
        probe = copy.deepcopy(model).eval().float().cpu()
        # Fused attention is counted differently by version; the plain one exactly.
        with torch.inference_mode(), sdpa_kernel(SDPBackend.MATH), counter:
            probe(torch.zeros(1, *input_size))
        return max(1, counter.get_total_flops() // 2)


def _try(name: str, model: nn.Module, x: Tensor) -> None:
    try:
        _forward(model, x)
    except (RuntimeError, ValueError, AssertionError, TypeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        why = " ".join(str(error).split()) or type(error).__name__
        raise UnsupportedModelError(
            f"{name} does not run on {x.dtype} images of shape {tuple(x.shape)}: {why}.",
            "Choose another dtype or a model that takes such images.",
        ) from None


@torch.inference_mode()
def _forward(model: nn.Module, x: Tensor) -> None:
    model(x)
    if x.is_cuda:
        torch.cuda.synchronize(x.device)


def _time(model: nn.Module, x: Tensor) -> float:
    """Seconds of one forward pass."""
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    start = time.perf_counter()
    _forward(model, x)
    return time.perf_counter() - start


def _latency(seconds: Sequence[float]) -> Latency:
    ms = [1000 * s for s in seconds]
    if len(ms) < 2:
        return Latency(median=ms[0], iqr=0.0)
    low, _, high = statistics.quantiles(ms, n=4, method="inclusive")
    return Latency(median=statistics.median(ms), iqr=high - low)


# -- memory --------------------------------------------------------------------------------------


def _peak_memory(model: nn.Module, x: Tensor) -> float | None:
    """Weights plus the most that one forward pass takes on top of what is held before it, in MiB."""
    tensors = [*model.parameters(), *model.buffers()]
    weights = sum(t.numel() * t.element_size() for t in tensors)
    if x.is_cuda:
        before = torch.cuda.memory_allocated(x.device)
        torch.cuda.reset_peak_memory_stats(x.device)
        _forward(model, x)
        return (weights + torch.cuda.max_memory_allocated(x.device) - before) / MIB
    if x.device.type != "cpu":
        return None
    gc.collect()
    _return_freed_memory()
    if not _reset_high_water_mark():
        return None
    before_kib = _status("VmRSS")
    _forward(model, x)
    peak_kib = _status("VmHWM")
    if before_kib is None or peak_kib is None:
        return None
    return weights / MIB + max(0, peak_kib - before_kib) / 1024


def _return_freed_memory() -> None:
    """Give the heap's free pages back, so that a forward pass takes its memory anew and is seen to."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError, TypeError):  # not glibc
        return


def _reset_high_water_mark() -> bool:
    """Make Linux count the process's peak memory from now on; False where there is no such thing."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def _status(field: str) -> int | None:
    """A figure of this process in KiB, as Linux tells it."""
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text("utf-8"), re.M)
    return int(found[1]) if found else None


# -- surroundings --------------------------------------------------------------------------------


@contextmanager
def _threads(threads: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    try:
        if threads is not None:
            torch.set_num_threads(threads)
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _no_gc() -> Iterator[None]:
    """No garbage collection, which would hit some rounds and not others."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text("utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.M)
    return found[1].strip() if found else platform.machine()
