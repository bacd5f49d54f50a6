"""The command line as users and scripts meet it: options, output, exit codes, errors in one line."""

from __future__ import annotations

import errno
import io
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import IO

import pytest
from pydantic import BaseModel, ConfigDict, Field

from vitailor import __version__
from vitailor.artifact import load, save
from vitailor.budget import Budget
from vitailor.cli import main
from vitailor.cli.budgets import make_budget
from vitailor.cli.options import amount
from vitailor.cli.settings import make_config, parse_sets, read_config
from vitailor.errors import UsageError
from vitailor.hosts import shape_of

VERBS = ("demo", "compress", "train", "search", "evaluate", "bench", "inspect", "report")
HEAVY = {"torch", "torchvision", "timm", "numpy", "sklearn", "scipy", "plotly", "jinja2"}
PREPROCESSING = ("--input-size", "--crop-pct", "--interpolation", "--mean", "--std")
COMMON = ("--json", "--debug")
RUN = ("--seed", "--device", *COMMON)
MODEL = ("--weights", "--num-classes")
OPTIONS = {
    "demo": ("--output", "--overwrite", *RUN),
    "compress": (
        *("--method", "--keep", "--macs", "--params", "--latency-ms", "--calibrate", "--images"),
        *("--evaluate", "--set", "--config", "--dry-run", "--output", "--overwrite"),
        *("--train", "--epochs", "--batch-size", "--lr", "--stage", "--resume", "--reward"),
        *("--class-map", *MODEL, *PREPROCESSING, *RUN),
    ),
    "train": (
        *(
            "--data",
            "--val",
            "--teacher",
            "--distill",
            "--epochs",
            "--batch-size",
            "--lr",
            "--resume",
        ),
        *("--precision", "--checkpoint-every", "--workers", "--tracker", "--set", "--config"),
        *("--output", "--overwrite", "--images", "--class-map", *MODEL, *PREPROCESSING, *RUN),
    ),
    "search": (
        *("--keep", "--macs", "--params", "--calibrate", "--images", "--trials", "--sampler"),
        *("--storage", "--reward", "--reward-images", "--set", "--config", "--output"),
        *("--evaluate", "--overwrite", "--class-map", *MODEL, *PREPROCESSING, *RUN),
    ),
    "evaluate": ("--images", "--class-map", *MODEL, *PREPROCESSING, *RUN),
    "bench": ("--batch-size", "--dtype", "--threads", *MODEL, *RUN),
    "inspect": (*MODEL, *COMMON),
    "report": ("--output", "--overwrite", *COMMON),
}


def run_process(*args: str, **settings: object) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    command = [sys.executable, "-m", "vitailor.cli", *args]
    return subprocess.run(command, capture_output=True, text=True, check=False, **settings)


@pytest.fixture
def run(capsys) -> Callable[..., tuple[int, str, str]]:
    """The command in this process: exit code, stdout, stderr."""

    def call(*args: object) -> tuple[int, str, str]:
        code = main([str(arg) for arg in args])
        out = capsys.readouterr()
        return code, out.out, out.err

    return call


@pytest.fixture
def refused(run) -> Callable[..., str]:
    """The one line that a command is refused with, which must be the same under --json."""

    def call(code: int, *args: object) -> str:
        found, out, err = run(*args)
        assert (found, out) == (code, ""), err
        assert err.startswith("error: ")
        assert err.endswith("\n")
        assert err.count("\n") == 1
        found, out, quiet = run(*args, "--json")
        assert (found, quiet) == (code, "")
        payload = json.loads(out)
        assert set(payload) == {"error"}
        assert set(payload["error"]) == {"type", "message", "fix"}
        whole = f"error: {payload['error']['message']} {payload['error']['fix']}"
        assert whole.rstrip() == err.rstrip()
        return err

    return call


@pytest.fixture
def artifact(make_vit, tmp_path) -> Path:
    """An artifact of a tiny model with ten classes."""
    return save(make_vit(num_classes=10), tmp_path / "tiny")


# -- lean, and the same for every verb -----------------------------------------------------------


def test_help_is_lean():
    code = (
        "import sys; from vitailor.cli import main; code = main(['--help']);"
        "print(*sys.modules, file=sys.stderr); sys.exit(code)"
    )
    seconds = []
    for _ in range(3):
        # Its own time on a processor, which a busy machine does not change much.
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            [sys.executable, "-c", code], check=True, capture_output=True, text=True
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert HEAVY.isdisjoint(done.stderr.split())
    assert min(seconds) < 1
    for verb in VERBS:
        assert f" {verb} " in done.stdout


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb(verb):
    wide = {**os.environ, "COLUMNS": "200", "TERMINAL_WIDTH": "200"}
    done = run_process(verb, "--help", env=wide)
    assert done.returncode == 0, done.stderr
    assert "Example" in done.stdout
    assert f"vitailor {verb}" in done.stdout.partition("Example")[2]
    for option in OPTIONS[verb]:
        assert f"{option} " in done.stdout


def test_no_verb_that_does_not_work_yet(run):
    code, out, _ = run("--help")
    assert code == 0
    assert " export " not in out


def test_version(run):
    assert run("--version") == (0, f"vitailor {__version__}\n", "")


def test_without_a_verb_there_is_help(run):
    code, out, err = run()
    assert (code, err) == (0, "")
    assert "inspect" in out


# -- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (["prune"], "prune"),
        (["inspect"], "MODEL"),
        (["inspect", "a", "b"], "b"),
        (["inspect", "a", "--colour"], "--colour"),
        (["inspect", "a", "--num-classes", "ten"], "integer. See 'vitailor inspect --help'."),
        (["--colour"], "--colour"),
        (["evaluate", "m", "digits", "--input-size", "big"], "--input-size 'big'"),
        (["evaluate", "m", "digits", "--mean", "a,b"], "--mean 'a,b'"),
        (["evaluate", "m", "digits", "--device", "abacus"], "abacus"),
        (["evaluate", "m", "digits", "--device", "cuda:77"], "cuda:77"),
        (["bench", "m", "--batch-size", "1;8"], "--batch-size '1;8'"),
        (["bench", "m", "--batch-size", "0"], "[0]"),
        (["bench", "m", "--dtype", "float32,int8"], "int8"),
        (["bench", "m", "--threads", "0"], "0 threads"),
        (["bench", "m", "--runs", "0"], "0 runs"),
        (["inspect", "m", "--num-classes", "0"], "--num-classes 0"),
    ],
)
def test_usage_errors(refused, args, named):
    assert named in refused(2, *args)


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (["evaluate", "m", "nowhere/at/all"], "nowhere/at/all"),
        (["evaluate", "m", "digits", "--class-map", "no-map"], "no-map"),
        (["inspect", "m", "--weights", "no-weights"], "no-weights"),
        (["inspect", "vit_tinny_patch16_224"], "vit_tiny_patch16_224"),
        (["inspect", "resnet18"], "resnet18"),
        (["inspect", "./nowhere"], "nowhere"),
        (["report", "nowhere", "-o", "never.html"], "nowhere"),
    ],
)
def test_failures(refused, args, named, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if "resnet18" in args:
        named = "ResNet"
    assert named in refused(1, *args)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_page_is_refused_and_replaced_on_request(run, refused, artifact, tmp_path):
    page = tmp_path / "page.html"
    page.write_text("mine", "utf-8")
    assert "--overwrite" in refused(1, "report", artifact, "-o", page)
    assert page.read_text("utf-8") == "mine"
    code, out, _ = run("report", artifact, "-o", page, "--overwrite", "--json")
    assert (code, json.loads(out)) == (0, {"file": str(page)})
    assert page.read_text("utf-8") != "mine"


def fail_with(error: BaseException) -> Callable[..., None]:
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


class OutOfMemoryError(RuntimeError):
    """As torch calls it."""


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (ValueError("a\nb"), 1, ["ValueError: a b", "bug", "--debug"]),
        (AssertionError(), 1, ["AssertionError", "bug"]),
        (OSError(errno.ENOSPC, "No space left on device", "x"), 1, ["x: No space", "Free some"]),
        (PermissionError(errno.EACCES, "Permission denied", "y"), 1, ["y: Perm", "permissions"]),
        (MemoryError(), 1, ["Memory ran out"]),
        (OutOfMemoryError("CUDA out of memory"), 1, ["Memory ran out", "batch"]),
        (KeyboardInterrupt(), 130, ["Interrupted"]),
        (RecursionError("deep"), 1, ["RecursionError: deep"]),
    ],
)
def test_unexpected_errors_are_one_line(refused, artifact, monkeypatch, error, code, words):
    monkeypatch.setattr("vitailor.inspection.inspect", fail_with(error))
    line = refused(code, "inspect", artifact)
    for word in words:
        assert word in line
    assert "Traceback" not in line


def test_debug_shows_the_traceback_once(run, artifact, monkeypatch):
    monkeypatch.setattr("vitailor.inspection.inspect", fail_with(ValueError("odd")))
    code, out, err = run("inspect", artifact, "--debug")
    assert (code, out) == (1, "")
    assert err.count("Traceback") == 1
    assert err.splitlines()[-1].startswith("error: ")
    code, out, err = run("inspect", artifact, "--debug", "--json")
    assert code == 1
    assert json.loads(out)["error"]["type"] == "ValueError"
    assert "Traceback" in err


def test_a_reader_that_leaves_early_and_a_full_disk(artifact):
    """Both under the output, seen from outside: all at once, since each has to start anew."""
    read, write = os.pipe()
    os.close(read)
    full = Path("/dev/full")
    with ExitStack() as stack:
        ends: list[IO[str]] = [stack.enter_context(os.fdopen(write, "w"))]
        if full.exists():
            ends.append(stack.enter_context(full.open("w")))
        begun = [
            subprocess.Popen(
                [sys.executable, "-m", "vitailor.cli", "inspect", str(artifact), *flags],
                stdout=end,
                stderr=subprocess.PIPE,
                text=True,
            )
            for end in ends
            for flags in ([], ["--json"])
        ]
        for process in begun:
            told = process.communicate()[1]
            assert process.returncode == 1
            assert told.startswith("error: ")
            assert told.count("\n") == 1


# -- output --------------------------------------------------------------------------------------


def test_only_the_object_reaches_stdout(artifact):
    noise = (
        "import sys, warnings, vitailor.inspection as i\n"
        "real = i.inspect\n"
        "def noisy(model):\n"
        "    print('noise'); warnings.warn('old'); return real(model)\n"
        "i.inspect = noisy\n"
        "from vitailor.cli import main\n"
        f"sys.exit(main(['inspect', {str(artifact)!r}, '--json']))\n"
    )
    done = subprocess.run([sys.executable, "-c", noise], capture_output=True, text=True, check=True)
    assert done.stdout.count("\n") == 1
    assert "macs" in json.loads(done.stdout)
    assert done.stderr == "noise\n"


def test_inspect(run, artifact, make_vit):
    code, out, _ = run("inspect", artifact, "--json")
    found = json.loads(out)
    shape = shape_of(make_vit(num_classes=10))
    assert code == 0
    assert set(found) == {"macs", "params", "embed_dim", "num_prefix_tokens", "blocks"}
    assert (found["macs"], found["params"]) == (shape.macs, shape.params)
    assert len(found["blocks"]) == shape.depth
    code, out, err = run("inspect", artifact)
    assert (code, err) == (0, "")
    assert f"{shape.macs:,}" in out


def test_inspect_a_timm_name_without_download(run, monkeypatch):
    monkeypatch.setattr("timm.models._builder.load_pretrained", fail_with(AssertionError("net")))
    code, out, _ = run("inspect", "vit_tiny_patch16_224", "--json")
    assert code == 0
    assert json.loads(out)["params"] == 5_717_416


def test_evaluate(run, artifact):
    code, out, _ = run("evaluate", artifact, "digits", "--images", 40, "--json")
    found = json.loads(out)
    assert code == 0
    assert set(found) == {"top1", "top5", "images", "top1_interval"}
    assert found["images"] == 40
    low, high = found["top1_interval"]
    assert 0 <= low <= found["top1"] <= high <= 100
    code, out, err = run("evaluate", artifact, "digits", "--images", 40)
    assert (code, err) == (0, "")
    assert f"{found['top1']:.2f}%" in out
    assert "n = 40" in out
    assert f"{low:.2f} to {high:.2f}" in out


def test_evaluate_passes_its_options_on(run, artifact, monkeypatch):
    seen = {}

    def spy(model: object, data: object, **settings: object) -> None:
        seen.update(settings)
        raise KeyboardInterrupt

    monkeypatch.setattr("vitailor.evaluation.evaluate", spy)
    options = ["--crop-pct", "0.5", "--interpolation", "bilinear", "--mean", "0.1,0.2,0.3"]
    more = ["--std", "0.4", "--seed", "7", "--batch-size", "3", "--device", "cpu"]
    code, _, _ = run("evaluate", artifact, "digits", "--images", 40, *options, *more)
    assert code == 130
    preprocessing = seen["preprocessing"]
    assert preprocessing.crop_pct == 0.5
    assert preprocessing.interpolation == "bilinear"
    assert preprocessing.mean == (0.1, 0.2, 0.3)
    assert preprocessing.std == (0.4, 0.4, 0.4)
    assert (seen["images"], seen["seed"], seen["batch_size"]) == (40, 7, 3)
    assert seen["device"] == "cpu"


def test_bench_has_a_row_for_each_combination(run, artifact):
    options = ["--batch-size", "1,2", "--dtype", "float32,bfloat16", "--runs", 1, "--warmup", 0]
    code, out, _ = run("bench", artifact, artifact, *options, "--threads", "1", "--json")
    assert code == 0
    found = json.loads(out)
    rows = [(r["model"], r["batch_size"], r["dtype"]) for r in found["models"]]
    name = str(artifact)
    assert sorted(rows) == sorted(
        [(name, b, d) for b in (1, 2) for d in ("float32", "bfloat16") for _ in range(2)]
    )
    assert {r["threads"] for r in found["models"]} == {1}
    code, out, err = run("bench", artifact, "--batch-size", "1", "--runs", 1, "--warmup", 0)
    assert (code, err) == (0, "")
    assert "speed-up" in out
    assert "1.00x" in out


def test_progress_only_on_a_terminal(run, artifact, monkeypatch):
    args = ["evaluate", artifact, "digits", "--images", 20]
    assert run(*args)[2] == ""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    assert main([*map(str, args), "--json"]) == 0
    assert "evaluating" in terminal.getvalue()
    assert "20/20" in terminal.getvalue()


# -- budgets and settings ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("750M", 750_000_000),
        ("1.2G", 1_200_000_000),
        ("1.2g", 1_200_000_000),
        ("860k", 860_000),
        ("22000000", 22_000_000),
        ("7.5e8", 750_000_000),
        ("0.6", 0.6),
        ("1", 1.0),
        ("1.0", 1.0),
        ("1k", 1000),
    ],
)
def test_amounts(text, value):
    found = amount("--macs", text)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize("text", ["", "0", "-1", "1.5", "60%", "M", "1.2X", "1,000", "nan", "inf"])
def test_bad_amounts(text):
    with pytest.raises(UsageError, match="--params"):
        amount("--params", text)


def test_budgets():
    assert make_budget(0.6, None, None, None) == Budget(macs=0.6)
    assert make_budget(1.0, None, None, None) == Budget(macs=1.0)
    assert make_budget(None, "750M", None, None) == Budget(macs=750_000_000)
    assert make_budget(None, None, "0.5", None) == Budget(params=0.5)
    assert make_budget(None, None, None, 5.0) == Budget(latency_ms=5.0)


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ((None, None, None, None), "none"),
        ((0.6, "750M", None, None), "--keep and --macs"),
        ((0.6, "1", "1", 5.0), "--keep and --macs and --params and --latency-ms"),
        ((0.0, None, None, None), "--keep 0"),
        ((1.5, None, None, None), "--keep 1.5"),
        ((float("nan"), None, None, None), "--keep nan"),
        ((None, None, None, -5.0), "--latency-ms -5"),
        ((None, None, None, float("nan")), "--latency-ms nan"),
    ],
)
def test_bad_budgets(asked, named):
    with pytest.raises(UsageError, match=named) as caught:
        make_budget(*asked)
    assert caught.value.fix


class Settings(BaseModel):
    """Fields of all kinds."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    ratio: float = Field(0.5, gt=0, le=1)
    steps: int = 3
    flag: bool = True
    name: str = "x"
    dims: tuple[str, ...] = ("qk", "v")
    limit: int | None = None


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("ratio=0.25", 0.25),
        ("ratio=1", 1.0),
        ("steps=7", 7),
        ("flag=false", False),
        ("flag=False", False),
        ("flag=True", True),
        ("name=a=b", "a=b"),
        ("name=12", "12"),
        ("name=true", "true"),
        ("name=", ""),
        ('dims=["qk"]', ("qk",)),
        ("dims=qk", ("qk",)),
        ("dims=v, qk", ("v", "qk")),
        ("limit=4", 4),
        ("limit=null", None),
        ("limit=None", None),
    ],
)
def test_settings_take_the_type_of_their_field(text, value):
    field = text.partition("=")[0]
    found = getattr(make_config("m", Settings, {}, parse_sets([text])), field)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("ratios=1", "Did you mean ratio"),
        ("ratio=2", "ratio"),
        ("ratio=much", "ratio"),
        ("steps=1.5", "steps"),
        ("flag=perhaps", "flag"),
        ("dims=[1]", "dims"),
    ],
)
def test_settings_that_do_not_fit(text, named):
    with pytest.raises(UsageError) as caught:
        make_config("m", Settings, {}, parse_sets([text]))
    assert named in str(caught.value)


@pytest.mark.parametrize("texts", [["ratio"], ["=1"], [""], ["a=1", "a=2"], ["a-b=1", "a_b=2"]])
def test_settings_that_are_malformed(texts):
    with pytest.raises(UsageError, match="--set"):
        parse_sets(texts)


def test_a_file_of_settings(tmp_path):
    toml, plain = tmp_path / "a.toml", tmp_path / "a.json"
    toml.write_text('ratio = 0.25\nname = "t"\ndims = ["v"]\n', "utf-8")
    plain.write_text('{"ratio": 0.25, "name": "t", "dims": ["v"]}', "utf-8")
    for file in (toml, plain):
        made = make_config("m", Settings, read_config(file), {"name": "s"})
        assert made == Settings(ratio=0.25, name="s", dims=("v",))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.json", "{"),
        ("a.json", "[1]"),
        ("a.toml", "a ="),
        ("a.json", "\udcff"),
        ("no.json", None),
    ],
)
def test_bad_files_of_settings(tmp_path, name, text):
    file = tmp_path / name
    if text is not None:
        file.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(UsageError, match="--config"):
        read_config(file)


# -- compress ------------------------------------------------------------------------------------


@pytest.fixture
def start(artifact, tmp_path) -> list[object]:
    """A whole and valid command, to which tests add what is wrong."""
    return ["compress", artifact, "--calibrate", "digits", "-o", tmp_path / "out"]


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (["--method", "closed-form"], "got none"),
        (["--method", "closed-form", "--keep", "0.6", "--macs", "1M"], "--keep and --macs"),
        (["--method", "closed-form", "--keep", "2"], "--keep 2"),
        (["--method", "closed-form", "--macs", "many"], "--macs 'many'"),
        (["--keep", "0.6"], "--method"),
        (["--method", "magic", "--keep", "0.6"], "closed-form, token-merge"),
        (["--method", "closed-form", "--keep", "0.6", "--set", "ridges=1"], "Did you mean ridge"),
        (["--method", "closed-form", "--keep", "0.6", "--set", "ridge=-1"], "ridge"),
        (["--method", "closed-form", "--keep", "0.6", "--set", "criterion=luck"], "criterion"),
        (["--method", "closed-form", "--keep", "0.6", "--set", "compensation=often"], "compensati"),
        (["--method", "closed-form", "--keep", "0.6", "--set", "ridge"], "field=value"),
        (["--method", "closed-form", "--keep", "0.6", "--config", "no.toml"], "no.toml"),
        (["--method", "closed-form", "--keep", "0.6", "--images", "0"], "--images 0"),
        (["--method", "closed-form", "--keep", "0.6", "--class-map", "m"], "--evaluate"),
        (["--method", "closed-form", "--keep", "0.6", "--input-size", "x"], "--input-size 'x'"),
        (["--method", "token-merge", "--params", "0.6"], "no parameters"),
        (["--method", "closed-form", "--keep", "0.6", "--reward", "digits"], "--reward is not"),
    ],
)
def test_compress_usage_errors(refused, start, tmp_path, args, named):
    assert named in refused(2, *start, *args)
    assert not (tmp_path / "out").exists()


def test_the_current_folder_is_refused_before_any_work(refused, artifact, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    args = ["compress", artifact, "--method", "closed-form", "--keep", "0.6"]
    told = refused(1, *args, "--calibrate", "nowhere", "-o", ".")
    assert "current folder" in told


def test_compress_needs_a_place_and_images(refused, artifact, tmp_path):
    args = ["compress", artifact, "--method", "closed-form", "--keep", "0.6"]
    assert "-o" in refused(2, *args, "--calibrate", "digits")
    assert "--calibrate" in refused(2, *args, "-o", tmp_path / "out")


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (["--calibrate", "nowhere"], "nowhere"),
        (["--evaluate", "nowhere"], "nowhere"),
        (["--evaluate", "digits", "--class-map", "no-map"], "no-map"),
        (["--weights", "no-weights"], "no-weights"),
        (["--images", "5000"], "5000"),
        (["--macs", "10", "--keep"], "10"),
    ],
)
def test_compress_failures(refused, start, tmp_path, args, named):
    budget = ["--keep", "0.6"]
    if args[-1] == "--keep":
        args, budget = args[:-1], []
    assert named in refused(1, *start, "--method", "closed-form", *budget, *args)
    assert not (tmp_path / "out").exists()


def test_what_is_wrong_shows_before_the_model_is_opened(run, tmp_path, monkeypatch):
    monkeypatch.setattr("vitailor.models.open_model", fail_with(AssertionError("too late")))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine", "utf-8")
    good = ["compress", "vit_tiny_patch16_224", "--method", "closed-form", "--keep", "0.6"]
    good += ["--calibrate", "digits", "-o", tmp_path / "out"]
    assert "too late" in run(*good)[2]
    for wrong in (
        ["-o", tmp_path / "full"],
        ["--macs", "1M"],
        ["--calibrate", "nowhere"],
        ["--evaluate", "nowhere"],
        ["--method", "magic"],
        ["--set", "ridge=x"],
        ["--device", "cuda:77"],
    ):
        code, _, err = run(*good, *wrong)
        assert code in (1, 2)
        assert "too late" not in err, wrong


def test_an_output_folder_with_something_in_it_is_refused(refused, start, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine", "utf-8")
    args = [*start, "--method", "token-merge", "--keep", "0.6"]
    assert "--overwrite" in refused(1, *args)
    assert [p.name for p in out.iterdir()] == ["mine.txt"]
    file = tmp_path / "file"
    file.write_text("mine", "utf-8")
    assert "is a file" in refused(1, *args, "--overwrite", "-o", file)
    assert "is a file" in refused(1, *args, "-o", file / "below")


def test_compress(run, start, artifact, tmp_path):
    out = tmp_path / "out"
    args = [*start, "--method", "closed-form", "--keep", "0.7", "--images", 24]
    code, text, err = run(*args, "--evaluate", "digits", "--json")
    assert (code, err) == (0, "")
    found = json.loads(text)
    keys = {"out", "method", "budget", "macs", "params", "seconds", "peak_memory_mb", "top1"}
    assert set(found) == keys
    assert found["out"] == str(out)
    assert found["method"] == "closed-form"
    assert 0 < found["macs"]["after"] <= 0.7 * found["macs"]["before"]
    assert set(found["top1"]) == {"before", "after", "interval"}
    low, high = found["top1"]["interval"]
    assert low <= found["top1"]["after"] - found["top1"]["before"] <= high
    # What was written is what was measured, and remembers how.
    _, text, _ = run("inspect", out, "--json")
    assert json.loads(text)["macs"] == found["macs"]["after"]
    _, text, _ = run("evaluate", out, "digits", "--json")
    assert json.loads(text)["top1"] == pytest.approx(found["top1"]["after"])
    record = json.loads((out / "record.json").read_text("utf-8"))
    assert record["calibration"]["images"] == 24
    (step,) = json.loads((out / "plan.json").read_text("utf-8"))["steps"]
    assert step["source"] == str(artifact)


def test_class_maps_go_with_images_to_evaluate_on(run, start, artifact, tmp_path):
    """Classes named by a map, for folders whose names say nothing: the same accuracy as `evaluate` finds."""
    from PIL import Image

    from vitailor.digits import digit_images

    pictures, labels = digit_images("test")
    for i in range(40):
        place = tmp_path / "images" / f"n{9 - labels[i]}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pictures[i]).save(place / f"{i}.png")
    classes = tmp_path / "map.json"
    classes.write_text(json.dumps({f"n{i}": 9 - i for i in range(10)}), "utf-8")
    test = [tmp_path / "images", "--class-map", classes]
    _, text, _ = run("evaluate", artifact, *test, "--json")
    told = json.loads(text)["top1"]
    cut = ["--method", "token-merge", "--keep", "0.8", "--evaluate", *test, "--json"]
    code, text, err = run(*start, *cut)
    assert (code, err) == (0, "")
    assert json.loads(text)["top1"]["before"] == pytest.approx(told)


def test_compress_for_people(run, start):
    code, out, err = run(*start, "--method", "token-merge", "--keep", "0.8")
    assert (code, err) == (0, "")
    for words in ("MACs", "kept", "not measured", "wrote"):
        assert words in out


def test_search(run, refused, artifact, tmp_path):
    out, journal = tmp_path / "out", tmp_path / "study.journal"
    args = ["search", artifact, "--keep", "0.7", "--calibrate", "digits", "--images", 24]
    args += ["--set", "token_blocks=[2]", "--set", "stages=1"]
    code, text, err = run(*args, "--trials", 3, "-o", out, "--reward-images", 8, "--json")
    found = json.loads(text)
    assert code == 0
    *_, last = err.splitlines()
    assert (len(err.splitlines()), last) == (
        3,
        f"candidate 3/3  best {found['best']['reward']:.4f}",
    )
    assert set(found) == {"out", "best", "trials"}
    assert all({"number", "reward", "macs", "policy"} <= set(trial) for trial in found["trials"])
    assert found["best"] in found["trials"]
    lines = (out / "trials.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line) for line in lines] == found["trials"]
    _, text, _ = run("inspect", out, "--json")
    assert json.loads(text)["macs"] == found["best"]["macs"]
    # It goes on by itself, here from the file in its folder, there from a storage.
    _, text, _ = run(*args, "--trials", 4, "-o", out, "--reward-images", 8, "--json")
    assert json.loads(text)["trials"][:3] == found["trials"]
    shared = [*args, "--storage", journal, "--sampler", "random", "--reward", "digits:train"]
    _, first, _ = run(*shared, "--trials", 2, "-o", tmp_path / "one", "--json")
    _, second, _ = run(*shared, "--trials", 3, "-o", tmp_path / "two", "--json")
    assert json.loads(second)["trials"][:2] == json.loads(first)["trials"]
    code, text, _ = run(*shared, "--trials", 3, "-o", tmp_path / "three", "--evaluate", "digits")
    assert code == 0
    for words in ("best of 3 candidates", "mlp_dim", "a candidate", "top-1", "wrote"):
        assert words in text
    flattering = [*args, "--reward", "digits:test", "--evaluate", "digits", "-o", tmp_path / "x"]
    assert "would flatter" in refused(2, *flattering)
    assert "--seed" in refused(2, *args, "--seed", "-1", "-o", tmp_path / "x")
    assert "trains nothing" in refused(2, *args, "--set", "training.epochs=1", "-o", tmp_path / "x")
    assert "sampler" in refused(2, *args, "--sampler", "gpp", "-o", tmp_path / "x")
    assert "--overwrite" in refused(1, *args, "-o", artifact)
    assert not (tmp_path / "x").exists()
    # Another search does not replace this one's result unasked.
    other = [*args, "--trials", 4, "-o", out, "--reward-images"]
    assert "--overwrite" in refused(1, *other, 9)
    # Nor does one that is refused make it forget its own.
    assert "none is left" in refused(1, *other, 24, "--overwrite")
    assert run(*other, 8, "--json")[0] == 0
    mapped = [*args, "--trials", 2, "--class-map", journal, "-o", tmp_path / "x"]
    assert "--class-map goes with" in refused(2, *mapped)
    # The method by itself judges on the same images.
    cut = ["compress", *args[1:], "--method", "multi-dim", "--set", "trials=1"]
    cut += ["-o", tmp_path / "cut"]
    assert run(*cut, "--reward", "digits:train", "--set", "reward_images=9")[0] == 0
    judged = load(tmp_path / "cut").vitailor.record["facts"]["judged_on"]
    assert (judged["source"], judged["images"]) == ("digits:train", 9)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_killed_search_goes_on(artifact, tmp_path):
    """Nothing finished is lost or repeated, and the candidate that was being judged is judged again."""
    out, journal = tmp_path / "out", tmp_path / "study.journal"
    command = [sys.executable, "-m", "vitailor.cli", "search", artifact, "--keep", "0.7"]
    command += ["--calibrate", "digits", "--images", "1200", "--reward-images", "600"]
    command += ["--trials", "10", "--storage", journal, "-o", out]
    command += ["--set", "token_blocks=[2]", "--set", "stages=1"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    dead = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    lost: list = []
    while len(finished(journal)) < 3 or not lost:
        dead.send_signal(signal.SIGCONT)
        time.sleep(0.02)
        dead.send_signal(signal.SIGSTOP)  # so that it is still judging when it is killed
        assert dead.poll() is None, "it was done before it could be killed"
        lost = [t for t in trials_in(journal) if t.state.name == "RUNNING" and len(t.params) == 3]
    dead.kill()
    dead.wait()
    before = finished(journal)
    assert len(before) < 10
    subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=True)
    after = finished(journal)
    assert len(after) == 10
    assert before.items() <= after.items()
    asked = [point for point, _ in after.values()]
    assert len(set(asked)) == 10
    assert all(asked.count(tuple(trial.params.items())) == 1 for trial in lost)
    lines = (out / "trials.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line)["number"] for line in lines] == list(after)


def finished(journal: Path) -> dict[int, tuple[tuple, float]]:
    """Direction and reward of each finished candidate."""
    done = [trial for trial in trials_in(journal) if trial.state.name == "COMPLETE"]
    return {trial.number: (tuple(trial.params.items()), trial.value) for trial in done}


def trials_in(journal: Path) -> list:
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    if not journal.exists():
        return []
    storage = JournalStorage(JournalFileBackend(str(journal)))
    names = optuna.get_all_study_names(storage)
    return optuna.load_study(study_name=names[0], storage=storage).trials if names else []


def test_settings_and_file_reach_the_method(run, start, tmp_path):
    file = tmp_path / "c.toml"
    file.write_text('allocation = "uniform"\ncompensation = true\n', "utf-8")
    sets = ["--set", "compensation=false", "--set", 'dimensions=["neurons"]']
    args = [*start, "--method", "closed-form", "--keep", "0.9", "--images", 8]
    code, _, err = run(*args, "--config", file, *sets)
    assert (code, err) == (0, "")
    (step,) = json.loads((tmp_path / "out" / "plan.json").read_text("utf-8"))["steps"]
    assert step["settings"]["allocation"] == "uniform"
    assert step["settings"]["compensation"] is False
    assert step["settings"]["dimensions"] == ["neurons"]


def test_keep_everything(run, start, tmp_path):
    code, out, _ = run(*start, "--method", "closed-form", "--keep", "1.0", "--images", 8, "--json")
    found = json.loads(out)
    assert code == 0
    assert found["macs"]["after"] == found["macs"]["before"]
    assert found["params"]["after"] == found["params"]["before"]


def test_dry_run_writes_nothing(run, artifact, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    args = ["compress", artifact, "--calibrate", "digits", "--images", 16, "--dry-run"]
    args += ["--method", "closed-form", "--macs", "0.6"]
    code, out, _ = run(*args, "--json")
    found = json.loads(out)
    assert code == 0
    assert found["out"] is None
    assert found["plan"]["macs"] == found["macs"]["after"] <= 0.6 * found["macs"]["before"]
    assert len(found["plan"]["blocks"]) == 2
    code, out, _ = run(*args, "-o", tmp_path / "out")
    assert code == 0
    assert f"{found['macs']['after']:,}" in out
    assert "nothing was written" in out
    assert sorted(tmp_path.rglob("*")) == before


def test_an_interruption_leaves_no_folder(run, start, tmp_path, monkeypatch):
    monkeypatch.setattr("vitailor.compression.compress", fail_with(KeyboardInterrupt()))
    code, out, err = run(*start, "--method", "token-merge", "--keep", "0.8")
    assert (code, out, err) == (130, "", "error: Interrupted.\n")
    assert not (tmp_path / "out").exists()


def test_calibration_takes_all_images_if_there_are_few(run, start, tmp_path):
    from PIL import Image

    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(3):
        Image.new("RGB", (30, 30), (80 * i, 10, 200)).save(folder / f"{i}.png")
    args = [*start, "--method", "closed-form", "--keep", "0.9", "--calibrate", folder]
    code, _, err = run(*args)
    assert (code, err) == (0, "")
    record = json.loads((tmp_path / "out" / "record.json").read_text("utf-8"))
    assert record["calibration"]["images"] == 3


# -- training ------------------------------------------------------------------------------------

TRAIN = ("--epochs", "1", "--batch-size", "64", "--lr", "1e-4", "--set")


@pytest.mark.parametrize("stages", [(None,), ("sparse", "prune", "finetune")])
def test_compress_with_training(run, artifact, tmp_path, stages):
    out = tmp_path / "out"
    args = ["compress", artifact, "--method", "vtp", "--keep", "0.7", "--train", "digits"]
    args += [*TRAIN, "training.hflip=0", "--checkpoint-every", "9", "-o", out, "--json"]
    for stage in stages:
        code, text, err = run(*args, *(["--stage", stage] if stage else []))
        assert code == 0, err
        cut = stage != "sparse"
        found = json.loads(text)
        assert (found["macs"]["after"] <= 0.7 * found["macs"]["before"]) == cut
        assert shape_of(load(out)).macs == found["macs"]["after"]
    assert "fine-tuning epoch 1/1" in err
    assert {f.name for f in (out / "checkpoints").iterdir()} == {"sparse", "finetune"}
    step = load(out).vitailor.steps[0].settings
    assert (step["training"]["epochs"], step["training"]["hflip"]) == (1, 0.0)
    # Without --resume the folder is in use; with it nothing is left to be done.
    assert "not empty" in run(*args)[1]
    assert run(*args, "--resume")[0] == 0


def test_a_dry_run_reads_checkpoints_and_writes_nothing(run, artifact, tmp_path):
    out = tmp_path / "out"
    args = ["compress", artifact, "--method", "vtp", "--keep", "0.7", "--train", "digits", *TRAIN]
    args += ["training.hflip=0", "-o", out, "--json"]
    assert run(*args, "--stage", "sparse")[0] == 0
    before = {f: f.stat().st_mtime_ns for f in out.rglob("*")}
    code, text, err = run(*args, "--dry-run")
    assert code == 0, err
    assert "epoch" not in err  # gates were not trained again
    assert json.loads(text)["macs"]["after"] <= 0.7 * json.loads(text)["macs"]["before"]
    assert {f: f.stat().st_mtime_ns for f in out.rglob("*")} == before
    # Where gates are still to be trained, that leaves nothing behind either.
    for file in (out / "checkpoints" / "sparse").iterdir():
        file.unlink()
    before = {f: f.stat().st_mtime_ns for f in out.rglob("*")}
    code, _, err = run(*args, "--dry-run")
    assert code == 0, err
    assert "sparse training epoch 1/1" in err
    assert {f: f.stat().st_mtime_ns for f in out.rglob("*")} == before


def test_train(run, artifact, tmp_path, monkeypatch):
    out = tmp_path / "out"
    args = ["train", artifact, "--data", "digits", "--val", "digits", *TRAIN, "hflip=0", "-o", out]
    code, text, err = run(*args, "--json")
    assert code == 0, err
    found = json.loads(text)
    assert (found["out"], found["epochs"]) == (str(out), 1)
    assert found["images_per_s"] > 0
    assert "training epoch 1/1  loss" in err
    assert "training epoch 1/1  top-1" in err
    loaded = load(out)
    assert found["top1"] == loaded.vitailor.record["training"]["top1"][-1]
    assert found["top1"] == json.loads(run("evaluate", out, "digits", "--json")[1])["top1"]
    assert {f.name for f in (out / "checkpoints").iterdir()} == {"last.pt", "best.pt"}
    code, again, err = run(*args, "--json", "--resume")
    assert json.loads(again)["top1"] == found["top1"]
    assert "epoch" not in err  # everything was done
    assert "not empty" in run(*args)[2]
    # Only the first of several processes writes and speaks.
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr("vitailor.artifact.save", lambda *a, **k: pytest.fail("wrote"))
    assert run(*args, "--resume")[:2] == (0, "")


def test_train_from_a_teacher(run, artifact, tmp_path):
    args = ["train", artifact, "--data", "digits", *TRAIN, "hflip=0", "--teacher", artifact]
    code, out, err = run(*args, "-o", tmp_path / "out")
    assert code == 0, err
    assert "top-1   not measured" in out
    training = load(tmp_path / "out").vitailor.record["training"]
    assert training["settings"]["distill"] == "soft"
    assert training["losses"][0] < 1e-3  # it is its own teacher


@pytest.mark.parametrize(
    ("args", "code", "named"),
    [
        (["train", "ARTIFACT", "-o", "OUT"], 2, "--data"),
        (["train", "ARTIFACT", "--data", "digits"], 2, "--output"),
        (["train", "ARTIFACT", "--data", "digits", "-o", "OUT", "--epochs", "0"], 2, "epochs"),
        (["train", "ARTIFACT", "--data", "digits", "-o", "OUT", "--set", "emma=1"], 2, "mean ema"),
        (
            ["train", "ARTIFACT", "--data", "digits", "-o", "OUT", "--distill", "soft"],
            2,
            "--teacher",
        ),
        (["train", "ARTIFACT", "--data", "digits", "-o", "OUT", "--distill", "sof"], 2, "distill"),
        (["train", "ARTIFACT", "--data", "nowhere", "-o", "OUT"], 1, "nowhere"),
        (["train", "ARTIFACT", "--data", "PHOTOS", "-o", "OUT"], 2, "no labels"),
        (
            [
                "train",
                "ARTIFACT",
                "--data",
                "digits",
                "-o",
                "OUT",
                "--teacher",
                "t",
                "--distill",
                "none",
            ],
            2,
            "does not go with",
        ),
        (
            [
                *("compress", "ARTIFACT", "--method", "token-merge", "--keep", "0.9", "--resume"),
                *("-o", "OUT"),
            ],
            2,
            "nothing to resume",
        ),
        (["train", "nowhere/", "--data", "digits", "-o", "OUT"], 1, "nowhere"),
        (["compress", "ARTIFACT", "--method", "vtp", "--keep", "0.7", "-o", "OUT"], 2, "--train"),
        (
            [
                *("compress", "ARTIFACT", "--method", "vtp", "--keep", "0.7", "--train", "digits"),
                *("--stage", "last", "-o", "OUT"),
            ],
            2,
            "stage",
        ),
        (
            [
                *("compress", "ARTIFACT", "--method", "vtp", "--keep", "0.7", "--train", "digits"),
                *("--set", "training.epoch=3", "-o", "OUT"),
            ],
            2,
            "Did you mean epochs",
        ),
        (
            [
                *(
                    "compress",
                    "ARTIFACT",
                    "--method",
                    "token-merge",
                    "--keep",
                    "0.7",
                    "--epochs",
                    "3",
                ),
                *("-o", "OUT"),
            ],
            2,
            "--epochs is not for it",
        ),
    ],
)
def test_training_that_cannot_work(refused, artifact, tmp_path, args, code, named):
    from PIL import Image

    (tmp_path / "photos").mkdir()
    Image.new("RGB", (30, 30), (80, 10, 200)).save(tmp_path / "photos" / "a.png")
    places = {"ARTIFACT": artifact, "OUT": tmp_path / "out", "PHOTOS": tmp_path / "photos"}
    assert named in refused(code, *(places.get(arg, arg) for arg in args))
    assert not (tmp_path / "out").exists()


def test_no_teacher_wins_over_a_file_that_wants_one(run, artifact, tmp_path):
    file = tmp_path / "c.json"
    file.write_text('{"distill": "soft"}', "utf-8")
    args = ["train", artifact, "--data", "digits:train", "--images", 8, "--epochs", 1]
    assert run(*args, "--config", file, "--distill", "none", "-o", tmp_path / "out")[0] == 0
    record = json.loads((tmp_path / "out" / "record.json").read_text("utf-8"))
    assert record["training"]["settings"]["distill"] is None
    assert record["training"]["teacher"] is None


# -- demo ----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_demo(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = run("demo", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert set(found) == {"rows", "report"}
    dense, *rows = found["rows"]
    assert dense["method"] == "dense"
    assert dense["top1"] > 97
    assert {r["keep"] for r in rows} == {0.6, 0.4}
    assert {"closed-form", "token-merge", "magnitude-uniform"} <= {r["method"] for r in rows}
    for row in rows:
        assert set(row) == {"method", "keep", "macs", "params", "top1"}
        assert row["macs"] <= row["keep"] * dense["macs"]
    best = {r["keep"]: r["top1"] for r in rows if r["method"] == "closed-form"}
    usual = {r["keep"]: r["top1"] for r in rows if r["method"] == "magnitude-uniform"}
    assert best[0.4] >= usual[0.4]
    assert best[0.6] > 95
    assert (tmp_path / found["report"]).is_file()
    # Again, over what it wrote before.
    assert "vitailor-demo" in run("demo", "-o", "vitailor-demo")[2]


def test_the_embedded_model_and_its_preprocessing():
    from vitailor.data import open_images
    from vitailor.demo import digits_model
    from vitailor.evaluation import evaluate

    model, preprocessing = digits_model()
    test = open_images("digits:test", preprocessing, images=100, labels_needed=True)
    assert evaluate(model, test).top1 > 95
