"""`vitailor bench`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import options as o

if TYPE_CHECKING:
    from rich.console import Console

    from ..benchmarking import BenchResult

EXAMPLE = o.example(
    "vitailor bench vit_tiny_patch16_224 small/ --batch-size 1,8 --threads 2",
    "vitailor bench small/ --dtype float32,bfloat16 --json",
)


def bench(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL",
            help="Models; the first is the reference that the speed-ups refer to.",
            show_default=False,
        ),
    ],
    batch_size: Annotated[
        str, typer.Option("--batch-size", metavar="N,N", help="Images at a time.")
    ] = "1,8",
    dtype: Annotated[
        str, typer.Option("--dtype", metavar="NAME,NAME", help="float32, float16, bfloat16.")
    ] = "float32",
    threads: Annotated[
        str | None,
        typer.Option(
            "--threads", metavar="N,N", help="CPU threads, e.g. 1,2; torch's number by default."
        ),
    ] = None,
    runs: Annotated[int, typer.Option("--runs", metavar="N", help="Rounds that are timed.")] = 30,
    warmup: Annotated[
        int, typer.Option("--warmup", metavar="N", help="Rounds before them that are not.")
    ] = 3,
    weights: o.Weights = None,
    num_classes: o.NumClasses = None,
    seed: o.Seed = 0,
    device: o.Device = None,
    json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Time models in turns: latency, throughput, peak memory, and speed-up against the MAC ratio.

    Several batch sizes, dtypes and thread counts are written with commas; each combination is one row.
    --weights and --num-classes are of the first model. Timing needs no weights: nothing is downloaded.
    """
    batch_sizes = o.numbers("--batch-size", batch_size, int) or ()
    counts: tuple[int | None, ...] = o.numbers("--threads", threads, int) or (None,)
    dtypes = tuple(part.strip() for part in dtype.split(","))
    from . import setup
    from .console import emit, progress

    where = setup.device_of(device)

    from ..benchmarking import BenchResult, check_settings
    from ..benchmarking import bench as measure

    for kind in dtypes:
        for count in counts:
            check_settings(batch_sizes, kind, count, runs, warmup)
    opened = [
        (
            name,
            setup.open_model(
                name, weights if i == 0 else None, num_classes if i == 0 else None, pretrained=False
            ).model,
        )
        for i, name in enumerate(models)
    ]
    found: list[BenchResult] = []
    for kind in dtypes:
        for count in counts:
            with progress(f"timing in {kind}") as advance:
                result = measure(
                    opened,
                    batch_sizes=batch_sizes,
                    dtype=kind,
                    threads=count,
                    device=where,
                    runs=runs,
                    warmup=warmup,
                    seed=seed,
                    progress=advance,
                )
            found.append(result)
    whole = BenchResult(
        models=tuple(row for result in found for row in result.models),
        conditions=found[0].conditions,
    )
    emit(whole.model_dump(mode="json"), json, lambda out: _draw(out, whole))


def _draw(out: Console, result: BenchResult) -> None:
    from rich.table import Table

    from ..reporting import count

    table = Table(box=None, header_style="bold")
    table.add_column("model", overflow="fold")
    titles = ("batch", "dtype", "threads", "MACs", "params", "latency ms", "IQR", "images/s")
    for title in (*titles, "peak MiB", "speed-up", "MAC ratio"):
        table.add_column(title, justify="right")
    for row in result.models:
        table.add_row(
            _short(row.model),
            str(row.batch_size),
            row.dtype,
            str(row.threads),
            count(row.macs),
            count(row.params),
            f"{row.latency_ms.median:.2f}",
            f"{row.latency_ms.iqr:.2f}",
            f"{row.images_per_s:.1f}",
            _mib(row.peak_memory_mb),
            f"{row.speedup:.2f}x",
            f"{row.mac_ratio:.2f}x",
        )
    out.print(table)
    conditions = result.conditions
    versions = " ".join(f"{name} {number}" for name, number in conditions["versions"].items())
    out.print(
        f"[dim]{conditions['hardware']}, {conditions['rounds']} rounds, pytorch-eager, {versions}"
    )


def _mib(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.1f}"


def _short(name: str) -> str:
    return Path(name).name if "/" in name and Path(name).exists() else name


def register(app: typer.Typer) -> None:
    app.command(help=o.prose(bench), epilog=EXAMPLE)(bench)
