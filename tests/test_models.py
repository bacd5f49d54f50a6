"""Opening models by name: timm, artifacts, local weights, and everything that can be wrong with them."""

from __future__ import annotations

import pickle
from argparse import Namespace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from conftest import build, randomise
from vitailor import artifact, models, surgery
from vitailor.errors import (
    ArtifactError,
    PlanError,
    UnsupportedModelError,
    UsageError,
    WeightsError,
)
from vitailor.hosts import shape_of
from vitailor.models import open_model, read_weights
from vitailor.plan import BlockPlan, Plan
from vitailor.provenance import Provenance

NAME = "test_vit"  # timm's own tiny one: six blocks of width 64


@cache
def reference() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        return randomise(timm.create_model(NAME, num_classes=7)).eval()


@pytest.fixture
def state() -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in reference().state_dict().items()}


def same(model: nn.Module, state: dict[str, Tensor]) -> bool:
    found = model.state_dict()
    return found.keys() == state.keys() and all(torch.equal(found[n], state[n]) for n in state)


# -- names ---------------------------------------------------------------------------------------


def test_a_timm_name():
    opened = open_model(NAME, pretrained=False)
    assert opened.source == NAME
    assert opened.model.num_classes == 1000
    assert not opened.model.training
    assert shape_of(opened.model).name == NAME
    assert open_model(NAME, pretrained=False, num_classes=3).model.num_classes == 3
    assert open_model(f"{NAME}.r160_in1k", pretrained=False).model.num_classes == 1000


def test_the_random_state_is_left_alone(state, tmp_path):
    save_file(state, tmp_path / "w.safetensors")
    before = torch.get_rng_state()
    open_model(NAME, pretrained=False)
    open_model(NAME, weights=tmp_path / "w.safetensors")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("name", "close"),
    [
        ("vit_tiny_patch16_244", "vit_tiny_patch16_224"),
        ("deit_tinny_patch16_224", "deit_tiny_patch16_224"),
        ("test_vit.r160_in22k", "test_vit.r160_in1k"),
        ("T2T-ViT-14", "t2t_vit_14"),
        ("t2t_vit_8", "t2t_vit_7"),
    ],
)
def test_unknown_names_come_with_close_ones(name, close):
    with pytest.raises(UnsupportedModelError, match=f"'{name}' is neither") as caught:
        open_model(name)
    assert close in caught.value.fix


@pytest.mark.parametrize("name", ["", "zzzzqqq", "hf-hub:timm/x", "vit tiny", "."])
def test_nonsense_is_refused(name):
    with pytest.raises((UnsupportedModelError, ArtifactError)):
        open_model(name)


@pytest.mark.parametrize(
    "name",
    [
        "transformers:google/vit-base",
        "torchvision:vit_b_16",
    ],
)
def test_other_hosts_are_refused_by_name(name, tmp_path):
    for spec in (name, f"{name}={tmp_path / 'w.pth'}"):
        with pytest.raises(UnsupportedModelError, match="this version does not support") as caught:
            open_model(spec)
        assert name in caught.value.message


@pytest.mark.parametrize(
    "name", ["swin_tiny_patch4_window7_224", "resnet18", "vit_small_patch16_dinov3"]
)
def test_unsupported_architectures_are_refused_before_a_download(name, monkeypatch):
    monkeypatch.setattr(models, "_pretrained", lambda *_: pytest.fail("downloads"))
    with pytest.raises(UnsupportedModelError, match="Cannot account for the model"):
        open_model(name)


def test_what_cannot_be_built_without_storage_is_checked_all_the_same(monkeypatch):
    def unwilling(name: str, num_classes: int | None) -> nn.Module:
        if torch.get_default_device().type == "meta":
            raise NotImplementedError("Cannot copy out of meta tensor; no data!")  # torch's own
        return nn.Linear(2, 2)

    monkeypatch.setattr(models, "_build", unwilling)
    with pytest.raises(UnsupportedModelError):
        open_model(NAME, pretrained=False)


# -- pretrained weights --------------------------------------------------------------------------


def test_pretrained_weights_are_the_default(monkeypatch):
    asked: list[Any] = []
    model = reference()

    def create(name: str, **arguments: Any) -> nn.Module:
        asked.append((name, arguments))
        return model

    monkeypatch.setattr(models.timm, "create_model", create)
    assert open_model(NAME, num_classes=7).model is model
    assert asked[-1] == (NAME, {"pretrained": True, "num_classes": 7})


def test_without_network_local_weights_are_suggested():
    with pytest.raises(
        WeightsError, match=f"Cannot get the pretrained weights of {NAME}"
    ) as caught:
        open_model(NAME)
    assert f"--weights FILE or {NAME}=FILE" in caught.value.fix
    assert "\n" not in str(caught.value)


def test_a_name_without_pretrained_weights_says_so():
    with pytest.raises(WeightsError, match="No pretrained weights exist"):
        open_model("vit_betwixt_patch16_gap_256")


# -- local weights -------------------------------------------------------------------------------


def write(content: Any, file: Path) -> Path:
    if file.suffix == ".safetensors":
        save_file(content, file)
    else:
        torch.save(content, file)
    return file


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt", ".bin"])
@pytest.mark.parametrize("way", ["weights", "name=file"])
def test_local_weights_need_no_download(state, tmp_path, monkeypatch, suffix, way):
    monkeypatch.setattr(models, "_pretrained", lambda *_: pytest.fail("downloads"))
    file = write(state, tmp_path / f"w{suffix}")
    opened = open_model(NAME, weights=file) if way == "weights" else open_model(f"{NAME}={file}")
    assert opened.source == f"{NAME}={file}"
    assert same(opened.model, state)
    assert opened.model.num_classes == 7
    assert not opened.model.training


WRAPPED = {
    "model": lambda s: {"model": s, "epoch": 3, "optimizer": {"state": {}}},
    "state_dict": lambda s: {"state_dict": s, "best": 0.7},
    "ema wins": lambda s: {"state_dict": {k: v + 1 for k, v in s.items()}, "state_dict_ema": s},
    "model ema wins": lambda s: {"model": {k: v + 1 for k, v in s.items()}, "model_ema": s},
    "twice": lambda s: {"checkpoint": 1, "model": {"state_dict": s}},
    "module.": lambda s: {f"module.{k}": v for k, v in s.items()},
    "_orig_mod.": lambda s: {f"_orig_mod.{k}": v for k, v in s.items()},
    "both": lambda s: {"model": {f"module._orig_mod.{k}": v for k, v in s.items()}},
    "both the other way": lambda s: {f"_orig_mod.module.{k}": v for k, v in s.items()},
    "with other things": lambda s: s | {"epoch": 3, "name": "x"},
    "with a command line": lambda s: {"state_dict": s, "args": Namespace(lr=0.1, names=["x"])},
}


@pytest.mark.parametrize("case", WRAPPED)
def test_wrapped_weights(state, tmp_path, case):
    file = write(WRAPPED[case](state), tmp_path / "w.pth")
    assert same(open_model(NAME, weights=file).model, state)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_load_into_float32(state, tmp_path, dtype):
    cast = {n: t.to(dtype) for n, t in state.items()}
    model = open_model(NAME, weights=write(cast, tmp_path / "w.safetensors")).model
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert same(model, {n: t.float() for n, t in cast.items()})


def test_weights_without_a_head(state, tmp_path):
    body = {n: t for n, t in state.items() if not n.startswith("head.")}
    file = write(body, tmp_path / "w.safetensors")
    assert open_model(NAME, weights=file).model.num_classes == 0
    with pytest.raises(WeightsError, match=r"2 missing \('head.weight', 'head.bias'\)"):
        open_model(NAME, weights=file, num_classes=7)


def test_a_mismatch_names_the_first_tensors_and_counts(state, tmp_path):
    file = tmp_path / "w.safetensors"
    changed = dict(state)
    for name in ("norm.bias", "norm.weight", "pos_embed", "cls_token"):
        del changed[name]
    changed["blocks.0.mlp.fc1.weight"] = torch.zeros(3, 4)
    changed["extra"] = torch.zeros(1)
    write(changed, file)
    with pytest.raises(WeightsError) as caught:
        open_model(f"{NAME}={file}")
    assert caught.value.message == (
        f"{file} does not fit {NAME}: 4 missing ('cls_token', 'pos_embed', 'norm.weight', ...); "
        "1 unexpected ('extra'); 1 of another size "
        "('blocks.0.mlp.fc1.weight' is (3, 4) instead of (192, 64))."
    )
    assert "--num-classes" in caught.value.fix


def test_given_classes_must_be_those_of_the_weights(state, tmp_path):
    file = write(state, tmp_path / "w.safetensors")
    with pytest.raises(WeightsError, match=r"'head.weight' is \(7, 64\) instead of \(9, 64\)"):
        open_model(NAME, weights=file, num_classes=9)


def test_quantized_weights_are_refused(state, tmp_path):
    state["head.weight"] = state["head.weight"].to(torch.int8)
    with pytest.raises(WeightsError, match=r"'head.weight' .* has dtype torch.int8"):
        open_model(NAME, weights=write(state, tmp_path / "w.safetensors"))


class Trap:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.trace,)


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors", "w"])
def test_code_in_weights_is_not_run(state, tmp_path, name):
    trace, file = tmp_path / "trace", tmp_path / name
    for content in (Trap(trace), {"model": state, "args": Trap(trace)}):
        torch.save(content, file)
        with pytest.raises(WeightsError, match="cannot be read"):
            open_model(NAME, weights=file)
    file.write_bytes(pickle.dumps(Trap(trace)))
    with pytest.raises(WeightsError, match="cannot be read"):
        open_model(NAME, weights=file)
    assert not trace.exists()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    "content", [b"", b"garbage", b"PK\x03\x04", b"\x80\x02", b"<html>404</html>"]
)
def test_damaged_files_are_refused(tmp_path, suffix, content):
    file = tmp_path / f"w{suffix}"
    file.write_bytes(content)
    with pytest.raises(WeightsError, match="cannot be read"):
        read_weights(file)


@pytest.mark.parametrize(
    "content", [{}, [1, 2], 3, {"epoch": 1}, {"model": {"a": 1}}, torch.zeros(2)]
)
def test_files_without_named_tensors_are_refused(tmp_path, content):
    with pytest.raises(WeightsError, match="holds no tensors by name"):
        read_weights(write(content, tmp_path / "w.pth"))


def test_absent_files_are_named(tmp_path):
    with pytest.raises(WeightsError, match="There is no file"):
        open_model(NAME, weights=tmp_path / "none.pth")
    with pytest.raises(WeightsError, match="There is no file"):
        open_model(f"{NAME}={tmp_path}")


@pytest.mark.parametrize("spec", [f"{NAME}=", "=w.pth", "="])
def test_half_a_name_is_a_usage_error(spec):
    with pytest.raises(UsageError, match="is not NAME=FILE"):
        open_model(spec)


def test_weights_given_twice_are_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match="given twice"):
        open_model(f"{NAME}=a.pth", weights=tmp_path / "b.pth")


# -- artifacts -----------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path) -> Path:
    dense = build()
    plan = Plan(blocks=(BlockPlan(neurons=(1, 2, 3)), BlockPlan(num_tokens_out=5)))
    model: Any = surgery.apply(dense, plan)
    model.vitailor = Provenance(shape=shape_of(model), record={"note": "kept"})
    return artifact.save(model, tmp_path / "small")


def test_an_artifact_folder(saved):
    opened = open_model(saved)
    assert opened.source == str(saved)
    assert opened.model.vitailor.record == {"note": "kept"}
    assert open_model(str(saved), num_classes=5).model.num_classes == 5
    with pytest.raises(UsageError, match="has 5 outputs, not 6"):
        open_model(saved, num_classes=6)


def test_an_artifact_wins_over_a_timm_name(saved, monkeypatch):
    monkeypatch.chdir(saved.parent)
    saved.rename(saved.parent / NAME)
    assert open_model(NAME).model.vitailor.record == {"note": "kept"}


def test_any_other_folder_does_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / NAME).mkdir()
    assert open_model(NAME, pretrained=False).model.num_classes == 1000


def test_an_artifact_may_get_other_weights(saved, tmp_path):
    tensors = artifact.load(saved).state_dict()
    tensors = {n: t + 1 if t.is_floating_point() else t for n, t in tensors.items()}
    file = write(tensors, tmp_path / "w.safetensors")
    opened = open_model(f"{saved}={file}")
    assert same(opened.model, tensors)
    assert opened.source == f"{saved}={file}"
    del tensors["head.bias"]
    write(tensors, file)
    with pytest.raises(WeightsError, match=r"1 missing \('head.bias'\)"):
        open_model(saved, weights=file)


def test_a_folder_with_an_equals_sign_is_a_folder(saved):
    odd = saved.rename(saved.parent / "keep=0.6")
    assert open_model(odd).source == str(odd)


def test_folders_that_are_no_artifacts_are_refused(saved, tmp_path):
    with pytest.raises(ArtifactError, match="There is no folder"):
        open_model("./none")
    with pytest.raises(ArtifactError, match=r"no artifact: it has no plan\.json"):
        open_model(tmp_path)
    with pytest.raises(ArtifactError):
        open_model(saved / "model.safetensors")
    (saved / "plan.json").write_text('{"version": 1}')
    with pytest.raises(PlanError, match="shape"):
        open_model(saved)
