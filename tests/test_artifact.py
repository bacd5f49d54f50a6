"""Artifacts: what comes back, what is refused and why, and what a kill or a full disk leaves."""

from __future__ import annotations

import copy
import errno
import json
import os
import pickle
import resource
import signal
import struct
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from conftest import build, images
from vitailor import artifact, surgery
from vitailor.artifact import folders, store, tensors
from vitailor.errors import ArtifactError, PlanError, UnsupportedModelError
from vitailor.hosts import shape_of
from vitailor.hosts.timm_vit import TimmViT
from vitailor.plan import BlockPlan, Plan
from vitailor.preprocessing import Preprocessing
from vitailor.provenance import Provenance, Step, weights_hash
from vitailor.shape import FORMAT_VERSION, Ranks

GOLDEN = Path(__file__).parent / "golden"
PLAN = Plan(
    blocks=(
        BlockPlan(neurons=tuple(range(9)), attn_features=(0, 3, 7), num_tokens_out=6),
        BlockPlan(mlp_features=(1, 2, 15), ranks=Ranks(fc1=2, q=3)),
    )
)


def step(**changes: Any) -> Step:
    fields = {
        "source": "vit_tiny_patch16_224",
        "weights_hash": "0" * 64,
        "method": "closed-form",
        "settings": {"ridge": 0.1, "criterion": "magnitude"},
        "budget": "macs 0.6",
        "seed": 3,
        "versions": {"torch": "2"},
        "plan": PLAN,
    }
    return Step(**(fields | changes))


def compressed(**known: Any) -> Any:
    """A compressed model with provenance."""
    model: Any = surgery.apply(build(), PLAN)
    fields = {"shape": shape_of(model), "steps": (step(),), "record": {"top1": 71.5}}
    model.vitailor = Provenance(**(fields | known))
    return model


def output(model: nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(images(model))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return artifact.save(compressed(), tmp_path / "small")


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the content of plan.json."""
    content = json.loads((folder / "plan.json").read_text())
    change(content)
    (folder / "plan.json").write_text(json.dumps(content))


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the stored tensors."""
    content = {k: v.clone() for k, v in load_file(folder / "model.safetensors").items()}
    change(content)
    save_file(content, folder / "model.safetensors")


# -- what comes back -----------------------------------------------------------------------------


def test_round_trip(tmp_path):
    preprocessing = Preprocessing(
        input_size=(3, 24, 24),
        crop_pct=0.875,
        interpolation="bilinear",
        mean=(0.1, 0.2, 0.3),
        std=(0.4, 0.5, 0.6),
    )
    names = ("ant", "bee", "cat", "dog", "eel")
    model = compressed(
        steps=(step(), step(seed=4)), preprocessing=preprocessing, class_names=names
    ).train()
    path = artifact.save(model, str(tmp_path / "runs" / "small"))
    assert path == tmp_path / "runs" / "small"
    assert {f.name for f in path.iterdir()} == {
        "plan.json",
        "model.safetensors",
        "record.json",
        "README.md",
    }
    assert [f.name for f in path.parent.iterdir()] == ["small"]
    loaded: Any = artifact.load(path)
    assert type(loaded) is type(model)
    assert not any(m.training for m in loaded.modules())
    assert all(p.requires_grad for p in loaded.parameters())
    assert loaded.vitailor == model.vitailor
    assert shape_of(loaded) == model.vitailor.shape.model_copy(update={"name": ""})
    assert torch.equal(output(loaded), output(model.eval()))
    assert weights_hash(loaded) == weights_hash(model)


def test_plan_json_has_the_promised_keys(saved):
    content = json.loads((saved / "plan.json").read_text())
    assert set(content) == {"version", "shape", "preprocessing", "class_names", "steps"}
    assert content["version"] == FORMAT_VERSION == 1


def test_a_model_without_provenance_is_an_identity_artifact(vit, tmp_path):
    loaded: Any = artifact.load(artifact.save(vit, tmp_path / "same"))
    assert torch.equal(output(loaded), output(vit))
    assert loaded.vitailor.steps == ()
    assert loaded.vitailor.shape == shape_of(vit)
    # timm's for the name, at the size the model was built for.
    assert loaded.vitailor.preprocessing.input_size == (3, 24, 24)
    assert loaded.vitailor.preprocessing.interpolation == "bicubic"
    assert not hasattr(vit, "vitailor")


def test_a_model_of_other_channels(tmp_path):
    loaded = artifact.load(artifact.save(build(in_chans=1), tmp_path / "grey"))
    assert loaded(torch.zeros(1, 1, 24, 24)).shape == (1, 5)


def test_sizes_are_those_at_the_time_of_saving(tmp_path):
    model = compressed(class_names=("a", "b", "c", "d", "e"))
    model.reset_classifier(3)
    model.set_input_size((32, 32))
    loaded: Any = artifact.load(artifact.save(model, tmp_path / "small"))
    assert loaded.vitailor.shape.num_classes == 3
    assert loaded.vitailor.shape.num_tokens == 17
    assert loaded.vitailor.class_names is None
    assert torch.equal(output(loaded), output(model))


def test_saving_what_was_loaded_changes_nothing(saved, tmp_path):
    again = artifact.save(artifact.load(saved), tmp_path / "again")
    for file in saved.iterdir():
        assert (again / file.name).read_bytes() == file.read_bytes()
    assert artifact.load(again).vitailor.shape.name == "vit_tiny_patch16_224"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype_stays(tmp_path, dtype):
    model = compressed().to(dtype)
    model.blocks[0].norm1.float()
    loaded = artifact.load(artifact.save(model, tmp_path / "small"))
    types = {n: t.dtype for n, t in loaded.state_dict().items()}
    assert types == {n: t.dtype for n, t in model.state_dict().items()}
    assert types["head.weight"] == dtype
    assert types["blocks.0.norm1.weight"] == torch.float32


def test_views_and_shared_storage_are_saved_as_they_read(tmp_path):
    model = build()
    both = torch.randn(2, 64, 16)
    model.blocks[0].mlp.fc1.weight = nn.Parameter(both[0])
    model.blocks[1].mlp.fc1.weight = nn.Parameter(both[1])
    model.blocks[0].mlp.fc2.weight = nn.Parameter(torch.randn(64, 16).t())
    path = artifact.save(model, tmp_path / "small")
    assert torch.equal(output(artifact.load(path)), output(model))
    assert (path / "model.safetensors").stat().st_size < 60_000


def test_the_file_may_change_while_the_model_lives(saved):
    loaded = artifact.load(saved)
    before = output(loaded)
    with (saved / "model.safetensors").open("r+b") as file:
        file.truncate(10)
    assert torch.equal(output(loaded), before)


def test_saving_and_loading_leave_model_and_random_state_alone(tmp_path):
    model = compressed().train()
    before = (weights_hash(model), model.vitailor, torch.get_rng_state().tolist())
    artifact.load(artifact.save(model, tmp_path / "small"), device="cpu")
    assert (weights_hash(model), model.vitailor, torch.get_rng_state().tolist()) == before
    assert all(m.training for m in model.modules())


def test_loaded_models_train_and_copy(saved):
    model: Any = artifact.load(saved).train()
    model(images(model)).sum().backward()
    assert all(p.grad is not None for p in model.blocks.parameters())
    assert copy.deepcopy(model).vitailor == model.vitailor


@pytest.mark.parametrize("version", range(1, FORMAT_VERSION + 1))
def test_every_released_version_loads(version):
    model: Any = artifact.load(GOLDEN / f"v{version}")
    stored = load_file(GOLDEN / f"v{version}.safetensors")
    with torch.inference_mode():
        torch.testing.assert_close(model(stored["input"]), stored["output"], rtol=1e-4, atol=1e-4)
    assert model.vitailor.class_names == ("ant", "bee", "cat", "dog", "eel")
    assert model.vitailor.steps[0].plan.blocks[0].heads == (1,)
    assert model.vitailor.record["top1"]["after"] == 70.25
    assert model.vitailor.preprocessing.crop_pct == 0.9


def test_golden_artifacts_are_small():
    files = [f for f in GOLDEN.rglob("*") if f.is_file()]
    assert len(files) >= 1 + 5 * FORMAT_VERSION
    assert sum(f.stat().st_size for f in files) < 60 * 1024 * FORMAT_VERSION


# -- hashes --------------------------------------------------------------------------------------


def test_weights_hash_is_of_names_and_values(vit):
    first = weights_hash(vit)
    assert len(first) == 64
    assert weights_hash(copy.deepcopy(vit)) == first
    vit.blocks[0].mlp.fc2.weight = nn.Parameter(vit.blocks[0].mlp.fc2.weight.t().contiguous().t())
    assert weights_hash(vit) == first
    assert weights_hash(copy.deepcopy(vit).double()) != first
    with torch.no_grad():
        vit.head.bias[3] += 1e-6
    assert weights_hash(vit) != first


def test_weights_hash_does_not_depend_on_order_and_tells_names_apart():
    def module(**sizes: int) -> nn.Module:
        holder = nn.Module()
        for name, size in sizes.items():
            holder.register_buffer(name, torch.zeros(size))
        return holder

    assert weights_hash(module(a=1, b=2)) == weights_hash(module(b=2, a=1))
    assert weights_hash(module(a=1, b=2)) != weights_hash(module(a=2, b=1))
    assert weights_hash(module(a=1)) != weights_hash(module(b=1))


def test_weights_hash_stays_the_same_over_versions():
    assert weights_hash(artifact.load(GOLDEN / "v1")) == GOLDEN_HASH


GOLDEN_HASH = "ea32173fd821ae281edfb00aaa331598d7ccbebf9fc1895d4b125ba1d5caccee"


# -- card and record -----------------------------------------------------------------------------


def test_model_card(tmp_path):
    record = {
        "macs": {"before": 95_568, "after": 1},
        "params": {"before": 9_941, "after": 1},
        "top1": {"before": 72.5, "after": 70.25, "interval": [-3.5, -1.0]},
        "evaluated_on": "digits",
        "images": 1500,
    }
    model = compressed(record=record)
    card = (artifact.save(model, tmp_path / "small") / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: vitailor\n")
    shape = shape_of(model)
    for part in (
        "# vit_tiny_patch16_224, compressed by vitailor",
        "closed-form within macs 0.6",
        f"| MACs (multiply-adds) | 95,568 | {shape.macs:,} |",
        f"| parameters | 9,941 | {shape.params:,} |",
        "from_pretrained(",
        "| now | 70.25 |",
        "| difference, 95% interval | -3.50 to -1.00 |",
        "Measured on digits (1,500 images).",
        "| 0 | 2 | 8 | 8 | 9 | 10 | 6 | dense |",
        "| 1 | 2 | 8 | 8 | 64 | 6 | 6 | q 3, fc1 2 |",
    ):
        assert part in card
    assert "{" not in card


@pytest.mark.parametrize(
    ("record", "part"),
    [
        ({}, "Not measured."),
        ({"top1": 71.5}, "| now | 71.50 |"),
        ({"top1": {"after": 71}}, "| now | 71.00 |"),
        ({"top1": "high", "macs": 3, "params": {"before": "many"}}, "Not measured."),
        ({"top1": {"after": 1.0, "interval": [1]}}, "| now | 1.00 |"),
    ],
)
def test_model_card_of_any_record(tmp_path, record, part):
    card = (artifact.save(compressed(record=record), tmp_path / "small") / "README.md").read_text()
    assert part in card
    assert "| MACs (multiply-adds) | not recorded |" in card


def test_a_record_that_json_has_no_words_for_does_not_stop_saving(tmp_path):
    record = {
        "nan": float("nan"),
        "path": tmp_path,
        "odd": object(),
        "t": torch.zeros(1),
        "x": (1,),
    }
    loaded: Any = artifact.load(artifact.save(compressed(record=record), tmp_path / "small"))
    assert loaded.vitailor.record["nan"] is None
    assert loaded.vitailor.record["path"] == str(tmp_path)
    assert loaded.vitailor.record["x"] == [1]


# -- what is not written -------------------------------------------------------------------------


def test_models_that_could_not_be_loaded_are_not_saved(vit, tmp_path):
    target = tmp_path / "small"
    with pytest.raises(UnsupportedModelError):
        artifact.save(nn.Linear(2, 2), target)
    vit.extra = nn.Parameter(torch.zeros(3))
    with pytest.raises(ArtifactError, match=r"1 unexpected \('extra'\)"):
        artifact.save(vit, target)
    with pytest.raises(ArtifactError, match="meta device"):
        artifact.save(build().to("meta"), target)
    with pytest.raises(ArtifactError, match="has dtype"):
        artifact.save(build().to(torch.float8_e4m3fn), target)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_holds_something_is_not_replaced(saved):
    model = build()
    before = output(artifact.load(saved))
    with pytest.raises(ArtifactError, match="not empty") as caught:
        artifact.save(model, saved)
    assert "--overwrite" in caught.value.fix
    assert torch.equal(output(artifact.load(saved)), before)
    artifact.save(model, saved, overwrite=True)
    assert torch.equal(output(artifact.load(saved)), output(model))
    assert [f.name for f in saved.parent.iterdir()] == ["small"]


def test_an_empty_folder_is_filled_and_keeps_its_permissions(vit, tmp_path):
    target = tmp_path / "small"
    target.mkdir(mode=0o750)
    artifact.save(vit, target)
    assert target.stat().st_mode & 0o777 == 0o750
    assert artifact.is_artifact(target)


@pytest.mark.parametrize("one_step", [True, False])
def test_overwriting_keeps_files_of_others(saved, one_step, monkeypatch):
    if not one_step:
        monkeypatch.setattr(folders, "_exchange", lambda a, b: False)
    (saved / "notes.txt").write_text("mine")
    (saved / "checkpoints" / "last").mkdir(parents=True)
    (saved / "checkpoints" / "last" / "state.pt").write_bytes(b"123")
    (saved / "link").symlink_to("notes.txt")
    artifact.save(build(), saved, overwrite=True)
    assert (saved / "notes.txt").read_text() == "mine"
    assert (saved / "checkpoints" / "last" / "state.pt").read_bytes() == b"123"
    assert (saved / "link").is_symlink()
    assert artifact.load(saved).vitailor.steps == ()
    assert [f.name for f in saved.parent.iterdir()] == ["small"]


def test_files_are_copied_where_there_are_no_hard_links(saved, monkeypatch):
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.EPERM, "no links")

    monkeypatch.setattr(os, "link", refuse)
    (saved / "notes.txt").write_text("mine")
    artifact.save(build(), saved, overwrite=True)
    assert (saved / "notes.txt").read_text() == "mine"


def test_a_file_is_no_folder(vit, tmp_path):
    (tmp_path / "small").write_text("x")
    for overwrite in (False, True):
        with pytest.raises(ArtifactError, match="is a file"):
            artifact.save(vit, tmp_path / "small", overwrite=overwrite)
    assert (tmp_path / "small").read_text() == "x"


def test_the_current_folder_is_not_replaced(vit, tmp_path, monkeypatch):
    (tmp_path / "inner").mkdir()
    monkeypatch.chdir(tmp_path / "inner")
    for path in (".", tmp_path, "/"):
        with pytest.raises(ArtifactError, match="current folder"):
            artifact.save(vit, path, overwrite=True)


def test_a_link_to_a_folder_stays_a_link(saved):
    link = saved.parent / "link"
    link.symlink_to(saved)
    artifact.save(build(), link, overwrite=True)
    assert link.is_symlink()
    assert artifact.load(saved).vitailor.steps == ()


def test_names_with_odd_characters(vit, tmp_path):
    target = artifact.save(vit, tmp_path / "ä [*] b=c")
    artifact.save(vit, target, overwrite=True)
    assert artifact.is_artifact(target)
    assert len(list(tmp_path.iterdir())) == 1


# -- full disks ----------------------------------------------------------------------------------


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("limit", [100, 20_000])
def test_no_space_left(tmp_path, overwrite, limit):
    """A real limit: writing fails at the first file, and in the middle of the tensors."""
    target = tmp_path / "small"
    if overwrite:
        artifact.save(compressed(), target)
    before = {f: f.read_bytes() for f in target.glob("*")}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(ArtifactError) as caught:
            artifact.save(build(), target, overwrite=overwrite)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.message == f"Cannot write {target}: File too large."
    assert "Free some space" in caught.value.fix
    assert [f.name for f in tmp_path.iterdir()] == (["small"] if overwrite else [])
    assert {f: f.read_bytes() for f in target.glob("*")} == before


@pytest.mark.parametrize("name", ["write_tensors", "model_card"])
def test_system_errors_become_one_line(vit, tmp_path, monkeypatch, name):
    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "model.safetensors")

    monkeypatch.setattr(store, name, fail)
    with pytest.raises(
        ArtifactError, match=r"Cannot write .*: No space left on device\."
    ) as caught:
        artifact.save(vit, tmp_path / "small")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_an_interrupt_leaves_nothing(vit, tmp_path, monkeypatch):
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(store, "write_tensors", interrupt)
    with pytest.raises(KeyboardInterrupt):
        artifact.save(vit, tmp_path / "small")
    assert not list(tmp_path.iterdir())


def test_where_writing_is_not_allowed(vit, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match=r"Cannot write .*: (Not a directory|File exists)"):
        artifact.save(vit, tmp_path / "file" / "small")


def test_the_old_folder_returns_when_the_new_one_cannot_be_put_in_place(saved, monkeypatch):
    monkeypatch.setattr(folders, "_exchange", lambda a, b: False)
    rename = Path.rename

    def fail_once(self: Path, target: Path) -> Path:
        if "vitailor-new" in self.name:
            raise OSError(errno.EBUSY, "busy")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_once)
    before = weights_hash(artifact.load(saved))
    with pytest.raises(ArtifactError, match="busy"):
        artifact.save(build(), saved, overwrite=True)
    assert weights_hash(artifact.load(saved)) == before
    assert [f.name for f in saved.parent.iterdir()] == ["small"]


# -- kills ---------------------------------------------------------------------------------------


def killed(action: Callable[[], object]) -> None:
    """Run an action in a child process that it kills."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # fork in a process with threads
        child = os.fork()
    if child == 0:
        try:
            action()
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGKILL


def kill(*_: Any, **__: Any) -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


POINTS = {
    "while writing tensors": (store, "write_tensors", True),
    "before anything is renamed": (folders, "_put_in_place", True),
    "between two renames": (folders, "_exchange", True),
    "before the old one is removed": (folders.shutil, "rmtree", False),
}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("point", POINTS)
def test_a_kill_leaves_the_old_artifact_or_the_new_one(saved, point):
    owner, name, old_stays = POINTS[point]
    old, model = artifact.load(saved), build()

    def save_until_killed() -> None:
        if name == "_exchange":
            rename, count = Path.rename, []

            def second_kills(self: Path, target: Path) -> Path:
                count.append(target)
                return kill() if len(count) == 2 else rename(self, target)

            folders._exchange = lambda a, b: False
            Path.rename = second_kills
        elif name == "write_tensors":

            def half(tensors: Any, file: Path) -> None:
                file.write_bytes(b"half")
                kill()

            store.write_tensors = half
        else:
            setattr(owner, name, kill)
        artifact.save(model, saved, overwrite=True)

    killed(save_until_killed)
    assert len(list(saved.parent.iterdir())) > 1
    assert saved.exists() == (point != "between two renames")
    # Whoever looks now finds a whole artifact; looking changes nothing.
    content = sorted(saved.parent.rglob("*"))
    assert artifact.is_artifact(saved)
    expected = old if old_stays else model
    assert torch.equal(output(artifact.load(saved)), output(expected))
    assert torch.equal(output(artifact.from_pretrained(saved)), output(expected))
    assert sorted(saved.parent.rglob("*")) == content
    # The next writer still refuses to overwrite unasked, and then clears up.
    with pytest.raises(ArtifactError, match="not empty"):
        artifact.save(model, saved)
    for left in saved.parent.glob(".small.vitailor-new-*"):
        os.utime(left, (0, 0))
    artifact.save(model, saved, overwrite=True)
    assert torch.equal(output(artifact.load(saved)), output(model))
    assert [f.name for f in saved.parent.iterdir()] == ["small"]


def test_folders_of_living_or_recent_writers_are_left_alone(saved):
    alive = saved.parent / ".small.vitailor-new-alive"
    recent = saved.parent / ".small.vitailor-new-recent"
    other = saved.parent / ".other.vitailor-new-dead"
    for folder in (alive, recent, other):
        folder.mkdir()
    for folder in (alive, other):
        os.utime(folder, (0, 0))
    assert time.time() - recent.stat().st_mtime < folders.STALE_SECONDS
    lock = folders._lock(alive)
    artifact.save(build(), saved, overwrite=True)
    os.close(lock)
    assert all(folder.exists() for folder in (alive, recent, other))
    artifact.save(build(), saved, overwrite=True)
    assert not alive.exists()


@pytest.mark.skipif(sys.platform != "linux", reason="a system call of Linux")
def test_folders_are_exchanged_in_one_step(saved, monkeypatch):
    done = []
    exchange = folders._exchange
    monkeypatch.setattr(folders, "_exchange", lambda a, b: done.append(exchange(a, b)) or done[-1])
    artifact.save(build(), saved, overwrite=True)
    if done == [False]:
        pytest.skip("this file system cannot")
    assert done == [True]


@pytest.mark.skipif(sys.platform != "linux", reason="a system call of Linux")
def test_exchange_tells_what_it_cannot_do_from_what_went_wrong(tmp_path):
    with pytest.raises(FileNotFoundError):
        folders._exchange(tmp_path / "a", tmp_path / "b")


# -- what is refused -----------------------------------------------------------------------------


def deep(content: dict[str, Any]) -> None:
    value: Any = []
    for _ in range(900):
        value = [value]
    content["shape"]["architecture"]["kwargs"]["img_size"] = value


def set_shape(**changes: Any) -> Callable[[dict[str, Any]], object]:
    return lambda c: c["shape"].update(changes)


def set_kwargs(**changes: Any) -> Callable[[dict[str, Any]], object]:
    return lambda c: c["shape"]["architecture"]["kwargs"].update(changes)


def set_block(**changes: Any) -> Callable[[dict[str, Any]], object]:
    return lambda c: c["shape"]["blocks"][0].update(changes)


BAD_PLANS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "newer version": (lambda c: c.update(version=2), "format version 2; .* Upgrade"),
    "newer version with new fields": (lambda c: c.update(version=9, x=1), "format version 9"),
    "version zero": (lambda c: c.update(version=0), "no format version"),
    "version as text": (lambda c: c.update(version="1"), "no format version"),
    "version true": (lambda c: c.update(version=True), "no format version"),
    "no version": (lambda c: c.pop("version"), "no format version"),
    "no shape": (lambda c: c.pop("shape"), "field 'shape'"),
    "unknown field": (lambda c: c.update(code="import os"), "field 'code'"),
    "steps no list": (lambda c: c.update(steps=3), "field 'steps'"),
    "bad preprocessing": (
        lambda c: c.update(preprocessing={"crop_pct": -1}),
        "'preprocessing",
    ),
    "class names": (lambda c: c.update(class_names=["a"]), "1 class names for 5 classes"),
    "class names no text": (lambda c: c.update(class_names=[1] * 5), "class_names"),
    "unknown host": (set_shape(host="os"), "Unknown host library 'os'"),
    "host is a path": (set_shape(host="../x"), "Unknown host library"),
    "unknown class": (
        lambda c: c["shape"]["architecture"].update({"class": "Sequential"}),
        "Unknown timm class",
    ),
    "no architecture": (set_shape(architecture={}), "Unknown timm class 'None'"),
    "arguments no object": (
        lambda c: c["shape"]["architecture"].update(kwargs=[1]),
        "cannot build",
    ),
    "width": (set_shape(embed_dim=32), "parameters, the tensors"),
    "negative width": (set_shape(embed_dim=-16), "embed_dim"),
    "more blocks": (lambda c: c["shape"]["blocks"].append(c["shape"]["blocks"][1]), "parameters"),
    "fewer blocks": (lambda c: c["shape"]["blocks"].pop(), "parameters"),
    "heads": (set_block(num_heads=4), "parameters"),
    "features": (set_block(attn_features=4), "parameters"),
    "more tokens": (set_block(num_tokens_out=11), "num_tokens_out"),
    "outer parameters": (set_shape(outer_params=1), "parameters"),
    "outer MACs": (set_shape(outer_macs=1), "'outer_macs' of the stored shape"),
    "prefix": (set_shape(num_prefix_tokens=2), "'num_prefix_tokens' of the stored shape"),
    "matching": (set_shape(matching="x"), "matching"),
    "device": (set_kwargs(device="cpu"), "Unknown argument 'device'"),
    "image size": (set_kwargs(img_size=[32, 32]), "1 of another size .'pos_embed'"),
    "image size zero": (set_kwargs(img_size=[0, 0]), "cannot build|another size"),
    "huge image size": (set_kwargs(img_size=[10**12, 10**12]), "cannot build|another size"),
    "huge image size as float": (set_kwargs(img_size=[1e300, 1e300]), "cannot build"),
    "patch size zero": (set_kwargs(patch_size=[0, 0]), "cannot build"),
    "huge registers": (set_kwargs(reg_tokens=10**15), "unexpected|missing|cannot build"),
    "channels as text": (set_kwargs(in_chans="3"), "cannot build"),
    "nested too deep": (deep, "cannot build|not JSON|field"),
    "layer scale": (set_kwargs(init_values=1e-5), "missing"),
}


@pytest.mark.parametrize("case", BAD_PLANS)
def test_bad_plans_are_refused_with_the_reason(saved, case):
    change, message = BAD_PLANS[case]
    edit(saved, change)
    with pytest.raises((ArtifactError, PlanError), match=message) as caught:
        artifact.load(saved)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\xff\xfe\x00", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[]", "no format version"),
        (b"3", "no format version"),
        (b'{"version": ' + b"1" * 5000 + b"}", "not JSON"),
    ],
)
def test_what_is_no_plan_is_refused(saved, text, message):
    (saved / "plan.json").write_bytes(text)
    with pytest.raises(ArtifactError, match=message):
        artifact.load(saved)


def test_a_giant_plan_is_not_read(saved, monkeypatch):
    monkeypatch.setattr(store, "MAX_JSON_BYTES", 100)
    with pytest.raises(ArtifactError, match="too large"):
        artifact.load(saved)


@pytest.mark.parametrize("field", ["embed_dim", "mlp_dim", "num_heads", "depth"])
def test_absurd_sizes_are_refused_before_anything_is_built(saved, monkeypatch, field):
    def grow(content: dict[str, Any]) -> None:
        shape = content["shape"]
        if field == "embed_dim":
            shape["embed_dim"] = 10**12
        elif field == "depth":
            shape["blocks"] += [shape["blocks"][-1]] * 2000
        else:
            shape["blocks"][0][field] = 10**12

    edit(saved, grow)
    monkeypatch.setattr(TimmViT, "skeleton", lambda *_: pytest.fail("built"))
    with pytest.raises((ArtifactError, PlanError), match="parameters"):
        artifact.load(saved)


def test_huge_sizes_take_no_memory(saved):
    """Even a plan that agrees with itself builds nothing but a skeleton without storage."""

    def grow(content: dict[str, Any]) -> None:
        content["shape"]["architecture"]["kwargs"]["img_size"] = [8 * 10**5, 8 * 10**5]

    edit(saved, grow)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ArtifactError):
        artifact.load(saved)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB


FC1 = "blocks.0.mlp.fc1.weight"
FEATURES = "blocks.0.attn.qkv.features"
BAD_TENSORS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], object], str]] = {
    "one missing": (lambda t: t.pop("head.bias"), "parameters"),
    "one renamed": (
        lambda t: t.update(tail=t.pop("head.bias")),
        r"1 missing \('head.bias'\); 1 unexpected \('tail'\)",
    ),
    "one more": (lambda t: t.update(more=torch.zeros(2)), "parameters"),
    "one more index": (
        lambda t: t.update({"x.features": torch.zeros(2, dtype=torch.long)}),
        r"1 unexpected \('x.features'\)",
    ),
    "turned": (
        lambda t: t.update({FC1: t[FC1].t().contiguous()}),
        r"'blocks.0.mlp.fc1.weight' is \(16, 9\) instead of \(9, 16\)",
    ),
    "integers": (lambda t: t.update({FC1: t[FC1].long()}), "dtype I64, not F64 or F32"),
    "bytes": (lambda t: t.update({FC1: t[FC1].to(torch.uint8)}), "dtype U8"),
    "index as float": (lambda t: t.update({FEATURES: t[FEATURES].float()}), "dtype F32, not I64"),
    "index missing": (lambda t: t.pop(FEATURES), "1 missing"),
    "index too large": (
        lambda t: t.update({FEATURES: torch.tensor([0, 3, 16])}),
        "'blocks.0.attn.qkv.features' must hold strictly increasing indices from 0 to 15",
    ),
    "index negative": (lambda t: t.update({FEATURES: torch.tensor([-1, 3, 7])}), "strictly"),
    "index repeated": (lambda t: t.update({FEATURES: torch.tensor([3, 3, 7])}), "strictly"),
    "index unordered": (lambda t: t.update({FEATURES: torch.tensor([0, 9, 7])}), "strictly"),
    "index overflow": (
        lambda t: t.update({FEATURES: torch.tensor([-(2**63), 2**63 - 1, 5])}),
        "strictly",
    ),
    "empty": (lambda t: t.clear(), "parameters"),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_bad_tensors_are_refused_with_the_reason(saved, case):
    change, message = BAD_TENSORS[case]
    rewrite(saved, change)
    with pytest.raises(ArtifactError, match=message):
        artifact.load(saved)


def header(content: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(content) if length is None else length) + content


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"garbage",
        header(b"{}", 10**18),
        header(b"{}", 10**6),
        header(b"not json"),
        header(b'{"a":{"dtype":"F32","shape":[1000000000,1000],"data_offsets":[0,4]}}') + b"1234",
        header(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}') + b"12",
        header(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}') + b"1234567",
        header(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[-4,0]}}') + b"1234",
        header(b'{"a":{"dtype":"WAT","shape":[1],"data_offsets":[0,4]}}') + b"1234",
    ],
)
def test_damaged_tensor_files_are_refused(saved, content):
    (saved / "model.safetensors").write_bytes(content)
    with pytest.raises(ArtifactError, match=r"model\.safetensors cannot be read"):
        artifact.load(saved)


def test_a_truncated_file_is_refused(saved):
    file = saved / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match="cannot be read"):
        artifact.load(saved)


class Trap:
    """Leaves a trace when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.trace,)


@pytest.mark.parametrize("name", ["model.safetensors", "plan.json", "record.json"])
def test_pickles_are_not_run(saved, tmp_path, name):
    trace = tmp_path / "trace"
    (saved / name).write_bytes(pickle.dumps(Trap(trace)))
    (saved / "model.pt").write_bytes(pickle.dumps(Trap(trace)))
    (saved / "__init__.py").write_text(f"open({str(trace)!r}, 'w')")
    if name == "record.json":
        with pytest.warns(UserWarning, match="record is left out"):
            artifact.load(saved)
    else:
        with pytest.raises(ArtifactError):
            artifact.load(saved)
    assert not trace.exists()
    pickle.loads(pickle.dumps(Trap(trace)))
    assert trace.exists()


@pytest.mark.parametrize("name", ["plan.json", "model.safetensors"])
def test_missing_files_are_named(saved, name):
    (saved / name).unlink()
    with pytest.raises(ArtifactError, match=f"is no artifact: it has no {name}"):
        artifact.load(saved)
    (saved / name).mkdir()
    with pytest.raises(ArtifactError, match=f"it has no {name}"):
        artifact.load(saved)


def test_what_is_no_folder_is_refused(saved, tmp_path):
    with pytest.raises(ArtifactError, match="no folder"):
        artifact.load(tmp_path / "nothing")
    with pytest.raises(ArtifactError):
        artifact.load(saved / "plan.json")
    assert not artifact.is_artifact(tmp_path / "nothing")
    assert not artifact.is_artifact(saved / "plan.json")
    assert artifact.is_artifact(saved)


def test_a_folder_replaced_while_it_is_read_is_noticed(saved, monkeypatch):
    read = store.read_tensors

    def replaced(*arguments: Any) -> nn.Module:
        model = read(*arguments)
        artifact.save(build(), saved, overwrite=True)
        return model

    monkeypatch.setattr(store, "read_tensors", replaced)
    with pytest.raises(ArtifactError, match="replaced while it was read"):
        artifact.load(saved)


# -- what does not matter to loading -------------------------------------------------------------


def test_steps_that_cannot_be_parsed_are_left_out(saved):
    edit(saved, lambda c: c["steps"].extend([{"source": 3}, 7, None, c["steps"][0] | {"new": 1}]))
    with pytest.warns(UserWarning, match="Step [2-5] of the artifact is left out") as caught:
        model: Any = artifact.load(saved)
    assert len(caught) == 4
    assert model.vitailor.steps == (step(),)


def test_steps_are_not_understood(saved):
    """A plan in a step that does not fit the model is history, not an instruction."""
    edit(saved, lambda c: c["steps"][0]["plan"]["blocks"].pop())
    model: Any = artifact.load(saved)
    assert len(model.vitailor.steps[0].plan.blocks) == 1
    assert torch.equal(output(model), output(compressed()))


@pytest.mark.parametrize("text", ["", "[1]", "{", '"x"'])
def test_a_damaged_record_is_left_out(saved, text):
    (saved / "record.json").write_text(text)
    with pytest.warns(UserWarning, match="record is left out"):
        model: Any = artifact.load(saved)
    assert model.vitailor.record == {}


def test_record_and_card_may_be_missing(saved):
    (saved / "README.md").unlink()
    (saved / "record.json").unlink()
    with pytest.warns(UserWarning, match="record is left out"):
        assert artifact.load(saved).vitailor.record == {}


# -- mismatches in words -------------------------------------------------------------------------


def test_mismatches_are_counted_and_the_first_named():
    expected = {f"n{i}": (i,) for i in range(6)}
    assert artifact.describe_mismatch(expected, expected) == ""
    found = {"n0": (0,), "n1": (7,), "z": (1,)}
    assert artifact.describe_mismatch(expected, found) == (
        "4 missing ('n2', 'n3', 'n4', ...); 1 unexpected ('z'); "
        "1 of another size ('n1' is (7,) instead of (1,))"
    )


def test_tensors_are_described_as_their_file_would(saved):
    model = artifact.load(saved)
    assert tensors.entries_of(model.state_dict())[FEATURES] == tensors.Entry("I64", (3,))


# -- the hub -------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub in a folder: repositories are subfolders."""
    import shutil

    import huggingface_hub

    root, calls = tmp_path / "hub", []

    class Api:
        def __init__(self, token: str | None = None) -> None:
            calls.append(("token", token))

        def create_repo(self, repo_id: str, *, private: bool | None, exist_ok: bool) -> Any:
            calls.append(("create", repo_id, private, exist_ok))
            (root / repo_id).mkdir(parents=True, exist_ok=True)
            return SimpleNamespace(repo_id=repo_id)

        def upload_folder(self, *, repo_id: str, folder_path: Path, **_: Any) -> str:
            shutil.copytree(folder_path, root / repo_id, dirs_exist_ok=True)
            return f"hub:{repo_id}"

    def snapshot_download(repo_id: str, *, allow_patterns: list[str], **_: Any) -> str:
        if not (root / repo_id).is_dir():
            raise ConnectionError("Name or service not known\nmore lines")
        copy = tmp_path / "cache"
        copy.mkdir()
        for name in allow_patterns:
            # As in the hub's cache: links to files elsewhere.
            (copy / name).symlink_to(root / repo_id / name)
        return str(copy)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return calls


def test_hub_round_trip(hub):
    model = compressed()
    address = artifact.push_to_hub(model, "me/small", private=True, token="t")
    assert address == "hub:me/small"
    assert hub == [("token", "t"), ("create", "me/small", True, True)]
    loaded: Any = artifact.from_pretrained("me/small")
    assert torch.equal(output(loaded), output(model))
    assert loaded.vitailor == model.vitailor


def test_a_folder_wins_over_a_repository(hub, saved, monkeypatch):
    monkeypatch.chdir(saved.parent)
    (saved.parent / "me").mkdir()
    os.rename(saved, saved.parent / "me" / "small")  # noqa: PTH104
    assert artifact.from_pretrained("me/small").vitailor.steps
    assert artifact.from_pretrained(Path("me/small"), device="cpu").vitailor.steps


def test_hub_errors_are_one_line(hub, monkeypatch):
    with pytest.raises(
        ArtifactError, match=r"Cannot get me/none.*: Name or service not known\."
    ) as e:
        artifact.from_pretrained("me/none")
    assert "\n" not in str(e.value)
    with pytest.raises(ArtifactError, match="no folder"):
        artifact.from_pretrained("./none")
    import huggingface_hub

    def refuse(*_: Any, **__: Any) -> None:
        raise ValueError("Repo id must be in the form 'owner/name'")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", refuse)
    with pytest.raises(ArtifactError, match="Cannot upload to a b: Repo id must"):
        artifact.push_to_hub(build(), "a b")


def test_without_network_the_hub_says_so():
    with pytest.raises(ArtifactError, match="Cannot get nobody/nothing"):
        artifact.from_pretrained("nobody/nothing")


def test_all_files_may_be_read_by_those_who_may_read_one(tmp_path):
    folder = artifact.save(build(), tmp_path / "small")
    assert len({file.stat().st_mode for file in folder.iterdir()}) == 1
